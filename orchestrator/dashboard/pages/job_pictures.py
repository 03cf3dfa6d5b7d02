"""What an inspect job drew of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.dashboard import parts
from orchestrator.dashboard.feeds import EVERY_S, SELDOM_S, Look
from orchestrator.dashboard.frame import Frame, section, url
from orchestrator.dashboard.pages import checkpoint_jobs
from orchestrator.schemas import JobPublic, PicturePage
from orchestrator.services.lineage import job_of
from orchestrator.services.pictures import list_pictures


def draw(frame: Frame, job: JobPublic) -> Callable[[JobPublic], None]:
    """The tab."""
    if frame.may_write and job.init_from is not None and checkpoint_jobs.has_attention(job):
        checkpoint_id = job.init_from
        with parts.card("Attention over your own images"):
            parts.tag("p", "Drop images, and see how this checkpoint looks at them.", "soft")
            checkpoint_jobs.own_images(frame, job, checkpoint_id)
    show = section(lambda view: _draw(job, view))

    def read() -> Look[PicturePage]:
        view = list_pictures(frame.services.db, frame.services.store, job.id)
        return Look(view, SELDOM_S if view.items else EVERY_S)

    frame.follow(("pictures", job.id), read, show)
    return lambda _: None


def _draw(job: JobPublic, view: PicturePage) -> None:
    if not view.items:
        with parts.card():
            parts.empty("No pictures yet.", "They are drawn when the job has succeeded.")
        return
    if view.checkpoint_id is not None:
        with parts.row("tight"):
            parts.tag("span", "Of the checkpoint", "soft")
            parts.link(view.checkpoint_id, url(f"/jobs/{job_of(view.checkpoint_id)}", tab="checkpoints"), "mono wrap")
    with parts.tag("div", "", "cols"):
        for picture in view.items:
            with parts.card(picture.title) as head:
                with head:
                    numbers = url(f"/files/jobs/{job.id}/pictures/{picture.numbers.name}")
                    parts.link("Numbers", numbers, "small", download="")
                source = url(f"/files/jobs/{job.id}/pictures/{picture.image.name}")
                parts.tag("img", "", "picture", src=source, alt=picture.caption, loading="lazy")
                parts.tag("p", picture.caption, "soft")
