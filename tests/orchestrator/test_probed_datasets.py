"""Data sets to probe features on, over HTTP: registered folders are known, pinned, and missed where they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from starlette.testclient import TestClient

from orchestrator.settings import Settings
from tests.orchestrator.rows import spec_with
from tests.workers.image_sets import write_folder, write_image


def probing(*names: str) -> dict[str, Any]:
    datasets = [{"source": {"type": "folder", "name": name}} for name in names]
    return spec_with(eval={"few_shot": {"shots": [1], "datasets": datasets}})


def test_a_job_keeps_to_what_a_probed_folder_holds_when_it_is_submitted(api: TestClient, settings: Settings) -> None:
    assert isinstance(settings.data_root, Path)
    write_folder(settings.data_root / "pets", {"train": 2, "test": 2})
    card = api.post("/v1/datasets", json={"name": "pets", "path": "pets"}).json()["card"]
    first = api.post("/v1/jobs", json={"spec": probing("pets")})
    assert first.status_code == 201, first.text
    (probed,) = first.json()["spec"]["eval"]["few_shot"]["datasets"]
    assert probed["fingerprint"] == card["fingerprint"]
    assert api.post("/v1/plans", json={"spec": probing("pets")}).status_code == 200

    write_image(settings.data_root / "pets" / "test" / "cat" / "new.png", np.zeros((8, 8, 3), dtype=np.uint8))
    changed = api.post("/v1/datasets", json={"name": "pets", "path": "pets"}).json()["card"]
    assert changed["fingerprint"] != card["fingerprint"]
    second = api.post("/v1/jobs", json={"spec": probing("pets")}).json()
    assert second["spec"]["eval"]["few_shot"]["datasets"][0]["fingerprint"] == changed["fingerprint"]
    kept = api.get(f"/v1/jobs/{first.json()['id']}").json()["spec"]["eval"]["few_shot"]["datasets"][0]
    assert kept["fingerprint"] == card["fingerprint"]


def test_a_folder_that_is_not_registered_is_named(api: TestClient) -> None:
    response = api.post("/v1/jobs", json={"spec": probing("pets", "flowers")})
    assert response.status_code == 422
    found = {error["pointer"]: error["message"] for error in response.json()["errors"]}
    assert set(found) == {f"/eval/few_shot/datasets/{n}/source/name" for n in (0, 1)}
    assert "data set 'pets' is not registered" in found["/eval/few_shot/datasets/0/source/name"]
