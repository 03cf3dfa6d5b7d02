"""Jobs that a click on a checkpoint makes: they are submitted, and their page opens."""

from __future__ import annotations

from typing import Any

from configs.data import MAX_UPLOADED_IMAGES
from configs.pictures import READ_IMAGES
from orchestrator.dashboard.drop import Drop
from orchestrator.dashboard.frame import Frame, url
from orchestrator.schemas import JobPublic
from orchestrator.services.auth import Actor
from orchestrator.services.images import MAX_IMAGE_BYTES
from orchestrator.services.submission import Request, Submitted, submit_job


async def export(frame: Frame, job: JobPublic, checkpoint_id: str, fmt: str) -> None:
    """Write the checkpoint in another format."""
    # It reads and writes files: a GPU would wait idle.
    await _submit(frame, job, fmt, {"kind": "export", "init_from": checkpoint_id, "format": fmt}, gpus=0)


async def inspect(frame: Frame, job: JobPublic, checkpoint_id: str, **parts: Any) -> None:
    """Draw the checkpoint's pictures, on as many GPUs as a worker of its job had."""
    what = "images" if "data" in parts else "pictures"
    spec = {"kind": "inspect", "init_from": checkpoint_id, **parts}
    await _submit(frame, job, what, spec, gpus=job.spec["resources"]["gpus_per_worker"], tab="pictures")


def has_attention(job: JobPublic) -> bool:
    """Whether a job's checkpoints, or the one it looks at, attend to anything: a ResNet does not."""
    if job.kind == "inspect":
        return bool(job.spec["pictures"] != ["stem_filters"])
    return (job.spec.get("model") or {}).get("resnet") is None


def own_images(frame: Frame, job: JobPublic, checkpoint_id: str) -> None:
    """Where images are dropped, to see what the checkpoint attends to in them."""

    async def look(ids: list[str]) -> None:
        data = {"source": {"type": "images", "ids": ids}}
        await inspect(frame, job, checkpoint_id, data=data, pictures=sorted(READ_IMAGES))

    most, mib = MAX_UPLOADED_IMAGES, MAX_IMAGE_BYTES // 1024**2
    Drop(f"or drop them here: at most {most}, of {mib} MiB each.", look)


async def _submit(frame: Frame, job: JobPublic, what: str, spec: dict[str, Any], *, gpus: int, tab: str = "") -> None:
    whole = {
        **spec,
        "name": f"{job.name}-{what}"[:128],
        "resources": {"gpus_per_worker": gpus},
        "queue": {"project": job.project},
    }

    def work(actor: Actor) -> Submitted:
        return submit_job(frame.services.db, actor, Request(whole, {}), None)

    made = await frame.act(work)
    if made is not None:
        frame.go(url(f"/jobs/{made.job_id}", tab=tab))
