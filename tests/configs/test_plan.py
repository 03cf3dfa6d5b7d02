from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from configs.datasets import PLANNING_CARDS, TORCHVISION_CARDS
from configs.errors import SpecError
from configs.load import parse_spec
from configs.plan import Plan, plan
from configs.resolve import resolve
from configs.spec import TrainingJob
from tests.configs.specs import CARD, EVALUATE, FINETUNE, PRETRAIN, job, source

IMAGENET = TORCHVISION_CARDS["ImageNet"]


def paper(name: str, gpu: str | None = "H100:8", **fields: Any) -> Plan:
    card = PLANNING_CARDS["jft300m"] if "jft" in name else IMAGENET
    return plan(parse_spec({"preset": name} | fields), card, gpu)


def test_a_plan_of_the_largest_model_of_the_paper() -> None:
    found = paper("paper/pretrain/jft300m-h14")
    assert found.exaflops == pytest.approx(4262, rel=0.01)
    assert found.epochs == pytest.approx(14, rel=1e-3)
    assert found.parameters == 655_835_251
    assert [stage.stage for stage in found.stages] == [0, 1, 2, 3]
    states = [stage.state_gib for stage in found.stages]
    assert states == sorted(states, reverse=True)
    assert found.fits is True
    assert found.global_batch_size == 4096
    assert (found.world_size, found.micro_batch_size, found.grad_accum_steps) == (8, 128, 4)
    # 6 x MAC at 40 % of 989 TFLOP/s on 8 GPUs.
    assert found.hours == pytest.approx(4258e18 / (8 * 989e12 * 0.4) / 3600, rel=0.01)
    assert found.gpu_hours == pytest.approx(8 * (found.hours or 0))
    assert found.error_band_pct == 50


def test_a_plan_admits_how_little_was_measured_and_names_its_assumption() -> None:
    notes = " ".join(paper("paper/pretrain/imagenet-b16").notes)
    assert "measured by us on one H200 only" in notes
    assert "40%" in notes
    assert "Decoding binds" in notes


def test_a_resolved_job_has_the_same_plan() -> None:
    spec = parse_spec({"preset": "paper/pretrain/imagenet-b16"})
    assert isinstance(spec, TrainingJob)
    assert plan(spec, IMAGENET, "H100:8") == plan(resolve(spec, IMAGENET, None), IMAGENET, "H100:8")


def test_without_a_gpus_name_hours_are_not_invented() -> None:
    found = paper("paper/pretrain/imagenet-b16", gpu=None)
    assert (found.hours, found.images_per_s, found.error_band_pct) == (None, None, None)
    assert found.memory_gib == 80
    assert any("hours are not known" in note for note in found.notes)


def test_the_jobs_own_accelerator_is_planned_for() -> None:
    found = paper("paper/pretrain/imagenet-b16", gpu=None, resources={"accelerator": "A100"})
    assert (found.accelerator, found.world_size) == ("A100", 8)
    assert found.hours is not None


def test_on_cpu_neither_memory_nor_hours_are_promised() -> None:
    found = plan(job(PRETRAIN), CARD)
    assert (found.hours, found.images_per_s, found.fits, found.memory_gib) == (None, None, None, None)
    assert found.steps == 47
    assert found.checkpoint_bytes == (found.parameters or 0) * 12
    assert any("On CPU" in note for note in found.notes)


def test_a_job_that_does_not_fit_is_told_what_does() -> None:
    found = paper("paper/pretrain/imagenet-l16", gpu="L4:8", train={"micro_batch_size": 512})
    assert found.fits is False
    (advice,) = [note for note in found.notes if "Does not fit" in note]
    best = found.stages[1].max_micro_batch
    assert best is not None
    assert f"train.micro_batch_size {best} does" in advice
    assert paper("paper/pretrain/imagenet-l16", gpu="L4:8", train={"micro_batch_size": best}).fits is True


def test_a_higher_stage_is_advised_where_only_that_helps() -> None:
    model = {"variant": "G/14", "head": "linear"}
    found = paper("paper/pretrain/imagenet-b16", "L4:8", model=model, zero={"stage": 0})
    assert [stage.max_micro_batch is not None for stage in found.stages] == [False, False, True, True]
    assert any("zero.stage 2 with train.micro_batch_size" in note for note in found.notes)
    hopeless = paper("paper/pretrain/imagenet-b16", "T4:1", model=model)
    assert any("no stage does" in note for note in hopeless.notes)


def test_checkpointing_costs_time_but_no_counted_operations() -> None:
    cores = {"workers": 8, "cpus_per_worker": 64}
    plain = paper("paper/pretrain/imagenet-b16", resources=cores)
    slow = paper("paper/pretrain/imagenet-b16", resources=cores, train={"activation_checkpointing": True})
    assert slow.exaflops == plain.exaflops
    assert slow.hours == pytest.approx((plain.hours or 0) * 4 / 3)


def test_a_gpu_without_bf16_has_no_hours() -> None:
    found = paper("paper/pretrain/imagenet-b16", gpu="V100:8")
    assert found.hours is None
    assert any("no bfloat16" in note for note in found.notes)
    assert paper("paper/pretrain/imagenet-b16", gpu="V100:8", train={"precision": "fp32"}).hours is not None


@pytest.mark.parametrize("gpu", ["H10", "H100:", "H100:0", "8xH100", ""])
def test_unknown_gpus_are_refused(gpu: str) -> None:
    with pytest.raises(SpecError) as caught:
        paper("paper/pretrain/imagenet-b16", gpu=gpu)
    assert caught.value.errors[0].pointer == "/gpu"
    assert "H100" in (caught.value.errors[0].allowed or "")


def test_gpus_are_known_by_the_names_people_use() -> None:
    assert paper("paper/pretrain/imagenet-b16", gpu="A100-80GB:4").accelerator == "A100-80G"
    assert paper("paper/pretrain/imagenet-b16", gpu="h100").accelerator == "H100"


def test_a_count_that_does_not_divide_the_batch_is_refused() -> None:
    with pytest.raises(SpecError) as caught:
        paper("paper/pretrain/imagenet-b16", gpu="H100:3")
    assert caught.value.errors[0].pointer == "/train/global_batch_size"


def test_finetunes_evaluations_and_exports_are_planned() -> None:
    assert plan(job(FINETUNE), CARD, None, source()).steps == 10
    found = plan(job(EVALUATE, data=PRETRAIN["data"]), CARD, None, source())
    assert found.num_examples == 200
    assert found.steps is None
    assert plan(job({"kind": "export", "init_from": "ckpt_x"}), None, None, source()).parameters is not None


def test_planning_needs_no_framework() -> None:
    code = "import sys, configs.plan, configs.lineage; print(sorted({'torch','numpy','ray'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"
