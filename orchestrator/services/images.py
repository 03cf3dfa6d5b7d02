"""Images on their way in, for inspect jobs: one request each, kept in the object store until they expire."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from sqlalchemy import select
from sqlalchemy.orm import Session

from configs.data import ImagesSource
from configs.errors import FieldError
from configs.ids import new_image_id
from configs.layout import image_key
from orchestrator.schemas import ImagePublic
from orchestrator.services.auth import Actor
from orchestrator.services.problems import Invalid, field_error
from orchestrator.settings import Settings
from orchestrator.storage.db import Database
from orchestrator.storage.store import ObjectStore, StoreError
from orchestrator.storage.tables import ImageRow

MAX_IMAGE_BYTES = 16 * 1024**2
MEDIA_TYPES = ("image/jpeg", "image/png", "image/webp", "image/bmp", "image/gif", "image/tiff")
"""Of what a worker decodes."""


def upload_image(db: Database, store: ObjectStore, settings: Settings, actor: Actor, content: bytes) -> ImagePublic:
    """Keep an image for a while. Whether it can be decoded is found out by the job that reads it.

    Raises:
        Invalid: it is no image, or too large.
    """
    media_type = media_type_of(content)
    if media_type is None:
        allowed = ", ".join(MEDIA_TYPES)
        shown = f"{content[:8]!r}…" if content else "nothing"
        raise Invalid(
            "This is not an image.",
            hint="Send the file as it is, as the whole body.",
            errors=[field_error("", f"begins with {shown}: not the beginning of an image", None, allowed)],
        )
    if len(content) > MAX_IMAGE_BYTES:
        message = f"{len(content)} bytes"
        raise Invalid("The image is too large.", errors=[field_error("", message, None, f"at most {MAX_IMAGE_BYTES}")])
    now = datetime.now(UTC)
    row = ImageRow(
        id=new_image_id(),
        num_bytes=len(content),
        media_type=media_type,
        created_by=actor.name,
        created_at=now,
        expires_at=now + timedelta(seconds=settings.image_expires_s),
    )
    # The row first: an object that no row names would never be deleted.
    with db.session() as session:
        session.add(row)
    try:
        store.put(image_key(row.id), content)
    except StoreError:
        # It may have arrived all the same: the sweep deletes both.
        with db.session() as session:
            session.get_one(ImageRow, row.id).expires_at = now
        raise
    return ImagePublic.model_validate(row, from_attributes=True)


def missing_images(session: Session, source: ImagesSource, *, hold: bool) -> Iterator[FieldError]:
    """A fault for every image that is not there (any more). With `hold` those that are there are kept from now on as
    long as they were when they were uploaded: a job is about to need them."""
    now = datetime.now(UTC)
    found = session.scalars(select(ImageRow).where(ImageRow.id.in_(source.ids), ImageRow.expires_at > now)).all()
    known = {row.id for row in found}
    for row in found if hold else ():
        row.expires_at, row.created_at = now + (row.expires_at - row.created_at), now
    for index, image_id in enumerate(source.ids):
        if image_id not in known:
            message = f"there is no image {image_id}: upload it (POST /v1/images); images are kept for a while only"
            yield FieldError(f"/data/source/ids/{index}", message, image_id, "the id of an uploaded image")


def media_type_of(content: bytes) -> str | None:
    """What the first bytes say; None: not an image of MEDIA_TYPES."""
    for beginning, media_type in _BEGINNINGS.items():
        if content.startswith(beginning):
            return media_type
    return "image/webp" if content[:4] == b"RIFF" and content[8:12] == b"WEBP" else None


_BEGINNINGS = {
    b"\xff\xd8\xff": "image/jpeg",
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"BM": "image/bmp",
    b"GIF87a": "image/gif",
    b"GIF89a": "image/gif",
    b"II*\x00": "image/tiff",
    b"MM\x00*": "image/tiff",
}
