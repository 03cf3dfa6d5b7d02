"""Checkpoints of a job: what is kept, where it came from, and how to take it away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from orchestrator.dashboard import parts, words
from orchestrator.dashboard.feeds import EVERY_S, SELDOM_S, Look
from orchestrator.dashboard.frame import Frame, section
from orchestrator.dashboard.pages import checkpoint_jobs, job_lineage
from orchestrator.schemas import CheckpointEdit, CheckpointPage, CheckpointPublic, JobPublic
from orchestrator.services.checkpoints import EXPORT_FORMATS, edit_checkpoint, list_checkpoints
from orchestrator.services.jobs import get_job

_COLUMNS = (
    {"key": "checkpoint", "label": "Checkpoint"},
    {"key": "step", "label": "Step", "end": True},
    {"key": "top1", "label": "Top-1", "end": True},
    {"key": "loss", "label": "Loss", "end": True},
    {"key": "size", "label": "Size", "end": True},
    {"key": "also", "label": "Also"},
    {"key": "made", "label": "Made", "end": True},
)
_ACTIONS = (
    {"key": "pin", "label": "Keep", "end": True},
    {"key": "inspect", "label": "Look into", "end": True},
    {"key": "export", "label": "Export", "end": True},
)
_FORMAT_WORDS = {
    "safetensors": "safetensors: this project's own",
    "timm": "timm",
    "transformers": "Hugging Face Transformers",
    "torchvision": "torchvision",
    "npz": "npz: the official code's",
}


def draw(frame: Frame, job: JobPublic) -> Callable[[JobPublic], None]:
    """The tab."""
    with parts.card("Checkpoints", flush=True), parts.tag("div", "", "scroll-x"):
        columns = (*_COLUMNS, *(_ACTIONS if frame.may_write else ()))
        table = parts.Rows("Checkpoints of the job", columns, on_act=lambda id, action: _act(frame, job, id, action))
        none = section(_draw_none, lambda view: not view.items)
    with parts.card("Take the weights away"):
        parts.tag("p", "The best checkpoint, verified block by block, in a folder that vit.load opens:")
        _command(f"patchwork fetch {job.id}")
        parts.tag("p", "As files for timm and others:")
        _command(f"patchwork fetch {job.id} -o my-model && patchwork convert my-model my-model-timm --to timm")
    job_lineage.draw(frame, job)

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
        "id": checkpoint.id,
        "checkpoint": checkpoint.id,
        "step": f"{checkpoint.step:,}",
        "top1": words.percent(checkpoint.metrics.get("eval/top1")),
        "loss": words.measured("eval/loss", checkpoint.metrics.get("eval/loss")),
        "size": words.size(checkpoint.num_bytes),
        "also": ", ".join(marks),
        "made": {"ago": checkpoint.created_at.isoformat()},
        **(_buttons(checkpoint) if checkpoint.available else {}),
    }


def _buttons(checkpoint: CheckpointPublic) -> dict[str, Any]:
    step = f"the checkpoint of step {checkpoint.step:,}"
    action, label = ("unpin", f"Unpin {step}") if checkpoint.pinned else ("pin", f"Pin {step}")
    pin = {"action": action, "button": action.capitalize(), "label": label}
    return {
        "pin": pin,
        "inspect": {"action": "inspect", "button": "Look into", "label": f"Look into {step}"},
        "export": {"action": "export", "button": "Export", "label": f"Export {step}"},
    }


async def _act(frame: Frame, job: JobPublic, checkpoint_id: str, action: str) -> None:
    if action == "export":
        _open_export(frame, job, checkpoint_id)
        return
    if action == "inspect":
        _open_inspection(frame, job, checkpoint_id)
        return
    wanted = CheckpointEdit(pinned=action == "pin")
    done = "It is kept." if wanted.pinned else "From now on the job's retention decides."
    await frame.act(lambda actor: edit_checkpoint(frame.services.db, actor, checkpoint_id, wanted), done)


def _open_inspection(frame: Frame, job: JobPublic, checkpoint_id: str) -> None:
    box, body = parts.dialog("Look into this checkpoint")
    with body:
        parts.tag("p", checkpoint_id, "mono wrap")

        parts.tag("p", "The paper's pictures of it: filters, positions, how far its heads look, what it attends to.")
        with parts.row():
            parts.button("Draw the pictures", lambda: checkpoint_jobs.inspect(frame, job, checkpoint_id), "main")
        if checkpoint_jobs.has_attention(job):
            parts.tag("p", "Or what it attends to in images of your own:")
            checkpoint_jobs.own_images(frame, job, checkpoint_id)
        with parts.row():
            parts.button("Close", box.close)
    box.open()


def _open_export(frame: Frame, job: JobPublic, checkpoint_id: str) -> None:
    box, body = parts.dialog("Export this checkpoint")
    with body:
        parts.tag("p", checkpoint_id, "mono wrap")
        options: dict[str, str] = {name: _FORMAT_WORDS[name] for name in EXPORT_FORMATS}
        wanted = parts.choice("Format", options, EXPORT_FORMATS[0], help="A job writes it; its page offers the files.")

        with parts.row():
            parts.button("Export it", lambda: checkpoint_jobs.export(frame, job, checkpoint_id, wanted.value), "main")
            parts.button("Close", box.close)
    box.open()


def _command(text: str) -> None:
    with parts.row():
        parts.tag("code", text, "wrap grow")
        parts.copy_button(text, "Copy")
