"""What processes say to one another: attempt and exit files, reports, manifests, log lines, data set indexes.

Every file carries `schema_version`. Readers ignore unknown keys; writers write exactly these.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, Self

from pydantic import AwareDatetime, Field, model_validator

from configs.base import Stored
from configs.imports import WeightOrigin
from configs.model import NetworkConfig
from configs.reasons import ExitReason
from configs.states import Desired


# -- data sets ---------------------------------------------------------------------------------------------------------
class SplitInfo(Stored):
    name: str
    num_examples: int


class DatasetCard(Stored):
    """What submission needs to know of a data set: counts, classes, fingerprint."""

    name: str
    type: Literal["torchvision", "folder", "synthetic", "images"]
    num_classes: int
    class_names: tuple[str, ...] | None = None
    splits: tuple[SplitInfo, ...]
    fingerprint: str
    index_key: str | None = None
    path: str | None = None
    """Of a folder: relative to the data root."""
    note: str | None = None

    def num_examples(self, split: str) -> int:
        """Raises KeyError if there is no such split."""
        for info in self.splits:
            if info.name == split:
                return info.num_examples
        raise KeyError(split)


class IndexSplit(Stored):
    name: str
    paths: tuple[str, ...]
    """Relative to <data root>/<path>/<split>; sorted."""
    labels: tuple[int, ...]
    sizes: tuple[int, ...]


class DatasetIndex(Stored):
    """Every file of a registered image folder, made once; sample numbers are positions in it."""

    schema_version: int = 1
    name: str
    path: str
    class_names: tuple[str, ...]
    splits: tuple[IndexSplit, ...]
    fingerprint: str
    ignored: dict[str, int] = Field(default_factory=dict)
    """Files left out because they are not images: how many of each suffix."""


# -- attempts ----------------------------------------------------------------------------------------------------------
class ParentCut(Stored):
    """The lineage rule: checkpoints of `attempt` count up to `step` and no further."""

    attempt: int
    step: int


class DataSkip(Stored):
    """Training data passed over after a rollback: from `at_step` on, data lies so many global batches further."""

    attempt_id: str
    """The attempt whose loss spiked."""
    at_step: int
    num_batches: int


class LossWatch(Stored):
    """What a loss spike is told by (workers/spike.py). It is saved with every checkpoint: a resumed attempt decides as
    an undisturbed one does."""

    calm: tuple[float, ...] = ()
    """The last logged losses that were not high."""
    calm_step: int = 0
    """The step of the last of them."""
    num_high: int = 0
    """High losses in a row since then."""


class CheckpointSource(Stored):
    """A checkpoint another job (or this one) left: where it lies and what it is."""

    checkpoint_id: str
    prefix: str


class AttemptFile(Stored):
    """Everything an attempt is given, frozen: `attempts/0003.json`."""

    schema_version: int = 1
    job_id: str
    attempt_id: str
    number: int
    spec: dict[str, Any]
    """The resolved spec, as stored with the job."""
    spec_hash: str
    training_fingerprint: str
    world_size: int
    dataset: DatasetCard | None = None
    parents: tuple[ParentCut, ...] = ()
    """Cuts of all earlier attempts of this job."""
    resume_from: CheckpointSource | None = None
    """Continue exactly here: weights, optimizer, step."""
    init_from: CheckpointSource | None = None
    """Start from these weights only (fine-tune, evaluate, export)."""
    skips: tuple[DataSkip, ...] = ()
    """Data that rollbacks of this job passed over."""
    resume_fingerprint: str | None = None
    """Of the checkpoint to continue from, where that is another trial's with other settings; else this attempt's own
    training fingerprint is asked of it."""
    created_at: AwareDatetime


class RankFailure(Stored):
    rank: int
    node: str = ""
    error_type: str = ""
    message: str = ""
    last_lines: tuple[str, ...] = ()


class ExitFile(Stored):
    """How an attempt ended, in its driver's words: `attempts/0003/exit.json`."""

    schema_version: int = 1
    attempt_id: str
    reason: ExitReason
    message: str = ""
    first_failure: RankFailure | None = None
    last_step: int = 0
    """The last optimizer step done by all ranks."""
    checkpoint_step: int | None = None
    """The last committed checkpoint of this attempt."""
    sound_step: int | None = None
    """After a loss spike: checkpoints beyond this step are not to be continued from."""
    ended_at: AwareDatetime


# -- reports: rank -> driver -> control plane --------------------------------------------------------------------------
MAX_POINTS = 20_000
"""In one batch."""
MAX_AT_US = 253_370_764_800_000_000
"""The year 9999, where `Moment` ends too."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
Count = Annotated[int, Field(ge=0, lt=2**63)]
"""A number that every database holds."""
Moment = Annotated[AwareDatetime, Field(gt=_EPOCH, lt=datetime(9999, 1, 1, tzinfo=UTC))]
"""A time that every time zone can tell."""
NoNul = Annotated[str, Field(pattern=r"^[^\x00]*$")]
"""Text that every database holds."""
MetricName = Annotated[str, Field(max_length=128, pattern=r"^[A-Za-z0-9_./-]+$")]
Phase = Literal[
    "starting",
    "building",
    "loading",
    "training",
    "evaluating",
    "saving",
    "finishing",
    "exporting",
    "importing",
    "inspecting",
    "searching",
]


class Heartbeat(Stored):
    rank: Count
    node: str
    pid: Count
    phase: Phase
    step: Count
    at: Moment
    beats: Count = 0
    """Signs of life of the rank's working thread; it grows within a long step or evaluation too."""


class MetricPoint(Stored):
    name: MetricName
    step: Count
    value: float | None
    """null: not finite."""
    at: Moment


class MetricColumns(Stored):
    """Points of one metric, as columns of equal length: read several times faster than as many objects."""

    name: MetricName
    steps: tuple[Count, ...]
    values: tuple[float | None, ...]
    """null: not finite."""
    at_us: tuple[Annotated[int, Field(gt=0, lt=MAX_AT_US)], ...]
    """Microseconds since 1970, UTC."""

    @model_validator(mode="after")
    def _equal_lengths(self) -> Self:
        if not len(self.steps) == len(self.values) == len(self.at_us):
            lengths = f"{len(self.steps)}, {len(self.values)} and {len(self.at_us)}"
            raise ValueError(f"steps, values and at_us have {lengths} entries: expected as many of each")
        return self

    def __len__(self) -> int:
        return len(self.steps)

    def thinned(self) -> Self:
        """Every second point."""
        return self._cut(slice(None, None, 2))

    def part(self, start: int, end: int) -> Self:
        """The points numbered `start` up to, not including, `end`."""
        return self._cut(slice(start, end))

    def _cut(self, at: slice) -> Self:
        return self.model_copy(update={"steps": self.steps[at], "values": self.values[at], "at_us": self.at_us[at]})


def to_columns(points: Iterable[MetricPoint]) -> tuple[MetricColumns, ...]:
    """The points by metric, those of each in the order they came."""
    by_name: dict[str, list[MetricPoint]] = {}
    for point in points:
        by_name.setdefault(point.name, []).append(point)
    return tuple(
        MetricColumns(
            name=name,
            steps=tuple(point.step for point in of_name),
            values=tuple(point.value for point in of_name),
            at_us=tuple((point.at - _EPOCH) // _MICROSECOND for point in of_name),
        )
        for name, of_name in by_name.items()
    )


class WorkerEvent(Stored):
    """A fact worth telling a user: checkpoint committed, corrupt image replaced, step skipped."""

    type: Annotated[NoNul, Field(max_length=64)]
    message: str
    at: Moment
    data: dict[str, Any] = Field(default_factory=dict)


class ReportBatch(Stored):
    """What the driver tells the control plane. `seq` counts from 1 per attempt; a repeated batch changes nothing.

    Version 1 had `metrics` only; what a driver of that version sends is still read.
    """

    schema_version: int = 2
    seq: Count
    total_steps: Count | None = None
    heartbeats: tuple[Heartbeat, ...] = ()
    columns: tuple[MetricColumns, ...] = Field((), max_length=MAX_POINTS)
    """The points, by metric."""
    metrics: tuple[MetricPoint, ...] = Field((), max_length=MAX_POINTS)
    """More points, one by one."""
    events: tuple[WorkerEvent, ...] = Field((), max_length=1_000)
    checkpoints: tuple[NoNul, ...] = ()
    """Ids of checkpoints whose manifest now exists."""
    finished: bool = False

    @model_validator(mode="after")
    def _not_too_many_points(self) -> Self:
        if self.num_points > MAX_POINTS:
            raise ValueError(f"the batch holds {self.num_points} points: at most {MAX_POINTS} are allowed")
        return self

    @property
    def num_points(self) -> int:
        return len(self.metrics) + sum(map(len, self.columns))


class ReportReply(Stored):
    desired: Desired
    acknowledged_seq: int


class ClaimRequest(Stored):
    nonce: NoNul
    """Chosen by the driver: the same nonce may claim again (a reply was lost), another one gets 409."""
    node: NoNul
    pid: Count
    cluster_id: NoNul = ""


class ClaimReply(Stored):
    attempt_id: str
    desired: Desired


class LogLine(Stored):
    """One line of a log chunk."""

    t: AwareDatetime
    stream: str
    level: Literal["debug", "info", "warning", "error"] = "info"
    msg: str


# -- checkpoints -------------------------------------------------------------------------------------------------------
BLOCK_BYTES = 8 * 1024 * 1024


class TensorSlice(Stored):
    """A 1-D run of a flattened fp32 tensor, stored under `key` in a shard file."""

    key: str
    name: str
    kind: str
    """weight, ema (the moving average of one), or an optimizer moment: exp_avg, exp_avg_sq, momentum_buffer."""
    start: int
    numel: int


class ShardFile(Stored):
    name: str
    """Relative to the checkpoint's prefix."""
    rank: int
    role: Literal["weights", "optimizer", "ema"]
    num_bytes: int
    crc32c: tuple[int, ...]
    """Of each block of BLOCK_BYTES."""
    slices: tuple[TensorSlice, ...]


class RankFiles(Stored):
    """What one rank tells rank 0 about its part of a checkpoint, as a small object beside its shards."""

    rank: int
    files: tuple[ShardFile, ...]
    measured: tuple[MetricColumns, ...] = ()
    """What this rank has measured since its last checkpoint. It lies here because reports are sent on by the driver:
    one that dies takes with it what it had not delivered, and these steps are never done again."""


class Preprocess(Stored):
    """How images must be prepared for these weights."""

    image_size: tuple[int, int]
    in_channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    antialias: bool = False
    """Off: as the official code (tf.image.resize) and our training do. Weights from elsewhere may want it on."""
    crop: Literal["resize", "center"] = "resize"
    class_names: tuple[str, ...] | None = None


class Manifest(Stored):
    """The commit record of a checkpoint: written last, never overwritten."""

    schema_version: int = 1
    checkpoint_id: str
    job_id: str
    attempt: int
    step: int
    position: int
    """Training examples consumed or passed over."""
    total_steps: int
    world_size: int
    zero_stage: int
    optimizer: str
    optimizer_step: int
    """Updates applied (skipped steps are not)."""
    skipped_steps: int = 0
    nonfinite_steps: int = 0
    """Consecutive skipped steps that end at this one."""
    skips: tuple[DataSkip, ...] = ()
    """Data passed over up to here."""
    loss_watch: LossWatch = LossWatch()
    spec_hash: str
    training_fingerprint: str
    data_fingerprint: str
    versions: dict[str, str]
    metrics: dict[str, float]
    parent: ParentCut | None = None
    model: NetworkConfig
    preprocess: Preprocess
    origin: WeightOrigin | None = None
    """Of imported weights: the file they came from."""
    tensors: dict[str, tuple[int, ...]]
    """Full shape of each weight."""
    files: tuple[ShardFile, ...]
    nonce: str
    created_at: datetime


class EvaluationReport(Stored):
    """What an evaluate job found: `report.json`."""

    schema_version: int = 1
    job_id: str
    checkpoint_id: str
    dataset: str
    split: str
    num_examples: int
    metrics: dict[str, float]
    created_at: AwareDatetime


class PictureFile(Stored):
    name: str
    """Relative to the job's pictures."""
    num_bytes: int


class Picture(Stored):
    """A picture that an inspect job drew, and its numbers."""

    name: str
    title: str
    caption: str
    """What is to be seen, in words: for who does not see it."""
    image: PictureFile
    """A PNG."""
    numbers: PictureFile
    """Arrays by name, for numpy.load."""


class PictureIndex(Stored):
    """What an inspect job left: `pictures/index.json`, written last."""

    schema_version: int = 1
    job_id: str
    checkpoint_id: str
    step: int
    dataset: str | None
    """None: no picture shows images."""
    split: str | None
    sample_ids: tuple[int, ...] = ()
    """The images that were read: their places in the split."""
    pictures: tuple[Picture, ...]
    created_at: AwareDatetime


class ModelFile(Stored):
    """`config.json` beside fetched or exported weights: all that `vit.load` needs."""

    schema_version: int = 1
    model: NetworkConfig
    preprocess: Preprocess
    checkpoint_id: str | None = None
    job_id: str | None = None
    step: int | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
