"""What the API says and takes: the public models. The client parses the same ones, so this file imports pydantic and
`configs` only.

Words that may grow (states, reasons, event types) are plain strings here: an older client reads a newer server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AwareDatetime, ConfigDict, Field, StringConstraints

from configs.base import Label, Slug, Stored, Strict
from configs.imports import ImportModel, ImportPreprocess, Origin, Sha256, WeightFormat, WeightOrigin
from configs.model import NetworkConfig
from configs.states import JobState
from configs.wire import DatasetCard, EvaluationReport, LogLine, Picture, Preprocess, RankFailure

if TYPE_CHECKING:
    import pandas

Role = Literal["viewer", "member", "admin"]
Labels = Annotated[
    dict[Label, Annotated[str, StringConstraints(max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")]], Field(max_length=64)
]
TERMINAL_STATES = frozenset(state.value for state in JobState if state.is_terminal)


# -- errors ----------------------------------------------------------------------
class ProblemError(Stored):
    """One thing wrong with the request."""

    pointer: str = Field(description="JSON pointer (RFC 6901) into the job description, or into the body.")
    message: str
    value: Any = Field(None, description="What was given there.")
    allowed: str | None = Field(None, description="What may stand there.")


class Problem(Stored):
    """Every error of the API (RFC 9457), as application/problem+json."""

    # A problem may carry members of its own, such as the job's state for a 409.
    model_config = ConfigDict(extra="allow", frozen=True)

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    instance: str = ""
    code: str = Field(description="A stable word for programs, such as spec_invalid.")
    errors: tuple[ProblemError, ...] = ()
    hint: str | None = Field(None, description="What to do next, in one sentence.")


# -- jobs ----------------------------------------------------------------------
class JobCreate(Strict):
    """A job description, and dotted keys that override it."""

    spec: dict[str, Any] = Field(description="The job description (docs/jobs.md); may name a preset.")
    overrides: dict[str, Any] = Field(default_factory=dict, description='Dotted keys, such as {"optim.lr": 3e-4}.')


class PlanCreate(JobCreate):
    """A job description to plan, and the hardware to plan it for."""

    gpu: Annotated[str, StringConstraints(max_length=64)] | None = Field(
        None, description="Accelerator and count, such as H100:8; left out: as the job asks.", examples=["H100:8"]
    )


class JobEdit(Strict):
    """What to change of a job. A field that is left out stays as it is."""

    priority: Annotated[int, Field(ge=0, le=100)] | None = Field(None, description="Higher ones start first.")
    labels: Labels | None = Field(None, description="All of them: those not given are removed.")


class JobFork(Strict):
    """A new job made of another one."""

    checkpoint: Annotated[str, StringConstraints(min_length=1, max_length=120)] | None = Field(
        None, description="Where it goes on: ckpt_…, latest or best; null: it starts anew.", examples=["latest"]
    )
    overrides: dict[str, Any] = Field(default_factory=dict, description="Dotted keys over those of the other job.")
    name: Label | None = Field(None, description="Left out: the other job's.")


class Progress(Stored):
    step: int
    total_steps: int | None
    pct: float | None = Field(description="0 to 100; null where the job has no steps.")
    eta_s: float | None = Field(description="Seconds left at the running attempt's pace; null while unknown.")


class QueuePublic(Stored):
    """Where a waiting job stands, and why it waits."""

    position: int = Field(description="1: the next to start.")
    reason: str | None
    message: str
    eta_s: float | None = Field(None, description="Seconds until it starts; null while unknown.")


class Usage(Stored):
    gpu_seconds: float = Field(
        description="Wall seconds x devices (workers where there is no GPU); of a search, of its trials together."
    )
    wasted_gpu_s: float = Field(description="gpu_seconds of steps that were done again after a restart.")
    wasted_steps: int
    overhead_s: float = Field(description="Wall seconds of restarts.")


class RankPublic(Stored):
    """A rank's last heartbeat."""

    rank: int
    node: str
    pid: int
    phase: str
    step: int
    at: AwareDatetime


class AttemptPublic(Stored):
    """One run of a job on one set of workers."""

    id: str
    number: int
    state: str = Field(description="STARTING, RUNNING or ENDED.")
    world_size: int
    nodes: tuple[str, ...]
    from_checkpoint: str | None = Field(description="The checkpoint it continued from.")
    from_step: int
    to_step: int = Field(description="The last step any rank reported.")
    phase: str
    ranks: tuple[RankPublic, ...]
    exit_reason: str | None
    exit_message: str = ""
    first_failure: RankFailure | None = None
    advice: str | None = None
    wasted_steps: int
    created_at: AwareDatetime
    submitted_at: AwareDatetime | None
    first_step_at: AwareDatetime | None
    last_report_at: AwareDatetime | None
    ended_at: AwareDatetime | None


class JobPublic(Stored):
    """A job: what was asked, where it stands, what it cost."""

    id: str
    kind: str
    name: str
    project: str
    labels: dict[str, str]
    priority: int
    state: str = Field(description="QUEUED, PREPARING, RUNNING, RECOVERING, PAUSING, PAUSED, STOPPING, or an end.")
    desired: str = Field(description="What users and the scheduler want of it: run, pause, stop, yield.")
    reason: str | None = Field(description="Why it waits, or why it ended.")
    message: str
    advice: str | None = Field(None, description="What to do next, once it has ended.")
    state_since: AwareDatetime
    allowed_actions: tuple[str, ...]
    progress: Progress
    queue: QueuePublic | None = Field(None, description="Only while it waits for its turn.")
    spec: dict[str, Any] = Field(description="Resolved; never changes.")
    spec_hash: str
    training_fingerprint: str
    preset: str | None
    submitted: dict[str, Any] = Field(description="What the user sent.")
    plan: dict[str, Any] = Field(description="The plan made at submission (as of POST /v1/plans).")
    num_attempts: int
    attempts: tuple[AttemptPublic, ...]
    usage: Usage
    last_metrics: dict[str, float | None]
    init_from: str | None
    retry_of: str | None
    resume_from: str | None = Field(None, description="Checkpoint of another job that it continues.")
    created_by: str
    created_at: AwareDatetime
    started_at: AwareDatetime | None
    ended_at: AwareDatetime | None
    etag: str

    @property
    def is_terminal(self) -> bool:
        """Whether the state is final."""
        return self.state in TERMINAL_STATES


class JobPage(Stored):
    items: tuple[JobPublic, ...]
    next_cursor: str | None = Field(None, description="Give it as ?cursor= for the next page; null: this was the last.")
    num_matching: int | None = Field(None, description="How many jobs match in all; null where it was not asked for.")


class JobPreview(Stored):
    """What a submission would store (?dry_run=true)."""

    kind: str
    name: str
    project: str
    spec: dict[str, Any]
    spec_hash: str
    plan: dict[str, Any]


# -- events, metrics, logs ----------------------------------------------------------------------
class EventPublic(Stored):
    """What happened, in the past tense, and who did it."""

    seq: int
    job_id: str | None
    attempt: int | None
    type: str
    message: str
    actor: str
    data: dict[str, Any]
    at: AwareDatetime


class EventPage(Stored):
    items: tuple[EventPublic, ...]
    next_after: int = Field(description="Give it as ?after= for the events that follow.")


class MetricSeries(Stored):
    """One metric over the job's steps, as columns. Where several points were joined into one, `values` holds their
    mean, `lows` and `highs` their range, `steps` the last of their steps; null is a value that was not finite."""

    name: str
    steps: tuple[int, ...]
    values: tuple[float | None, ...]
    lows: tuple[float | None, ...]
    highs: tuple[float | None, ...]
    attempts: tuple[int, ...]
    num_points: int = Field(description="Points stored; more than len(steps): they were joined.")


class MetricsPublic(Stored):
    job_id: str
    names: tuple[str, ...] = Field(description="Every metric this job has.")
    series: tuple[MetricSeries, ...]

    def to_pandas(self) -> pandas.DataFrame:
        """A frame with one row per point: name, step, value, low, high, attempt.

            frame.pivot(index="step", columns="name", values="value")      # a column per metric

        Raises:
            ModuleNotFoundError: pandas is not installed; it is not needed for anything else.
        """
        try:
            import pandas
        except ImportError:
            raise ModuleNotFoundError(
                "to_pandas() needs the package pandas, which is not installed: pip install pandas", name="pandas"
            ) from None
        columns = {"step": "steps", "value": "values", "low": "lows", "high": "highs", "attempt": "attempts"}
        data: dict[str, list[Any]] = {"name": [s.name for s in self.series for _ in s.steps]}
        data |= {column: [x for s in self.series for x in getattr(s, field)] for column, field in columns.items()}
        types = {"name": "str", "step": "int64", "value": "float64", "low": "float64", "high": "float64"}
        return pandas.DataFrame(data).astype(types | {"attempt": "int64"})


class FilePublic(Stored):
    name: str
    num_bytes: int


class EventFilePage(Stored):
    """A job's event files for TensorBoard. Each only ever grows, so one of the same length is the same."""

    items: tuple[FilePublic, ...]


class LogPage(Stored):
    lines: tuple[LogLine, ...] = Field(description="In order of time.")
    cursor: str = Field(description="Opaque; give it as ?cursor= for the lines that follow.")
    more: bool = Field(False, description="There is more to read right now, even if this page is empty (filters).")
    complete: bool = Field(description="The job has ended and this was everything.")


# -- checkpoints, exports, reports ----------------------------------------------------------------------
class CheckpointPublic(Stored):
    id: str
    job_id: str
    attempt: int
    step: int
    num_bytes: int
    metrics: dict[str, float]
    model: NetworkConfig
    preprocess: Preprocess
    aliases: tuple[str, ...] = Field(description="best, latest.")
    available: bool = Field(description="Valid and not deleted.")
    pinned: bool
    origin: WeightOrigin | None = Field(None, description="Of imported weights: the file they came from.")
    deleted_at: AwareDatetime | None
    created_at: AwareDatetime


class CheckpointEdit(Strict):
    """What to change of a checkpoint."""

    pinned: bool = Field(description="Whether it is kept, whatever the job's checkpoint.keep_last and keep_best say.")


class CheckpointPage(Stored):
    items: tuple[CheckpointPublic, ...]


class ExportPublic(Stored):
    format: str
    files: tuple[FilePublic, ...]


class ExportPage(Stored):
    items: tuple[ExportPublic, ...]


class PicturePage(Stored):
    """What an inspect job drew."""

    checkpoint_id: str | None = Field(description="The checkpoint that was looked at; null: nothing is drawn (yet).")
    items: tuple[Picture, ...] = Field(description="Each with a PNG and its numbers, files of GET .../pictures/{name}.")


# -- weights from elsewhere ----------------------------------------------------------------------
class ImportCreate(Strict):
    """A weights file to import. Its bytes go to the object store directly, in parts."""

    file: Label = Field(description="The file's name; its ending says what it is: .safetensors or .npz.")
    num_bytes: Annotated[int, Field(ge=1, le=2**53)]
    sha256: Sha256
    name: Label | None = Field(None, description="Of the import job; left out: the file's name.")
    source: Origin = Field("", description="Where the file came from: a URL, or text.")
    project: Slug = "default"
    format: WeightFormat | None = Field(None, description="Left out: whatever the file is.")
    model: ImportModel = ImportModel()
    preprocess: ImportPreprocess = ImportPreprocess()
    config: NetworkConfig | None = Field(None, description="The whole configuration, of a file of ours.")


class ImagePublic(Stored):
    """An uploaded image, for `data.source` of an inspect job."""

    id: str = Field(description="img_…")
    num_bytes: int
    media_type: str
    created_at: AwareDatetime
    expires_at: AwareDatetime = Field(description="Kept until then.")


class PartPublic(Stored):
    """A part that has arrived."""

    number: int = Field(description="From 1.")
    num_bytes: int


class UploadPublic(Stored):
    id: str
    state: str = Field(description="OPEN, COMPLETED or ABORTED.")
    file: str
    num_bytes: int
    sha256: str
    part_bytes: int = Field(description="Of every part but the last.")
    num_parts: int
    parts: tuple[PartPublic, ...] = Field(description="Those that have arrived.")
    job_id: str | None = Field(description="The import job, once the upload is complete.")
    created_at: AwareDatetime
    expires_at: AwareDatetime


class PartUrlsCreate(Strict):
    """Which parts are to be sent next."""

    parts: Annotated[tuple[Annotated[int, Field(ge=1, le=10_000)], ...], Field(min_length=1, max_length=100)]


class PartUrl(Stored):
    """Where to PUT the bytes of a part. The URL is signed: send no headers of your own."""

    number: int
    num_bytes: int
    url: str


class PartUrls(Stored):
    items: tuple[PartUrl, ...]
    expires_at: AwareDatetime


# -- the run card ----------------------------------------------------------------------
class Work(Stored):
    """Floating-point operations in 1e18, as the paper's Table 6 counts them (configs/cost.py); not measured."""

    planned: float | None = Field(description="The whole job; null where its kind has no steps to count.")
    done: float | None = Field(description="Of the steps that count.")
    repeated: float | None = Field(description="Of steps that were done again after a restart.")


class JobCard(Stored):
    """A run on one page: what was asked, with which versions, data and seeds, what came out, what it cost and lost."""

    schema_version: int = 1
    made_at: AwareDatetime
    job: JobPublic
    data: DatasetCard | None = Field(description="The data set the job was resolved against; null: an export.")
    trained_data_fingerprint: str | None = Field(description="As the checkpoint's manifest records it.")
    versions: dict[str, str] = Field(description="Of Python and packages, from a checkpoint's manifest.")
    manifest_of: str | None = Field(description="The checkpoint these two were read from; null: it left none.")
    seeds: dict[str, int] = Field(description="Every seed of the job description, by its dotted key.")
    work: Work
    curves: tuple[MetricSeries, ...] = Field(description="Joined into few points; those of single ranks left out.")
    evaluations: tuple[EvaluationReport, ...] = Field(
        description="Reports of evaluate jobs: its own, or those made of its checkpoints."
    )
    checkpoints: tuple[CheckpointPublic, ...]
    reproduce: tuple[str, ...] = Field(description="What to do to get this run again, in order.")


# -- presets, data sets, cluster ----------------------------------------------------------------------
class PresetPublic(Stored):
    name: str
    kind: str
    title: str
    command: str
    cost: str
    accuracy: str
    shown: str = Field(description="Whether a run of ours has shown the accuracy.")
    spec: dict[str, Any]


class PresetPage(Stored):
    items: tuple[PresetPublic, ...]


class DatasetCreate(Strict):
    """An image folder to register: `<data root>/<path>/<split>/<class>/<image>`."""

    name: Slug
    path: Annotated[str, StringConstraints(min_length=1, max_length=1024)] = Field(
        description="Relative to the data root.", examples=["flowers"]
    )


class DatasetPublic(Stored):
    name: str
    card: DatasetCard
    registered: bool = Field(description="A folder that was registered here.")
    available: bool = Field(description="Jobs can train on it; otherwise it is known for planning only.")
    created_by: str | None = None
    created_at: AwareDatetime | None = None


class DatasetPage(Stored):
    items: tuple[DatasetPublic, ...]


class NodePublic(Stored):
    id: str
    alive: bool
    cpus: float
    gpus: float
    accelerator: str | None = None


class SinkPublic(Stored):
    """A tool that the controller writes metrics on to."""

    name: str = Field(description="tensorboard, mlflow or wandb.")
    ok: bool
    message: str = Field(description="Why it does not work.")
    since: AwareDatetime = Field(description="When it began to work, or to fail.")
    seen_at: AwareDatetime


class ClusterPublic(Stored):
    """The Ray cluster as the controller last saw it."""

    cluster_id: str
    reachable: bool
    message: str
    nodes: tuple[NodePublic, ...]
    seen_at: AwareDatetime | None
    controller_at: AwareDatetime | None = Field(description="The controller's last loop.")
    jobs: dict[str, int] = Field(description="Number of jobs that have not ended, by state.")
    sinks: tuple[SinkPublic, ...] = Field((), description="Where metrics are written on to, as configured.")


# -- tokens, health ----------------------------------------------------------------------
class TokenCreate(Strict):
    name: Annotated[Label, Field(max_length=64, description="Written beside every change made with it.")]
    role: Role = "member"
    expires_in_s: Annotated[int, Field(ge=60, le=315_360_000)] | None = Field(None, description="null: never.")


class TokenPublic(Stored):
    id: str
    name: str
    role: str
    created_by: str
    created_at: AwareDatetime
    expires_at: AwareDatetime | None
    revoked_at: AwareDatetime | None


class TokenCreated(TokenPublic):
    token: str = Field(description="Shown this once; only its hash is stored.")


class TokenPage(Stored):
    items: tuple[TokenPublic, ...]


class Whoami(Stored):
    name: str
    role: str
    token_id: str


class Health(Stored):
    status: Literal["ok"] = "ok"
    version: str


class Check(Stored):
    name: str
    ok: bool
    message: str
    required: bool = Field(description="False: the API works without it, jobs may wait.")


class Readiness(Stored):
    ready: bool
    checks: tuple[Check, ...]
