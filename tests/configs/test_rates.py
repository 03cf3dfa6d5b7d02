"""Rates of plans: arithmetic, what is sent, decoding, and what finished jobs measured."""

from __future__ import annotations

from typing import Any

import pytest

from configs.calibration import Calibration, MeasuredRun
from configs.cost import GPUS, macs_per_image, num_parameters, train_flops_per_image
from configs.data import DataConfig
from configs.datasets import TORCHVISION_CARDS
from configs.load import parse_spec
from configs.plan import Plan, plan
from configs.rates import compute_rate, decode_rate, exchanged_weights, lesser
from configs.resolve import resolve
from configs.spec import TrainingJob
from tests.configs.specs import CARD, PRETRAIN

IMAGENET = TORCHVISION_CARDS["ImageNet"]
B16 = "paper/pretrain/imagenet-b16"


def paper(gpu: str | None, calibration: Calibration | None = None, name: str = B16, **fields: Any) -> Plan:
    return plan(parse_spec({"preset": name} | fields), IMAGENET, gpu, calibration=calibration)


def run(**changes: Any) -> MeasuredRun:
    values: dict[str, Any] = {
        "job_id": "job_1",
        "accelerator": "H100",
        "precision": "bf16",
        "macs": paper("H100:8").macs,
        "checkpointing": False,
        "cpus_per_worker": 8,
        "world_size": 8,
        "images_per_s": 8_000.0,
    }
    return MeasuredRun(**(values | changes))


# -- what is sent ------------------------------------------------------------------------------------------------------
def test_what_a_rank_sends() -> None:
    assert [exchanged_weights(stage, 1) for stage in range(4)] == [2, 2, 2, 3]
    assert [exchanged_weights(stage, 4) for stage in range(4)] == [2, 2, 5, 12]


def test_what_does_not_hide_behind_the_backward_pass_is_added_to_the_step() -> None:
    spec = resolve(parse_spec({"preset": "paper/pretrain/imagenet-l16"}), IMAGENET, None)
    assert isinstance(spec, TrainingJob)
    config, slow = spec.model.network(), GPUS["L4"]

    def rate(stage: int, batch: int, gpu: Any = slow) -> float:
        return compute_rate(
            config,
            flops_per_s=1e13,
            gpu=gpu,
            world_size=8,
            global_batch_size=batch,
            zero_stage=stage,
            grad_accum_steps=1,
            checkpointing=False,
        )

    alone_s = train_flops_per_image(config) * 8 / 8 / 1e13
    sent_s = 2 * 7 / 8 * num_parameters(config) * 4 / (16e9 * 0.7)
    assert rate(1, 8) == pytest.approx(8 / (alone_s + sent_s - alone_s * 2 / 3))
    assert rate(3, 8) < rate(1, 8), "three times the weights instead of two"
    assert rate(1, 4096) == rate(3, 4096) == pytest.approx(8 * 1e13 / train_flops_per_image(config))
    assert rate(1, 8, gpu=None) == pytest.approx(8 / alone_s)


# -- decoding ----------------------------------------------------------------------------------------------------------
def test_the_slower_of_arithmetic_and_decoding_binds() -> None:
    bound = paper("H100:8", resources={"workers": 8, "cpus_per_worker": 2})
    assert bound.bound == "decode"
    assert bound.images_per_s == 8 * 2 * 350
    assert any("Decoding binds" in note and "cpus_per_worker" in note for note in bound.notes)
    free = paper("H100:8", resources={"workers": 8, "cpus_per_worker": 64})
    assert (free.bound, free.images_per_s) == ("compute", pytest.approx(8 * 989e12 * 0.4 / (6 * (free.macs or 0))))
    assert not any("Decoding" in note for note in free.notes)


def test_images_that_need_no_decoding() -> None:
    def data(source: dict[str, Any]) -> DataConfig:
        return DataConfig.model_validate({"source": source})

    assert decode_rate(data({"type": "torchvision", "name": "FashionMNIST"}), 2, 1) == 100_000
    assert decode_rate(data({"type": "folder", "name": "photos"}), 2, 4) == 2 * 4 * 350
    made = {"type": "synthetic", "num_classes": 10, "num_train": 100, "num_eval": 10}
    assert decode_rate(data(made), 2, 4) is None
    assert lesser(10.0, None).bound == "compute"


# -- the cheapest ------------------------------------------------------------------------------------------------------
def test_stage_1_is_better_where_stage_3_only_sends_more() -> None:
    found = paper("H100:8", zero={"stage": 3})
    assert found.cheapest is not None
    assert found.cheapest.zero_stage == 1
    assert any("Stage 1 is better than 3" in note for note in found.notes)


def test_a_stage_that_holds_less_is_taken_where_the_others_do_not_fit() -> None:
    found = paper("L4:8", model={"variant": "G/14", "head": "linear"})
    by_stage = {stage.stage: stage for stage in found.stages}
    assert by_stage[0].max_micro_batch is None
    assert by_stage[0].hours is None
    assert found.cheapest is not None
    assert found.cheapest.zero_stage > 0
    chosen = by_stage[found.cheapest.zero_stage]
    if not found.cheapest.activation_checkpointing:
        assert chosen.max_micro_batch == found.cheapest.micro_batch_size
    assert found.cheapest.micro_batch_size * found.cheapest.grad_accum_steps * 8 == found.global_batch_size


def test_without_a_count_the_number_of_workers_is_chosen_too() -> None:
    found = paper("H100", resources={"workers": {"min": 1, "max": 8}, "cpus_per_worker": 64})
    assert found.cheapest is not None
    assert found.cheapest.world_size == 8, "as cheap as one, and done sooner"
    assert found.cheapest.gpu_hours == pytest.approx(found.cheapest.hours * 8)


def test_nothing_is_cheapest_where_nothing_is_known() -> None:
    assert paper(None).cheapest is None
    assert paper("V100:8").cheapest is None


# -- measured ----------------------------------------------------------------------------------------------------------
def test_a_measured_rate_takes_the_place_of_the_assumption() -> None:
    runs = [run(images_per_s=rate) for rate in (7_000.0, 8_000.0, 8_800.0)]
    found = paper("H100:8", Calibration(runs))
    assert found.images_per_s == pytest.approx(8_000)
    assert (found.measured_jobs, found.error_band_pct) == (3, 15)
    notes = " ".join(found.notes)
    assert "3 finished jobs with this model" in notes
    assert "on one H200 only" not in notes
    assert "assume" not in notes
    # Twice as many workers, twice the rate, as long as the loaders keep up.
    assert paper("H100:16", Calibration(runs)).images_per_s == pytest.approx(16_000)


def test_runs_that_scatter_widen_the_band() -> None:
    found = paper("H100:8", Calibration([run(images_per_s=rate) for rate in (4_000.0, 8_000.0, 9_000.0)]))
    assert found.error_band_pct == 50


def test_a_model_of_its_size_tells_with_a_wider_band() -> None:
    macs = paper("H100:8").macs or 0
    near = paper("H100:8", Calibration([run(macs=macs * 2, images_per_s=4_000.0)]))
    assert near.images_per_s == pytest.approx(8_000, rel=1e-6)
    assert near.error_band_pct == 30
    assert paper("H100:8", Calibration([run(macs=macs * 9)])).measured_jobs == 0


@pytest.mark.parametrize(
    "other",
    [{"accelerator": "A100"}, {"accelerator": None}, {"precision": "fp32"}, {"data_wait": 0.6}],
    ids=["another GPU", "CPU", "another precision", "it waited for data"],
)
def test_what_says_nothing_of_this_job_is_left_out(other: dict[str, Any]) -> None:
    assert paper("H100:8", Calibration([run(**other)])).measured_jobs == 0


def test_recomputed_forwards_are_not_useful_work() -> None:
    found = paper("H100:8", Calibration([run(checkpointing=True, images_per_s=6_000.0)]))
    assert found.images_per_s == pytest.approx(8_000)


def test_peaks_above_the_plan_are_counted_in() -> None:
    plain = paper("H100:8")
    found = paper("H100:8", Calibration([run(peak_gib=44.0, planned_gib=40.0), run(peak_gib=30.0, planned_gib=40.0)]))
    assert found.stages[1].total_gib == pytest.approx(plain.stages[1].total_gib * 1.1)
    assert any("1.10 times the memory" in note for note in found.notes)
    lower = paper("H100:8", Calibration([run(peak_gib=30.0, planned_gib=40.0)]))
    assert lower.stages[1].total_gib == plain.stages[1].total_gib, "nothing is promised"


def test_hours_on_cpu_come_from_finished_jobs_only() -> None:
    asked = parse_spec(PRETRAIN | {"resources": {"workers": 2, "gpus_per_worker": 0, "cpus_per_worker": 1}})
    spec = resolve(asked, CARD, None)
    assert isinstance(spec, TrainingJob)
    before = plan(spec, CARD)
    assert before.hours is None
    measured = run(
        accelerator=None,
        precision=spec.train.precision,
        macs=macs_per_image(spec.model.network()),
        cpus_per_worker=1,
        world_size=2,
        images_per_s=50.0,
    )
    after = plan(spec, CARD, calibration=Calibration([measured]))
    assert after.images_per_s == pytest.approx(50)
    assert after.hours == pytest.approx((after.steps or 0) * (after.global_batch_size or 0) / 50 / 3600)
    assert after.gpu_hours is None
    assert plan(spec, CARD, calibration=Calibration([measured.model_copy(update={"cpus_per_worker": 4})])).hours is None
