from __future__ import annotations

import torch
from timm.optim import Lamb as TimmLamb

from configs.train import Optim
from vit.lamb import Lamb, Piece
from vit.optim import build_optimizer, param_groups


def gradients(parameters, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)


def test_lamb_is_timms_without_its_clip(make_model) -> None:
    """timm's is apex's FusedLAMB in PyTorch; both adapt only groups that decay."""
    ours, theirs = make_model(depth=1), make_model(depth=1)
    optimizer = build_optimizer(ours, Optim(name="lamb", lr=4e-3, weight_decay=0.05, eps=1e-6))
    reference = TimmLamb(param_groups(theirs, 0.05), lr=4e-3, eps=1e-6, max_grad_norm=None)
    for step in range(10):
        gradients(ours.parameters(), step)
        gradients(theirs.parameters(), step)
        optimizer.step()
        reference.step()
    for p, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)


def test_trust_ratio_is_one_where_a_norm_is_zero() -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = Lamb([{"params": [p], "weight_decay": 0.1}], lr=0.5)
    p.grad = torch.tensor([1.0, -2.0, 3.0])
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([-0.5, 0.5, -0.5]))


def test_a_flat_tensor_steps_as_the_parameters_in_it() -> None:
    """Norms are of parameters, not of the tensor they lie in; tests/workers/test_recipes.py cuts them among ranks."""
    start = torch.randn(12, generator=torch.Generator().manual_seed(0))
    start[10:] = 0.0  # padding
    parameters = [torch.nn.Parameter(start[:4].clone()), torch.nn.Parameter(start[4:10].clone())]
    flat = torch.nn.Parameter(start.clone())
    reference = Lamb([{"params": parameters, "weight_decay": 0.1}], lr=0.1)
    optimizer = Lamb([{"params": [flat], "weight_decay": 0.1}], lr=0.1)
    optimizer.locate({flat: [Piece(0, 0, 4), Piece(1, 4, 6)]}, 2, lambda squares: None)
    for step in range(3):
        gradients(parameters, step)
        flat.grad = torch.cat([*(p.grad for p in parameters if p.grad is not None), torch.zeros(2)])
        reference.step()
        optimizer.step()
    torch.testing.assert_close(flat.detach()[:10], torch.cat([p.detach() for p in parameters]))
    assert flat.detach()[10:].tolist() == [0.0, 0.0]
