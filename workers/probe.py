"""Few-shot and nearest-neighbour accuracy of a model's features, the same for any number of workers.

Each rank computes the features of its share of the images; all of them are gathered on every rank, which then solves
the same small problem.

    n  images     D  feature dimension     b  images per rank and batch
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from configs.data import DataConfig
from configs.probes import FewShot, Neighbours
from vit.few_shot import choose_shots, few_shot_accuracy, knn_accuracy
from workers.data.loader import Batch, EvalLoader, normalise
from workers.data.source import ImageSource, Selection
from workers.distributed import Ranks

MakeLoader = Callable[[ImageSource], EvalLoader]
Represent = Callable[[Tensor], Tensor]


def probe(
    represent: Represent,
    pool: ImageSource,
    test: ImageSource,
    make_loader: MakeLoader,
    data: DataConfig,
    num_classes: int,
    few_shot: FewShot | None,
    neighbours: Neighbours | None,
    ranks: Ranks,
    keep_going: Callable[[], bool] = lambda: True,
    label: str = "",
) -> dict[str, float] | None:
    """eval/few_shot/<k> and eval/few_shot/<k>_std for every number of shots k (mean and standard deviation over the
    seeds), and eval/knn (collective). With a label: eval/few_shot/<label>/<k> and so on, and eval/knn/<label>.

    `represent` maps normalised images to features (b, D). `keep_going` is asked after every batch and must answer alike
    on all ranks; when it says no, the result is None.
    """
    labels = torch.from_numpy(np.asarray(pool.labels))
    chosen = _choices(labels, num_classes, few_shot)
    bank = _bank(len(pool), neighbours)
    used = torch.unique(torch.cat([*chosen.values(), bank]))  # sorted
    found = extract(represent, make_loader(Selection(pool, used.numpy())), len(used), data, ranks, keep_going)
    tested = None if found is None else extract(represent, make_loader(test), len(test), data, ranks, keep_going)
    if found is None or tested is None:
        return None
    features, is_there = found
    test_features, test_is_there = tested
    test_features = test_features[test_is_there]
    test_labels = torch.from_numpy(np.asarray(test.labels))[test_is_there]

    def at(indices: Tensor) -> tuple[Tensor, Tensor]:
        """Features and labels of these images of the pool, less those that could not be read."""
        places = torch.searchsorted(used, indices)
        places = places[is_there[places]]
        return features[places], labels[used[places]]

    measured: dict[str, float] = {}
    few_shot_name = f"eval/few_shot/{label}/" if label else "eval/few_shot/"
    if few_shot is not None:
        for shots in few_shot.shots:
            scores = [
                few_shot_accuracy(
                    *at(chosen[seed][_first(labels[chosen[seed]], shots)]),
                    test_features,
                    test_labels,
                    num_classes,
                    few_shot.l2,
                )
                for seed in range(few_shot.num_seeds)
            ]
            measured[f"{few_shot_name}{shots}"] = statistics.fmean(scores)
            measured[f"{few_shot_name}{shots}_std"] = statistics.pstdev(scores)
    if neighbours is not None:
        bank_features, bank_labels = at(bank)
        k = min(neighbours.k, len(bank_features))
        measured[f"eval/knn/{label}" if label else "eval/knn"] = knn_accuracy(
            bank_features, bank_labels, test_features, test_labels, num_classes, k, neighbours.temperature
        )
    return measured


def extract(
    represent: Represent,
    batches: Iterable[Batch],
    num_images: int,
    data: DataConfig,
    ranks: Ranks,
    keep_going: Callable[[], bool] = lambda: True,
) -> tuple[Tensor, Tensor] | None:
    """Features fp32 (n, D) of a source's images in its order, on the CPU of every rank, and which images could be read,
    bool (n,); None if told not to go on (collective)."""
    features, ids = [], []
    for batch in batches:
        images = normalise(batch.images.to(ranks.device, non_blocking=True), data.mean, data.std)
        features.append(represent(images).float().cpu())
        ids.append(torch.where(batch.mask, batch.sample_ids, -1))
        if not keep_going():
            return None
    mine, my_ids = torch.cat(features).contiguous(), torch.cat(ids).contiguous()
    # Every rank has equally many batches of one shape.
    all_features = [torch.empty_like(mine) for _ in range(ranks.world_size)]
    all_ids = [torch.empty_like(my_ids) for _ in range(ranks.world_size)]
    dist.all_gather(all_features, mine, group=ranks.control_group)
    dist.all_gather(all_ids, my_ids, group=ranks.control_group)
    found_ids, found = torch.cat(all_ids), torch.cat(all_features)
    is_image = found_ids >= 0
    result, is_there = torch.zeros(num_images, mine.shape[1]), torch.zeros(num_images, dtype=torch.bool)
    result[found_ids[is_image]] = found[is_image]
    is_there[found_ids[is_image]] = True
    return result, is_there


def _choices(labels: Tensor, num_classes: int, few_shot: FewShot | None) -> dict[int, Tensor]:
    """For each seed the examples of the largest number of shots, which begin with those of the smaller ones."""
    if few_shot is None:
        return {}
    most = max(few_shot.shots)
    return {seed: choose_shots(labels, num_classes, most, seed) for seed in range(few_shot.num_seeds)}


def _first(labels: Tensor, shots: int) -> Tensor:
    """Places of the first `shots` of each class in a list that is sorted by class."""
    starts = torch.searchsorted(labels, labels)
    return torch.arange(len(labels))[torch.arange(len(labels)) - starts < shots]


def _bank(num_images: int, neighbours: Neighbours | None) -> Tensor:
    if neighbours is None:
        return torch.empty(0, dtype=torch.int64)
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(neighbours.seed))
    return order[: neighbours.max_examples]
