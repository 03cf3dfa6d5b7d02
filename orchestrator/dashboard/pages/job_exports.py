"""What an export job wrote, to be taken away."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.dashboard import parts, words
from orchestrator.dashboard.feeds import EVERY_S, SELDOM_S, Look
from orchestrator.dashboard.frame import Frame, section, url
from orchestrator.schemas import ExportPage, JobPublic
from orchestrator.services.checkpoints import list_exports
from orchestrator.services.jobs import get_job

_COLUMNS = (
    {"key": "name", "label": "File"},
    {"key": "format", "label": "Format"},
    {"key": "size", "label": "Size", "end": True},
)


def draw(frame: Frame, job: JobPublic) -> Callable[[JobPublic], None]:
    """The tab."""
    with parts.card("Files", flush=True):
        show = section(lambda view: _draw(job, view))

    def read() -> Look[ExportPage]:
        # The job first: of one that has ended, what is listed afterwards is all there is.
        ended = get_job(frame.services.db, job.id).is_terminal
        view = list_exports(frame.services.db, frame.services.store, job.id)
        return Look(view, SELDOM_S if ended else EVERY_S)

    frame.follow(("exports", job.id), read, show)
    return lambda _: None


def _draw(job: JobPublic, view: ExportPage) -> None:
    if not view.items:
        parts.empty("No files yet.", "They are there when the job has succeeded.")
        return
    with parts.tag("div", "", "scroll-x"):
        parts.Rows("Exported files", _COLUMNS).show_rows(
            [
                {
                    "id": f"{export.format}/{file.name}",
                    "name": {
                        "text": file.name,
                        "href": url(f"/files/jobs/{job.id}/exports/{export.format}/{file.name}"),
                    },
                    "format": export.format,
                    "size": words.size(file.num_bytes),
                }
                for export in view.items
                for file in export.files
            ]
        )
