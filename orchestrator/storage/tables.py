"""The database: jobs, attempts, searches, events, metrics, checkpoints, data sets, tokens. Truth lives here.

The jobs table is the queue. A lease (token, owner, expiry) lets one reconciler at a time act for a job; every write it
makes is guarded by the token. Times are aware UTC; JSON columns hold what pydantic models dumped.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    DateTime,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
    false,
    text,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC time on every database (SQLite stores naive ones)."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a naive time reached the database")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


# SQLite gives autoincrement ids only to INTEGER primary keys.
BigId = BigInteger().with_variant(Integer, "sqlite")


class Base(DeclarativeBase):
    # Named constraints, so that a later revision can change them on every database.
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {datetime: UtcDateTime, dict[str, Any]: JSON, list[Any]: JSON}  # noqa: RUF012


_WAITING = text("state = 'QUEUED' AND start_workers IS NULL AND desired = 'run' AND search_id IS NULL")

# The order of the queue, and what is asked of each: so that nobody who counts them need read the rows.
_WAITING_COLUMNS = ("priority", "created_at", "state", "start_workers", "desired", "search_id")
# Lists are in the order of creation, and filtered by these: what is filtered out is never read whole.
_LISTED_COLUMNS = ("created_at", "id", "state", "kind", "project", "search_id", "name", "priority")


def _index_of_given(column: str) -> Index:
    """An index of the few jobs that have something there: others cost nothing, and are never looked for by it. (SQLite
    takes a whole index for as good at finding the many that have nothing, and then sorts them all.)"""
    given = text(f"{column} IS NOT NULL")
    return Index(f"ix_jobs_{column}", column, sqlite_where=given, postgresql_where=given)


class JobRow(Base):
    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    name: Mapped[str] = mapped_column(String(128))
    project: Mapped[str] = mapped_column(String(64))
    labels: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    submitted: Mapped[dict[str, Any]] = mapped_column(JSON)
    """What the user sent."""
    spec_json: Mapped[bytes] = mapped_column(LargeBinary)
    """The resolved spec's canonical JSON; its hash is `spec_hash` and is never recomputed."""
    spec_hash: Mapped[str] = mapped_column(String(80))
    training_fingerprint: Mapped[str] = mapped_column(String(80))
    dataset: Mapped[dict[str, Any] | None] = mapped_column(JSON, nullable=True)
    """The DatasetCard the spec was resolved against."""
    init_from: Mapped[str | None] = mapped_column(String(120), nullable=True)
    """Checkpoint id, or job_…/best until it is resolved at the first launch."""
    retry_of: Mapped[str | None] = mapped_column(String(40), nullable=True)
    resume_from: Mapped[str | None] = mapped_column(String(120), nullable=True)
    """Checkpoint id that the first attempt continues from (retry of another job)."""
    search_id: Mapped[str | None] = mapped_column(String(40), nullable=True)
    """The search that this job is a trial of: that one's driver runs it, the queue does not."""
    plan: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    priority: Mapped[int] = mapped_column(Integer)
    total_steps: Mapped[int | None] = mapped_column(BigInteger, nullable=True)

    desired: Mapped[str] = mapped_column(String(16), default="run")
    state: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str | None] = mapped_column(String(40), nullable=True)
    """A QueueReason while it waits, an ExitReason when it ended."""
    message: Mapped[str] = mapped_column(Text, default="")
    state_since: Mapped[datetime]
    version: Mapped[int] = mapped_column(Integer, default=1)
    """Grows with every change; the ETag."""
    created_by: Mapped[str] = mapped_column(String(64), default="")
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None] = mapped_column(nullable=True)
    ended_at: Mapped[datetime | None] = mapped_column(nullable=True)
    not_before: Mapped[datetime | None] = mapped_column(nullable=True)
    """Back-off: no new attempt before this time."""
    start_workers: Mapped[int | None] = mapped_column(Integer, nullable=True)
    """The scheduler's go-ahead: start with so many workers."""

    step: Mapped[int] = mapped_column(BigInteger, default=0)
    num_attempts: Mapped[int] = mapped_column(Integer, default=0)
    user_failures: Mapped[int] = mapped_column(Integer, default=0)
    infra_failures: Mapped[int] = mapped_column(Integer, default=0)
    gpu_seconds: Mapped[float] = mapped_column(Float, default=0.0)
    """Wall seconds x devices (workers where there is no GPU)."""
    wasted_gpu_s: Mapped[float] = mapped_column(Float, default=0.0)
    wasted_steps: Mapped[int] = mapped_column(BigInteger, default=0)
    overhead_s: Mapped[float] = mapped_column(Float, default=0.0)
    last_metrics: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)

    lease_token: Mapped[str | None] = mapped_column(String(40), nullable=True)
    lease_owner: Mapped[str | None] = mapped_column(String(80), nullable=True)
    lease_expires_at: Mapped[datetime | None] = mapped_column(nullable=True)
    next_look_at: Mapped[datetime | None] = mapped_column(nullable=True)

    __table_args__ = (
        Index("ix_jobs_state_priority", "state", "priority", "created_at", "search_id"),
        Index("ix_jobs_created", *_LISTED_COLUMNS),
        Index("ix_jobs_waiting", *_WAITING_COLUMNS, sqlite_where=_WAITING, postgresql_where=_WAITING),
        *(_index_of_given(column) for column in ("search_id", "init_from", "resume_from", "retry_of")),
    )


class SearchRow(Base):
    """What may change of a search while it runs."""

    __tablename__ = "searches"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    num_trials: Mapped[int] = mapped_column(Integer)
    """The budget now; it only grows."""
    slots: Mapped[int | None] = mapped_column(Integer, nullable=True)
    """At most so many trials side by side: a user's word."""
    places: Mapped[int | None] = mapped_column(Integer, nullable=True)
    """So many trials may run side by side now: the scheduler's word. None: as many as the attempt began with."""


class TrialRow(Base):
    """A trial of a search; the job that it is holds its state, attempts, metrics and checkpoints. A search that goes on
    from another one has rows of its own for that one's trials."""

    __tablename__ = "trials"

    search_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    role: Mapped[str] = mapped_column(String(16))
    """trial | final"""
    setting: Mapped[int] = mapped_column(Integer)
    repeat: Mapped[int] = mapped_column(Integer)
    params: Mapped[dict[str, Any]] = mapped_column(JSON)
    parent: Mapped[int | None] = mapped_column(Integer, nullable=True)
    parent_step: Mapped[int | None] = mapped_column(BigInteger, nullable=True)
    replaces: Mapped[int | None] = mapped_column(Integer, nullable=True)
    asked_after: Mapped[int] = mapped_column(Integer)
    """How many ends the sampler had been told of when it gave this setting."""
    told: Mapped[int | None] = mapped_column(Integer, nullable=True)
    """The place of this trial's end among all ends of the search, from 1."""


class AttemptRow(Base):
    __tablename__ = "attempts"

    id: Mapped[str] = mapped_column(String(48), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    number: Mapped[int] = mapped_column(Integer)
    state: Mapped[str] = mapped_column(String(16))
    world_size: Mapped[int] = mapped_column(Integer)
    cluster_id: Mapped[str] = mapped_column(String(80), default="")
    """Ray's session name at submission: another one means this attempt is gone."""
    nodes: Mapped[list[Any]] = mapped_column(JSON, default=list)
    from_checkpoint: Mapped[str | None] = mapped_column(String(120), nullable=True)
    from_step: Mapped[int] = mapped_column(BigInteger, default=0)
    to_step: Mapped[int] = mapped_column(BigInteger, default=0)
    """The last step any rank reported."""
    phase: Mapped[str] = mapped_column(String(16), default="starting")
    ranks: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    """rank -> last Heartbeat."""
    exit_reason: Mapped[str | None] = mapped_column(String(40), nullable=True)
    exit: Mapped[dict[str, Any] | None] = mapped_column(JSON, nullable=True)
    """The ExitFile, or what the reconciler concluded without one."""
    claim_nonce: Mapped[str | None] = mapped_column(String(64), nullable=True)
    report_seq: Mapped[int] = mapped_column(BigInteger, default=0)
    reported: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    """Its driver delivered its last report: nothing that was measured is missing here."""
    submitted_at: Mapped[datetime | None] = mapped_column(nullable=True)
    created_at: Mapped[datetime]
    first_step_at: Mapped[datetime | None] = mapped_column(nullable=True)
    last_report_at: Mapped[datetime | None] = mapped_column(nullable=True)
    last_progress_at: Mapped[datetime | None] = mapped_column(nullable=True)
    stop_requested_at: Mapped[datetime | None] = mapped_column(nullable=True)
    kill_reason: Mapped[str | None] = mapped_column(String(40), nullable=True)
    """Why the reconciler ended it by force: the attempt's exit reason if its driver leaves none."""
    killed_at: Mapped[datetime | None] = mapped_column(nullable=True)
    ended_at: Mapped[datetime | None] = mapped_column(nullable=True)
    wasted_steps: Mapped[int] = mapped_column(BigInteger, default=0)
    ended_trials: Mapped[int] = mapped_column(Integer, default=0, server_default="0")
    """Of a search: trials that came to their end in this attempt."""

    __table_args__ = (UniqueConstraint("job_id", "number"),)


class EventRow(Base):
    """What happened, past tense, with who did it. `seq` is the resumable id of event streams."""

    __tablename__ = "events"

    seq: Mapped[int] = mapped_column(BigId, primary_key=True, autoincrement=True)
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"), nullable=True, index=True)
    attempt: Mapped[int | None] = mapped_column(Integer, nullable=True)
    type: Mapped[str] = mapped_column(String(64))
    message: Mapped[str] = mapped_column(Text, default="")
    actor: Mapped[str] = mapped_column(String(64), default="")
    data: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    at: Mapped[datetime]


class MetricRow(Base):
    """One point. Replays after a resume overwrite nothing: readers cut an attempt's points at its successor's start."""

    __tablename__ = "metrics"

    job_id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    step: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    attempt: Mapped[int] = mapped_column(Integer, primary_key=True)
    seq: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    """The report that brought it: a job's points arrived in the order of (attempt, seq)."""
    value: Mapped[float | None] = mapped_column(Float, nullable=True)
    at: Mapped[datetime]

    __table_args__ = (Index("ix_metrics_arrival", "job_id", "attempt", "seq"),)


class SinkCursorRow(Base):
    """How far a job's metrics have been written to one sink (TensorBoard, MLflow, …)."""

    __tablename__ = "sink_cursors"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    sink: Mapped[str] = mapped_column(String(16), primary_key=True)
    attempt: Mapped[int] = mapped_column(Integer)
    seq: Mapped[int] = mapped_column(BigInteger)
    """Everything up to this report of this attempt is there."""
    generation: Mapped[int] = mapped_column(Integer, default=0)
    """How often the sink was begun anew because what it held was rolled back."""
    max_step: Mapped[int] = mapped_column(BigInteger, default=0)
    """The largest step written in this generation."""
    memory: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    """The sink's own: a run's id, a file's length."""
    done: Mapped[bool] = mapped_column(Boolean, default=False)
    """The job's end was written too."""
    failures: Mapped[int] = mapped_column(Integer, default=0)
    """In a row."""
    not_before: Mapped[datetime | None] = mapped_column(nullable=True)
    told: Mapped[bool] = mapped_column(Boolean, default=False)
    """An event on the job says that this sink failed."""
    written_at: Mapped[datetime | None] = mapped_column(nullable=True)


class SinkRow(Base):
    """Whether a sink works, as the leading controller last saw it."""

    __tablename__ = "sinks"

    name: Mapped[str] = mapped_column(String(16), primary_key=True)
    ok: Mapped[bool] = mapped_column(Boolean)
    message: Mapped[str] = mapped_column(Text, default="")
    since: Mapped[datetime]
    seen_at: Mapped[datetime]


class CheckpointRow(Base):
    """The registry: a cache of the manifests in the object store, rebuildable from them alone."""

    __tablename__ = "checkpoints"

    id: Mapped[str] = mapped_column(String(120), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    attempt: Mapped[int] = mapped_column(Integer)
    step: Mapped[int] = mapped_column(BigInteger)
    prefix: Mapped[str] = mapped_column(String(300))
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    metrics: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    model: Mapped[dict[str, Any]] = mapped_column(JSON)
    preprocess: Mapped[dict[str, Any]] = mapped_column(JSON)
    valid: Mapped[bool] = mapped_column(Boolean, default=True)
    """False once the lineage rule ignores it or verification failed."""
    pinned: Mapped[bool] = mapped_column(Boolean, default=False)
    origin: Mapped[dict[str, Any] | None] = mapped_column(JSON, nullable=True)
    """The WeightOrigin of imported weights."""
    deleted_at: Mapped[datetime | None] = mapped_column(nullable=True)
    created_at: Mapped[datetime]


class UploadRow(Base):
    """A weights file on its way into the object store, in parts, and what is to be made of it."""

    __tablename__ = "uploads"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    state: Mapped[str] = mapped_column(String(16), index=True)
    """OPEN | COMPLETED | ABORTED"""
    request: Mapped[dict[str, Any]] = mapped_column(JSON)
    """The ImportCreate."""
    sha256: Mapped[str] = mapped_column(String(64))
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    part_bytes: Mapped[int] = mapped_column(BigInteger)
    store_upload: Mapped[str | None] = mapped_column(String(1024), nullable=True)
    """The store's own name of the multipart upload."""
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"), nullable=True)
    """The import job; its file is deleted when that has ended."""
    token_id: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    deleted_at: Mapped[datetime | None] = mapped_column(nullable=True)
    """Nothing of the file is left in the store."""


class ImageRow(Base):
    """An image that somebody uploaded to have it looked at; the object store holds it until it expires."""

    __tablename__ = "images"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    media_type: Mapped[str] = mapped_column(String(64))
    created_by: Mapped[str] = mapped_column(String(64), default="")
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime] = mapped_column(index=True)


class DatasetRow(Base):
    __tablename__ = "datasets"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    card: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_by: Mapped[str] = mapped_column(String(64), default="")
    created_at: Mapped[datetime]


class TokenRow(Base):
    __tablename__ = "tokens"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(128))
    role: Mapped[str] = mapped_column(String(16))
    """viewer | member | admin"""
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    created_by: Mapped[str] = mapped_column(String(64), default="")
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None] = mapped_column(nullable=True)
    revoked_at: Mapped[datetime | None] = mapped_column(nullable=True)


class IdempotencyRow(Base):
    __tablename__ = "idempotency_keys"

    actor: Mapped[str] = mapped_column(String(64), primary_key=True)
    key: Mapped[str] = mapped_column(String(200), primary_key=True)
    request_sha256: Mapped[str] = mapped_column(String(64))
    status: Mapped[int] = mapped_column(Integer)
    body: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[datetime]


class ClusterRow(Base):
    """What the controller last saw of the Ray cluster, for the API to show. One row, id 1."""

    __tablename__ = "cluster"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    cluster_id: Mapped[str] = mapped_column(String(80), default="")
    reachable: Mapped[bool] = mapped_column(Boolean, default=False)
    nodes: Mapped[list[Any]] = mapped_column(JSON, default=list)
    message: Mapped[str] = mapped_column(Text, default="")
    seen_at: Mapped[datetime]
    controller_at: Mapped[datetime | None] = mapped_column(nullable=True)
    """The controller's last loop: readiness looks at it."""


class LeaseRow(Base):
    """A lease held by one process at a time, by name. `leader`: the controller that schedules and reconciles."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(String(40), primary_key=True)
    token: Mapped[str | None] = mapped_column(String(40), nullable=True)
    owner: Mapped[str | None] = mapped_column(String(80), nullable=True)
    expires_at: Mapped[datetime | None] = mapped_column(nullable=True)
