"""The plan of a training job: what fits at each ZeRO stage, how long it takes, what is cheapest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from configs.calibration import Calibration
from configs.cost import (
    DEFAULT_GPU_GIB,
    FIXED_GIB,
    GIB,
    GPUS,
    USABLE,
    Gpu,
    activation_bytes,
    checkpoint_bytes,
    largest_micro_batch,
    macs_per_image,
    num_parameters,
    state_bytes,
    train_flops_per_image,
)
from configs.errors import SpecError
from configs.planned import CheapestPlan, Plan, StagePlan
from configs.rates import ASSUMED_MFU, Rate, compute_rate, decode_rate, exchanged_weights, lesser
from configs.resolve import num_train_examples
from configs.spec import TrainingJob
from configs.wire import DatasetCard

ERROR_BAND_PCT = 50
"""Of a rate that nobody measured."""
STAGES = (0, 1, 2, 3)
EQUAL = 1.01
"""Plans whose GPU-hours differ by less are equal: the simpler one is taken."""


@dataclass(frozen=True)
class _Layout:
    """One way to run the job."""

    stage: int
    world_size: int
    micro: int
    checkpointing: bool


class TrainingPlanner:
    """Plans `spec`, which is resolved; `asked` is what it was resolved from.

    Raises (when made):
        SpecError: the batch cannot be divided among so many workers.
    """

    def __init__(
        self,
        asked: TrainingJob,
        spec: TrainingJob,
        card: DatasetCard,
        device: Gpu | None,
        world_size: int | None,
        calibration: Calibration | None,
    ) -> None:
        batch = spec.train.global_batch_size
        if batch % (world_size or 1):
            raise SpecError.at(
                "/train/global_batch_size",
                f"train.global_batch_size {batch} cannot be divided among {world_size} workers",
                batch,
            )
        self._asked, self._spec, self._card = asked, spec, card
        self._config = spec.model.network()
        self._has_count = world_size is not None
        self._world_size = world_size or max(spec.allowed_world_sizes)
        self._on_gpu = device is not None or spec.resources.gpus_per_worker > 0
        self._device = device or GPUS.get(spec.resources.accelerator or "")
        calibration = calibration or Calibration()
        name = self._device.name if self._device else None
        macs = macs_per_image(self._config)
        self._measured = (
            calibration.rate(name, spec.train.precision, macs, spec.resources.cpus_per_worker)
            if name or not self._on_gpu
            else None
        )
        self._memory = calibration.memory(name)
        self._memory_gib = (self._device.memory_gib if self._device else DEFAULT_GPU_GIB) if self._on_gpu else None

    def plan(self) -> Plan:
        """The whole plan."""
        spec, config, world_size = self._spec, self._config, self._world_size
        batch, total_steps = spec.train.global_batch_size, spec.schedule.total_steps
        assert total_steps is not None
        num_examples = num_train_examples(spec.data, self._card)
        images = total_steps * batch
        micro = self._own_micro_batch()
        stages = tuple(self._stage(stage, micro) for stage in STAGES)
        rate = self._rate(_Layout(spec.zero.stage, world_size, micro, spec.train.activation_checkpointing))
        hours = images / rate.images_per_s / 3600 if rate else None
        cheapest = self._cheapest()
        return Plan(
            kind=spec.kind,
            parameters=num_parameters(config),
            macs=macs_per_image(config),
            exaflops=train_flops_per_image(config) * images / 1e18,
            num_examples=num_examples,
            steps=total_steps,
            epochs=images / num_examples,
            global_batch_size=batch,
            micro_batch_size=micro,
            grad_accum_steps=batch // (world_size * micro),
            world_size=world_size,
            allowed_world_sizes=spec.allowed_world_sizes,
            zero_stage=spec.zero.stage,
            accelerator=self._device.name if self._device else None,
            memory_gib=self._memory_gib,
            fits=stages[spec.zero.stage].fits,
            stages=stages,
            cheapest=cheapest,
            images_per_s=rate.images_per_s if rate else None,
            bound=rate.bound if rate else None,
            hours=hours,
            gpu_hours=hours * world_size if hours and self._on_gpu else None,
            error_band_pct=self._band_pct if rate else None,
            measured_jobs=self._measured.num_runs if self._measured else 0,
            checkpoint_bytes=checkpoint_bytes(config, spec.optim.name, spec.train.ema_decay is not None),
            notes=tuple(self._notes(stages, rate, cheapest)),
        )

    # -- memory --------------------------------------------------------------------------------------------------------
    def _own_micro_batch(self) -> int:
        """The job's own micro-batch where it divides the share; if it said auto, chosen for this GPU and world size."""
        spec = self._spec
        share = spec.train.global_batch_size // self._world_size
        pinned = spec.train.micro_batch_size
        assert pinned != "auto"
        if self._asked.train.micro_batch_size != "auto" and share % pinned == 0:
            return pinned
        found = self._largest(spec.zero.stage, self._world_size, spec.train.activation_checkpointing)
        return found or (1 if spec.data.mix is None else 2)

    def _largest(self, stage: int, world_size: int, checkpointing: bool) -> int | None:
        spec = self._spec
        return largest_micro_batch(
            self._config,
            global_batch_size=spec.train.global_batch_size,
            world_sizes=(world_size,),
            zero_stage=stage,
            optimizer=spec.optim.name,
            precision=spec.train.precision,
            checkpointing=checkpointing,
            memory_gib=None if self._memory_gib is None else self._memory_gib / self._memory_ratio,
            even=spec.data.mix is not None,
            ema=spec.train.ema_decay is not None,
        )

    @property
    def _memory_ratio(self) -> float:
        """What is needed to what is computed; below 1 nothing is promised."""
        return max(1.0, self._memory.ratio) if self._memory else 1.0

    def _total_gib(self, stage: int, micro: int) -> tuple[float, float, float]:
        """State, activations, and both with the fixed allowance of a GPU and what finished jobs needed more."""
        spec = self._spec
        state = state_bytes(self._config, stage, self._world_size, spec.optim.name, spec.train.ema_decay is not None)
        activations = activation_bytes(self._config, micro, spec.train.precision, spec.train.activation_checkpointing)
        fixed = FIXED_GIB if self._memory_gib is not None else 0.0
        return state / GIB, activations / GIB, ((state + activations) / GIB + fixed) * self._memory_ratio

    def _stage(self, stage: int, own_micro: int) -> StagePlan:
        checkpointing = self._spec.train.activation_checkpointing
        state, activations, total = self._total_gib(stage, own_micro)
        if self._memory_gib is None:
            return StagePlan(
                stage=stage,
                state_gib=state,
                activation_gib=activations,
                total_gib=total,
                fits=None,
                max_micro_batch=None,
            )
        fits = total <= self._memory_gib * USABLE
        largest = self._largest(stage, self._world_size, checkpointing)
        micro = own_micro if fits else largest
        hours = None if micro is None else self._hours(_Layout(stage, self._world_size, micro, checkpointing))
        return StagePlan(
            stage=stage,
            state_gib=state,
            activation_gib=activations,
            total_gib=total,
            fits=fits,
            max_micro_batch=largest,
            hours=hours,
            gpu_hours=None if hours is None else hours * self._world_size,
        )

    # -- time ----------------------------------------------------------------------------------------------------------
    @property
    def _flops_per_s(self) -> float | None:
        """Useful FLOP/s of one worker: measured, or a share of the vendor's peak."""
        if self._measured is not None:
            return self._measured.flops_per_s
        peak = self._device.peak_tflops(self._spec.train.precision) if self._device else None
        return None if peak is None else peak * 1e12 * ASSUMED_MFU

    @property
    def _band_pct(self) -> int:
        return self._measured.band_pct if self._measured else ERROR_BAND_PCT

    def _rate(self, layout: _Layout) -> Rate | None:
        flops_per_s = self._flops_per_s
        if flops_per_s is None:
            return None
        batch = self._spec.train.global_batch_size
        compute = compute_rate(
            self._config,
            flops_per_s=flops_per_s,
            gpu=self._device,
            world_size=layout.world_size,
            global_batch_size=batch,
            zero_stage=layout.stage,
            grad_accum_steps=batch // (layout.world_size * layout.micro),
            checkpointing=layout.checkpointing,
        )
        if not self._on_gpu:
            # The cores that decode are those that were measured: it is in their rate.
            return Rate(compute, "compute")
        return lesser(compute, decode_rate(self._spec.data, layout.world_size, self._spec.resources.cpus_per_worker))

    def _hours(self, layout: _Layout) -> float | None:
        rate = self._rate(layout)
        steps = self._spec.schedule.total_steps
        if rate is None or steps is None:
            return None
        return steps * self._spec.train.global_batch_size / rate.images_per_s / 3600

    # -- the cheapest --------------------------------------------------------------------------------------------------
    def _layouts(self) -> Iterator[_Layout]:
        """Every way to run it that fits, of equals the better first: stage 1 sends what stage 0 does and holds less."""
        own = self._spec.zero.stage
        stages = (own, *(s for s in (1, 0, 2, 3) if s != own)) if own < 2 else (1, 0, 2, 3)
        world_sizes = (self._world_size,) if self._has_count else sorted(self._spec.allowed_world_sizes)
        for checkpointing in (False, True):
            for stage in stages:
                for world_size in world_sizes:
                    micro = self._largest(stage, world_size, checkpointing)
                    if micro is not None:
                        yield _Layout(stage, world_size, micro, checkpointing)

    def _cheapest(self) -> CheapestPlan | None:
        best: CheapestPlan | None = None
        if self._memory_gib is None:
            return None
        for layout in self._layouts():
            hours = self._hours(layout)
            if hours is None:
                return None
            gpu_hours = hours * layout.world_size
            # Of workers that cost the same, more are done sooner.
            is_sooner = best is not None and layout.stage == best.zero_stage and hours < best.hours / EQUAL
            if best is None or gpu_hours < best.gpu_hours / EQUAL or (is_sooner and gpu_hours < best.gpu_hours * EQUAL):
                best = CheapestPlan(
                    zero_stage=layout.stage,
                    activation_checkpointing=layout.checkpointing,
                    micro_batch_size=layout.micro,
                    grad_accum_steps=self._spec.train.global_batch_size // (layout.world_size * layout.micro),
                    world_size=layout.world_size,
                    hours=hours,
                    gpu_hours=gpu_hours,
                )
        return best

    # -- words ---------------------------------------------------------------------------------------------------------
    def _notes(self, stages: tuple[StagePlan, ...], rate: Rate | None, cheapest: CheapestPlan | None) -> list[str]:
        notes = [self._card.note] if self._card.note else []
        if self._memory_gib is None:
            if rate is None:
                unknown = "no job like it has finished here (patchwork plan --server asks the server)"
                return [*notes, f"On CPU: memory is not planned, and hours are not known: {unknown}."]
            return [*notes, "On CPU: memory is not planned.", self._source_of_rate()]
        notes.append(
            "Computed: GPUs were measured by us on one H200 only." if not self._measured else self._source_of_rate()
        )
        own = stages[self._spec.zero.stage]
        if not own.fits:
            notes.append(_advice(own, stages, self._memory_gib))
        if cheapest is not None:
            notes.append(self._about_cheapest(cheapest, own))
        if self._memory is not None:
            notes.append(
                f"Of {self._memory.num_runs} finished jobs the worst needed {self._memory.ratio:.2f} times the memory "
                "that was planned; that is counted in."
            )
        notes.extend(self._about_rate(rate))
        return notes

    def _source_of_rate(self) -> str:
        assert self._measured is not None
        what = "this model" if self._measured.is_same_model else "models of its size"
        jobs = f"{self._measured.num_runs} finished job{'s' if self._measured.num_runs > 1 else ''}"
        return f"Hours are from {jobs} with {what}; take them as ± {self._measured.band_pct} %."

    def _about_rate(self, rate: Rate | None) -> Iterator[str]:
        device, precision = self._device, self._spec.train.precision
        if rate is None:
            if device is None:
                yield (
                    f"No GPU named: memory is planned for {DEFAULT_GPU_GIB:g} GiB, hours are not known. "
                    "Name one (H100:8)."
                )
            else:
                yield f"{device.name} has no bfloat16 matrix units: hours are not known. Use train.precision fp32."
            return
        if self._measured is None and device is not None:
            yield (
                f"Hours assume {ASSUMED_MFU:.0%} of {device.name}'s peak ({device.peak_tflops(precision):g} TFLOP/s "
                f"{precision}, vendor's figure) and {device.link_gb_per_s:g} GB/s between GPUs; "
                f"take them as ± {ERROR_BAND_PCT} %."
            )
        if rate.bound == "decode":
            cores = self._spec.resources.cpus_per_worker
            yield (
                f"Decoding binds, not the GPUs: {self._world_size} x {cores} cores bring about "
                f"{rate.images_per_s:,.0f} images/s; resources.cpus_per_worker raises that."
            )

    def _about_cheapest(self, best: CheapestPlan, own: StagePlan) -> str:
        recompute = " with activation checkpointing" if best.activation_checkpointing else ""
        text = (
            f"Cheapest that fits: ZeRO stage {best.zero_stage}{recompute}, micro-batch {best.micro_batch_size} x "
            f"{best.grad_accum_steps}, {best.world_size} workers: {best.hours:,.3g} hours, "
            f"{best.gpu_hours:,.3g} GPU-hours."
        )
        if best.zero_stage == own.stage:
            return text
        if own.gpu_hours is None:
            return f"{text} Stage {best.zero_stage} is better than {own.stage}, which does not fit."
        if own.gpu_hours > best.gpu_hours * EQUAL:
            more = f"{own.gpu_hours / best.gpu_hours - 1:.0%} more GPU-hours"
            return f"{text} Stage {best.zero_stage} is better than {own.stage}, which takes {more}."
        ours = exchanged_weights(own.stage, 1), exchanged_weights(best.zero_stage, 1)
        sends = f" and sends {ours[0]:g} instead of {ours[1]:g} times the weights per step" if ours[0] > ours[1] else ""
        return f"{text} Stage {best.zero_stage} is better than {own.stage}, which takes as long{sends}."


def _advice(own: StagePlan, stages: tuple[StagePlan, ...], memory_gib: float) -> str:
    text = f"Does not fit: {own.total_gib:.1f} GiB of {memory_gib:g} GiB at ZeRO stage {own.stage}"
    if own.max_micro_batch is not None:
        return f"{text}; train.micro_batch_size {own.max_micro_batch} does."
    better = next((s for s in stages if s.max_micro_batch is not None and s.stage > own.stage), None)
    if better is not None:
        return f"{text}; zero.stage {better.stage} with train.micro_batch_size {better.max_micro_batch} does."
    return f"{text}; no stage does. Use more workers, larger GPUs or train.activation_checkpointing."
