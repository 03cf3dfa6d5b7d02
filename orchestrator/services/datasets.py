"""Data sets: those torchvision knows, folders that were registered, and cards to plan with.

Registering walks the folder once and stores its index; from then on sample numbers, labels and the fingerprint come
from the index, on every node.
"""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import select

from configs.datasets import PLANNING_CARDS, TORCHVISION_CARDS
from configs.folder_index import FolderError, card, scan
from configs.layout import dataset_index_key
from configs.wire import DatasetCard
from orchestrator.schemas import DatasetCreate, DatasetPage, DatasetPublic
from orchestrator.services.auth import Actor
from orchestrator.services.problems import Conflict, Invalid, NotFound, field_error
from orchestrator.settings import Settings
from orchestrator.storage.db import Database
from orchestrator.storage.events import record
from orchestrator.storage.store import ObjectStore
from orchestrator.storage.tables import DatasetRow


def list_datasets(db: Database) -> DatasetPage:
    """Registered folders first, then torchvision's sets, then cards that can only be planned with."""
    with db.reader() as session:
        rows = list(session.scalars(select(DatasetRow).order_by(DatasetRow.name)))
    registered = {row.name for row in rows}
    known = [DatasetPublic(name=c.name, card=c, registered=False, available=True) for c in TORCHVISION_CARDS.values()]
    planning = [
        DatasetPublic(name=c.name, card=c, registered=False, available=False)
        for c in PLANNING_CARDS.values()
        if c.name not in registered
    ]
    return DatasetPage(items=(*map(_public, rows), *known, *planning))


def get_dataset(db: Database, name: str) -> DatasetPublic:
    """Raises NotFound."""
    for item in list_datasets(db).items:
        if item.name == name:
            return item
    raise NotFound(f"There is no data set {name!r}.", hint="Register a folder with `patchwork datasets add`.")


def register_dataset(
    db: Database, store: ObjectStore, settings: Settings, actor: Actor, request: DatasetCreate
) -> DatasetPublic:
    """Index an image folder under the data root and keep it under a name. The same folder unchanged may be registered
    again; the index of one that changed gets a new fingerprint, and jobs already queued keep the old one.

    Raises:
        Conflict: no data root is configured, or the name stands for another folder.
        Invalid: the folder cannot be registered as it is.
    """
    if settings.data_root is None:
        raise Conflict("This server has no data root.", hint="Set PATCHWORK_DATA_ROOT to where the workers see images.")
    try:
        index = scan(settings.data_root, request.name, request.path)
    except FolderError as error:
        raise Invalid(
            "The folder cannot be registered.", errors=[field_error("/path", str(error), request.path)]
        ) from None
    key = dataset_index_key(request.name, index.fingerprint.removeprefix("sha256:"))
    made = card(index, key)
    store.put(key, index.model_dump_json().encode())
    with db.session() as session:
        row = session.get(DatasetRow, request.name)
        if row is not None and DatasetCard.model_validate(row.card).path != made.path:
            raise Conflict(
                f"The name {request.name!r} stands for the folder {row.card.get('path')!r}.",
                hint="Choose another name.",
            )
        if row is None:
            row = DatasetRow(name=request.name, created_at=datetime.now(UTC))
            session.add(row)
        row.card = made.model_dump(mode="json")
        row.created_by = actor.name
        record(session, None, "dataset.registered", f"Data set {request.name} was registered", actor.name)
        session.flush()
        return _public(row)


def _public(row: DatasetRow) -> DatasetPublic:
    return DatasetPublic(
        name=row.name,
        card=DatasetCard.model_validate(row.card),
        registered=True,
        available=True,
        created_by=row.created_by,
        created_at=row.created_at,
    )
