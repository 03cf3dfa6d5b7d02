"""What an inspect job drew of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable

from configs.pictures import READ_IMAGES
from orchestrator.dashboard import parts
from orchestrator.dashboard.drop import Drop
from orchestrator.dashboard.feeds import EVERY_S, SELDOM_S, Look
from orchestrator.dashboard.frame import Frame, section, url
from orchestrator.schemas import JobPublic, PicturePage
from orchestrator.services.auth import Actor
from orchestrator.services.lineage import job_of
from orchestrator.services.pictures import list_pictures
from orchestrator.services.submission import Request, Submitted, submit_job


def draw(frame: Frame, job: JobPublic) -> Callable[[JobPublic], None]:
    """The tab."""
    if frame.may_write and job.init_from is not None:
        checkpoint_id = job.init_from
        with parts.card("Attention over your own images"):
            parts.tag("p", "Drop images, and see how this checkpoint looks at them.", "soft")
            own_images(frame, job, checkpoint_id)
    show = section(lambda view: _draw(job, view))

    def read() -> Look[PicturePage]:
        view = list_pictures(frame.services.db, frame.services.store, job.id)
        return Look(view, SELDOM_S if view.items else EVERY_S)

    frame.follow(("pictures", job.id), read, show)
    return lambda _: None


def own_images(frame: Frame, job: JobPublic, checkpoint_id: str) -> None:
    """Where images are dropped; the job that looks at them opens by itself."""

    async def look(ids: list[str]) -> None:
        spec = {
            "kind": "inspect",
            "name": f"{job.name}-images"[:128],
            "init_from": checkpoint_id,
            "pictures": sorted(READ_IMAGES),
            "data": {"source": {"type": "images", "ids": ids}},
            "resources": {"gpus_per_worker": job.spec["resources"]["gpus_per_worker"]},
            "queue": {"project": job.project},
        }

        def work(actor: Actor) -> Submitted:
            return submit_job(frame.services.db, actor, Request(spec, {}), None)

        made = await frame.act(work)
        if made is not None:
            frame.go(url(f"/jobs/{made.job_id}", tab="pictures"))

    Drop("or drop them here: at most 64, of 16 MiB each. They are kept for a week.", look)


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
