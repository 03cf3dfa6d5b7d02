"""What there is to work with: presets, data sets, the cluster."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends

from configs.load import PresetInfo, list_presets
from orchestrator.api.deps import Member, ServicesDep, Viewer, body_schema, json_body
from orchestrator.api.examples import DATASET
from orchestrator.schemas import ClusterPublic, DatasetCreate, DatasetPage, DatasetPublic, PresetPage, PresetPublic
from orchestrator.services import datasets, health
from orchestrator.services.problems import NotFound, declares

router = APIRouter(prefix="/v1", tags=["catalog"])


@router.get("/presets", operation_id="list_presets", responses=declares(401, 503))
def list_all_presets(_: Viewer) -> PresetPage:
    """Every preset, by name."""
    return PresetPage(items=tuple(_preset(info) for info in list_presets()))


@router.get("/presets/{name:path}", operation_id="get_preset", responses=declares(401, 404, 503))
def get_preset(_: Viewer, name: str) -> PresetPublic:
    """One preset, with the settings it stands for."""
    for info in list_presets():
        if info.name == name:
            return _preset(info)
    raise NotFound(f"There is no preset {name!r}.", hint="`patchwork presets` lists them.")


@router.get("/datasets", operation_id="list_datasets", responses=declares(401, 503))
def list_datasets(services: ServicesDep, _: Viewer) -> DatasetPage:
    """Registered folders, torchvision's sets, and data that can only be planned with."""
    return datasets.list_datasets(services.db)


@router.post(
    "/datasets",
    status_code=201,
    operation_id="register_dataset",
    openapi_extra=body_schema(DatasetCreate, examples={"flowers": DATASET}),
    responses=declares(401, 403, 409, 413, 422, 503),
)
def register_dataset(
    services: ServicesDep, actor: Member, request: Annotated[DatasetCreate, Depends(json_body(DatasetCreate))]
) -> DatasetPublic:
    """Index an image folder under the data root; jobs then name it as a source of type folder."""
    return datasets.register_dataset(services.db, services.store, services.settings, actor, request)


@router.get("/datasets/{name}", operation_id="get_dataset", responses=declares(401, 404, 503))
def get_dataset(services: ServicesDep, _: Viewer, name: str) -> DatasetPublic:
    """One data set: its classes and splits."""
    return datasets.get_dataset(services.db, name)


@router.get("/cluster", operation_id="get_cluster", responses=declares(401, 503))
def get_cluster(services: ServicesDep, _: Viewer) -> ClusterPublic:
    """The Ray cluster as the controller last saw it."""
    return health.get_cluster(services.db)


def _preset(info: PresetInfo) -> PresetPublic:
    return PresetPublic(
        name=info.name,
        kind=info.kind,
        title=info.title,
        command=info.command,
        cost=info.cost,
        accuracy=info.accuracy,
        shown=info.shown,
        spec=info.spec,
    )
