"""The job description: one union on `kind`. Field names are the contract with users."""

from __future__ import annotations

import itertools
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, TypeAdapter, model_validator

from configs.base import Label, Positive, Seed, Strict
from configs.data import DataConfig
from configs.imports import UPLOAD_ID_PATTERN, ImportModel, ImportPreprocess, Origin, Sha256, WeightFormat
from configs.model import ModelConfig, NetworkConfig
from configs.pictures import PICTURES, READ_IMAGES, PictureName, pictures_of
from configs.probes import FewShot, Neighbours
from configs.search import (
    MAX_TRIALS,
    Budget,
    Choice,
    Concurrency,
    FinalRun,
    NoScheduler,
    Scheduler,
    Space,
    finite_values,
    grid,
    in_order,
)
from configs.service import Queue, Resources, Retry
from configs.train import Checkpoint, Eval, Optim, Schedule, Train, Weights, Zero

SPEC_SCHEMA_VERSION: Literal[1] = 1

CheckpointRef = Annotated[
    str, StringConstraints(pattern=r"^(ckpt_[0-9A-Za-z_-]{1,80}|job_[0-9A-HJKMNP-TV-Z]{26}/(best|latest))$")
]
"""A checkpoint by id (`ckpt_…`), or a job's best or latest one (`job_…/best`)."""


def _inside(path: str) -> str:
    """Raises ValueError if a path could lead out of where it is looked for."""
    if path.startswith("/") or ".." in PurePosixPath(path).parts:
        raise ValueError(f"expected a path below the data root, without '..', got {path!r}")
    return path


DataPath = Annotated[
    str, StringConstraints(min_length=1, max_length=1024, pattern=r"^[^\x00-\x1f\x7f]+$"), AfterValidator(_inside)
]
"""A file below the nodes' data root."""

WEIGHTS: Weights = Field("raw", description="Which weights of the checkpoint: its own, or their moving average.")


class _Job(Strict):
    schema_version: Literal[1] = SPEC_SCHEMA_VERSION
    name: Label = Field("unnamed", description="Shown to people; need not be unique.")
    labels: dict[Label, Annotated[str, StringConstraints(max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")]] = Field(
        default_factory=dict, max_length=64
    )
    preset: str | None = Field(None, description="The preset this was made from; the other keys override it.")
    resources: Resources = Resources()
    queue: Queue = Queue()
    retry: Retry = Retry()


class _TrainingJob(_Job):
    model: ModelConfig
    data: DataConfig
    optim: Optim = Optim()
    schedule: Schedule
    train: Train = Train()
    zero: Zero = Zero()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()

    @model_validator(mode="after")
    def _check_cross_fields(self) -> Self:
        batch = self.train.global_batch_size
        low, high = self.resources.worker_range
        allowed = [n for n in range(low, high + 1) if batch % n == 0]
        if not allowed:
            wanted = str(low) if low == high else f"{low} to {high}"
            raise ValueError(f"train.global_batch_size {batch} cannot be divided among {wanted} workers")
        micro = self.train.micro_batch_size
        if micro != "auto":
            for n in allowed:
                if (batch // n) % micro:
                    raise ValueError(
                        f"train.micro_batch_size {micro} does not divide the {batch // n} images that each of {n} "
                        f"workers takes of train.global_batch_size {batch}"
                    )
        if self.model.head_bias_init != 0.0 and self.train.loss not in ("sigmoid", "bce"):
            # Added to every class alike, it changes nothing under a softmax.
            raise ValueError(
                f"model.head_bias_init {self.model.head_bias_init:g} applies to train.loss sigmoid and bce only, "
                f"train.loss is {self.train.loss}"
            )
        if self.model.resnet is not None:
            if self.optim.layer_decay is not None:
                raise ValueError(
                    f"optim.layer_decay {self.optim.layer_decay:g} does not apply to a ResNet (model.resnet)"
                )
            if self.optim.train == "attention":
                raise ValueError("optim.train attention does not apply to a ResNet (model.resnet), which has none")
        if self.train.compile and self.zero.stage == 3:
            raise ValueError("train.compile applies to zero.stage 0 to 2, zero.stage is 3")
        if self.train.spike_rollback is not None and self.checkpoint.cadence is None:
            raise ValueError("train.spike_rollback needs checkpoint.every_steps (or every_epochs, every_examples)")
        if self.eval.weights == "ema" and self.train.ema_decay is None:
            raise ValueError("eval.weights ema needs train.ema_decay")
        if self.data.mix is not None:
            odd = next((n for n in allowed if (batch // n) % 2), None)
            if odd is not None:
                raise ValueError(
                    f"data.mix pairs images: train.global_batch_size {batch} gives each of {odd} workers an odd number"
                )
            if micro != "auto" and micro % 2:
                raise ValueError(f"data.mix pairs images: train.micro_batch_size {micro} must be even")
        if self.schedule.min_lr > self.optim.lr:
            raise ValueError(
                f"schedule.min_lr {self.schedule.min_lr:g} is above optim.lr {self.optim.lr:g}, from which it decays"
            )
        channels = {1, self.model.in_channels}
        for field in ("mean", "std"):
            count = len(getattr(self.data, field))
            if count not in channels:
                raise ValueError(f"data.{field} has {count} values, model.in_channels is {self.model.in_channels}")
        return self

    @model_validator(mode="after")
    def _check_objective(self) -> Self:
        if self.train.objective == "masked_patch":
            _check_masked_patch(self)
        elif self.model.head == "masked_patch":
            raise ValueError("model.head masked_patch goes with train.objective masked_patch only")
        return self

    @property
    def allowed_world_sizes(self) -> tuple[int, ...]:
        """Worker counts this job may run on: those in its range that divide the global batch."""
        low, high = self.resources.worker_range
        return tuple(n for n in range(low, high + 1) if self.train.global_batch_size % n == 0)


def _check_masked_patch(job: _TrainingJob) -> None:
    """Refuse what masked patch prediction has no use for. Raises ValueError."""
    if job.model.resnet is not None:
        raise ValueError("train.objective masked_patch does not apply to a ResNet (model.resnet), which has no patches")
    allowed: dict[str, tuple[object, tuple[object, ...]]] = {
        "model.head": (job.model.head, ("linear", "masked_patch")),
        "model.head_bias_init": (job.model.head_bias_init, (0.0,)),
        "model.pool": (job.model.pool, ("cls", "gap")),
        "train.loss": (job.train.loss, ("softmax",)),
        "train.label_smoothing": (job.train.label_smoothing, (0.0,)),
        "data.mix": (job.data.mix, (None,)),
        "optim.train": (job.optim.train, ("all",)),
    }
    for field, (given, fitting) in allowed.items():
        if given not in fitting:
            expected = "left out" if fitting == (None,) else " or ".join(map(str, fitting))
            raise ValueError(f"{field} {given} does not apply to train.objective masked_patch: expected {expected}")
    if job.model.has_sizes and job.model.num_patches < 2:
        raise ValueError(
            f"train.objective masked_patch needs at least 2 patches, model.image_size {job.model.image_size} gives 1"
        )


class PretrainJob(_TrainingJob):
    """Train from scratch."""

    kind: Literal["pretrain"]

    @model_validator(mode="after")
    def _needs_sizes(self) -> Self:
        if not self.model.has_sizes:
            raise ValueError("model.variant (or the five sizes, or model.resnet) is needed to train from scratch")
        return self


class FinetuneJob(_TrainingJob):
    """Train from a checkpoint's weights, with a new head unless `keep_head`, at any resolution."""

    kind: Literal["finetune"]
    init_from: CheckpointRef
    weights: Weights = WEIGHTS
    keep_head: bool = Field(
        False, description="Go on with the checkpoint's head, for the same classes (at another resolution: DeiT-III)."
    )

    @model_validator(mode="after")
    def _head_is_zero(self) -> Self:
        if self.model.head_bias_init != 0.0:
            raise ValueError("model.head_bias_init applies to pretrain jobs only: a fine-tuning head starts at zero")
        return self

    @model_validator(mode="after")
    def _learns_classes(self) -> Self:
        if self.train.objective != "classification":
            raise ValueError(f"train.objective {self.train.objective} applies to pretrain jobs only")
        return self


class EvaluateJob(_Job):
    """Accuracy of a checkpoint on a split; it does not depend on the number of workers."""

    kind: Literal["evaluate"]
    init_from: CheckpointRef
    weights: Weights = WEIGHTS
    data: DataConfig | None = Field(None, description="Left out: the data the checkpoint was trained on.")
    image_size: Annotated[int, Field(ge=1, le=4096)] | None = Field(None, description="Left out: the checkpoint's.")
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 256
    precision: Literal["fp32", "bf16"] = "fp32"
    few_shot: FewShot | None = Field(
        None, description="Also few-shot accuracy of the features (data.train, data.eval)."
    )
    neighbours: Neighbours | None = Field(None, description="Also nearest-neighbour accuracy of the features.")
    real_labels: DataPath | None = Field(
        None, description="Also accuracy by reassessed labels (ReaL): a file like real.json, under the data root."
    )

    @model_validator(mode="after")
    def _labels_are_of_a_split(self) -> Self:
        if self.real_labels is not None and self.data is not None and self.data.holdout is not None:
            raise ValueError("real_labels does not apply to a data.holdout: the file is about the images of a split")
        return self


class InspectJob(_Job):
    """Pictures of what a checkpoint has learned, each with its numbers."""

    kind: Literal["inspect"]
    init_from: CheckpointRef
    weights: Weights = WEIGHTS
    pictures: Annotated[tuple[PictureName, ...], Field(min_length=1, max_length=len(PICTURES))] | None = Field(
        None, description="Left out: all that the model has."
    )
    data: DataConfig | None = Field(None, description="Left out: the data the checkpoint was trained on.")
    num_images: Annotated[int, Field(ge=1, le=65536)] = Field(
        128, description="Over which attention_distance is averaged (paper, D.7)."
    )
    num_rollout_images: Annotated[int, Field(ge=1, le=64)] = Field(
        8, description="Shown in attention_rollout: the first of the chosen ones."
    )
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 8
    seed: Seed = Field(0, description="Chooses the images from the evaluation split.")

    @model_validator(mode="after")
    def _check_inspection(self) -> Self:
        if self.resources.worker_range != (1, 1):
            raise ValueError("resources.workers: an inspection runs on one worker")
        if self.pictures is not None and len(set(self.pictures)) < len(self.pictures):
            raise ValueError(f"pictures {list(self.pictures)}: a picture is named twice")
        return self

    def wanted(self, model: NetworkConfig | None) -> tuple[PictureName, ...]:
        """The pictures that are asked for, of a model, or while it is not known."""
        if self.pictures is not None:
            return self.pictures
        return PICTURES if model is None else pictures_of(model)

    def reads_images(self, model: NetworkConfig | None) -> bool:
        return not READ_IMAGES.isdisjoint(self.wanted(model))


ExportFormat = Literal["safetensors", "timm", "transformers", "torchvision", "npz"]


class ExportJob(_Job):
    """A checkpoint's weights in a format other code reads."""

    kind: Literal["export"]
    init_from: CheckpointRef
    weights: Weights = WEIGHTS
    format: ExportFormat = "safetensors"

    @model_validator(mode="after")
    def _one_worker(self) -> Self:
        if self.resources.worker_range != (1, 1):
            raise ValueError("resources.workers: an export runs on one worker")
        return self


class UploadedFile(Strict):
    """A file that was uploaded to the object store."""

    upload: Annotated[str, StringConstraints(pattern=UPLOAD_ID_PATTERN)]
    name: Label = Field(description="The file's original name.")
    num_bytes: Positive
    sha256: Sha256
    source: Origin = Field("", description="Where it came from: a URL, or text.")


class ImportJob(_Job):
    """Weights from elsewhere, made a checkpoint. Made by `POST /v1/checkpoints:import`, never submitted."""

    kind: Literal["import"]
    file: UploadedFile
    format: WeightFormat | None = Field(None, description="Left out: whatever the file is.")
    model: ImportModel = ImportModel()
    preprocess: ImportPreprocess = ImportPreprocess()
    config: NetworkConfig | None = Field(None, description="The whole configuration, of a file of ours.")

    @model_validator(mode="after")
    def _one_worker(self) -> Self:
        if self.resources.worker_range != (1, 1):
            raise ValueError("resources.workers: an import runs on one worker")
        return self


class SearchJob(_Job):
    """Many trainings of one base with different settings; it hands over the best one's checkpoint. `resources` is
    computed: what `concurrency` trials of the base hold together."""

    kind: Literal["search"]
    base: dict[str, Any] = Field(description="A pretrain or finetune job, or a preset of one.")
    space: Space
    metric: Annotated[str, StringConstraints(max_length=128, pattern=r"^[A-Za-z0-9_./-]+$")] = Field(
        "eval/top1", description="What a trial is judged by: its last value."
    )
    mode: Literal["max", "min"] | None = Field(None, description="Left out: min for losses, max for all else.")
    algorithm: Literal["random", "grid", "tpe"] = "random"
    scheduler: Scheduler = NoScheduler()
    budget: Budget
    repeats: Annotated[int, Field(ge=1, le=100)] = Field(1, description="Trials of each setting, with seeds in a row.")
    concurrency: Annotated[int, Field(ge=1, le=1000)] | Concurrency | None = Field(
        None, description="Trials side by side; left out: as many as there is room for."
    )
    seed: Seed = 0
    final: FinalRun | None = Field(None, description="The best setting once more, with changes.")

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        in_order(self.space)
        if self.budget.trials % self.repeats:
            raise ValueError(f"budget.trials {self.budget.trials} is no multiple of repeats {self.repeats}")
        if self.repeats > 1 and self.scheduler.name != "none":
            raise ValueError(f"repeats {self.repeats}: scheduler {self.scheduler.name} judges single trials, use 1")
        if self.scheduler.name == "pbt" and self.algorithm != "random":
            raise ValueError(f"algorithm {self.algorithm}: scheduler pbt draws its population at random")
        if self.mode is not None and self.mode != self.natural_mode:
            raise ValueError(f"mode {self.mode}: {self.metric} is better the {self._better}")
        if self.algorithm == "grid":
            self._check_grid()
        elif grids := [key for key, p in self.space.items() if isinstance(p, Choice) and p.type == "grid"]:
            raise ValueError(f"space: {grids[0]} is of type grid, algorithm is {self.algorithm}: use type choice")
        return self

    def _check_grid(self) -> None:
        if endless := [key for key, parameter in self.space.items() if finite_values(parameter) is None]:
            raise ValueError(f"algorithm grid: {endless[0]} is continuous; a grid takes choice, int, uniform with step")
        size = sum(1 for _ in itertools.islice(grid(self.space), MAX_TRIALS + 1))
        if size * self.repeats > self.budget.trials:
            times = f" times {self.repeats} repeats" if self.repeats > 1 else ""
            more = "more than " if size > MAX_TRIALS else ""
            size = min(size, MAX_TRIALS)
            raise ValueError(
                f"budget.trials {self.budget.trials} is less than the grid's {more}{size} settings{times}: allowed is "
                f"at least {size * self.repeats}"
            )

    @property
    def natural_mode(self) -> Literal["max", "min"]:
        return "min" if self.metric.endswith("loss") else "max"

    @property
    def _better(self) -> str:
        return "lower" if self.natural_mode == "min" else "higher"

    @property
    def sign(self) -> float:
        """What a value is multiplied by so that more is better."""
        return 1.0 if self.natural_mode == "max" else -1.0


AnyJob = PretrainJob | FinetuneJob | EvaluateJob | InspectJob | ExportJob | ImportJob | SearchJob
JobSpec = Annotated[AnyJob, Field(discriminator="kind")]
TrainingJob = PretrainJob | FinetuneJob
job_spec_adapter: TypeAdapter[AnyJob] = TypeAdapter(JobSpec)
