"""Checkpoints of a job: what is kept, where it came from, and how to take it away."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.dashboard import parts, words
from orchestrator.dashboard.feeds import EVERY_S, SELDOM_S, Look
from orchestrator.dashboard.frame import Frame, section, url
from orchestrator.schemas import CheckpointPage, CheckpointPublic, JobPublic
from orchestrator.services.checkpoints import list_checkpoints
from orchestrator.services.jobs import get_job

_COLUMNS = (
    {"key": "step", "label": "Step"},
    {"key": "id", "label": "Checkpoint"},
    {"key": "top1", "label": "Top-1", "end": True},
    {"key": "loss", "label": "Loss", "end": True},
    {"key": "size", "label": "Size", "end": True},
    {"key": "also", "label": "Also"},
    {"key": "made", "label": "Made", "end": True},
)


def draw(frame: Frame, job: JobPublic) -> Callable[[JobPublic], None]:
    """The tab."""
    with parts.card("Checkpoints", flush=True), parts.tag("div", "", "scroll-x"):
        table = parts.Rows("Checkpoints of the job", _COLUMNS)
        none = section(_draw_none, lambda view: not view.items)
    with parts.card("Take the weights away"):
        parts.tag("p", "The best checkpoint, verified block by block, in a folder that vit.weights opens:")
        _command(f"patchwork fetch {job.id}")
        parts.tag("p", "As files for timm and others:")
        _command(f"patchwork fetch {job.id} -o my-model && patchwork convert my-model --to timm")
    with parts.card("Lineage"):
        _draw_lineage(job)

    def show(view: CheckpointPage) -> None:
        none(view)
        table.show_rows([_row(checkpoint) for checkpoint in view.items])
        parts.show(table, bool(view.items))

    def read() -> Look[CheckpointPage]:
        is_terminal = get_job(frame.services.db, job.id).is_terminal
        return Look(list_checkpoints(frame.services.db, job.id), SELDOM_S if is_terminal else EVERY_S)

    frame.follow(("checkpoints", job.id), read, show)
    return lambda _: None


def _draw_none(view: CheckpointPage) -> None:
    if not view.items:
        parts.empty("No checkpoints yet.", "The job writes them as its description says, and one at its end.")


def _row(checkpoint: CheckpointPublic) -> dict[str, object]:
    marks = [*checkpoint.aliases, *(["pinned"] if checkpoint.pinned else [])]
    if not checkpoint.available:
        marks = ["deleted" if checkpoint.deleted_at else "not valid"]
    return {
        "id": {"text": checkpoint.id},
        "step": f"{checkpoint.step:,}",
        "top1": words.percent(checkpoint.metrics.get("eval/top1")),
        "loss": words.measured("eval/loss", checkpoint.metrics.get("eval/loss")),
        "size": words.size(checkpoint.num_bytes),
        "also": ", ".join(marks),
        "made": {"ago": checkpoint.created_at.isoformat()},
    }


def _command(text: str) -> None:
    with parts.row():
        parts.tag("code", text, "wrap grow")
        parts.copy_button(text, "Copy")


def _draw_lineage(job: JobPublic) -> None:
    origins = [
        ("Starts from the weights of", job.init_from),
        ("Goes on from", job.resume_from),
        ("A retry of", job.retry_of),
    ]
    known = [(label, value) for label, value in origins if value]
    if not known:
        parts.tag("p", "It began with weights of its own.", "soft")
    for label, value in known:
        with parts.row("tight"):
            parts.tag("span", label, "soft")
            parts.link(value, url(f"/jobs/{job_of(value)}"), "mono wrap")


def job_of(reference: str) -> str:
    """The job of a checkpoint id, of job_…/best, or the job itself."""
    if reference.startswith("ckpt_"):
        return f"job_{reference.split('_')[1]}"
    return reference.partition("/")[0]
