"""The OpenAPI document as a contract: every route says what it answers, and its examples are accepted."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from configs.load import apply_overrides, parse_spec
from orchestrator.services.problems import PROBLEM_JSON
from tests.orchestrator.rows import submit


@pytest.fixture
def document(anonymous: TestClient) -> dict[str, Any]:
    response = anonymous.get("/openapi.json")
    assert response.status_code == 200
    found: dict[str, Any] = response.json()
    return found


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Operations by id, each with its method and path."""
    found = {}
    for path, item in document["paths"].items():
        for method, operation in item.items():
            assert operation["operationId"] not in found
            found[operation["operationId"]] = operation | {"method": method.upper(), "path": path}
    return found


def test_every_operation_has_a_name_a_word_and_a_tag(document: dict[str, Any]) -> None:
    tags = {tag["name"] for tag in document["tags"]}
    for name, operation in operations(document).items():
        assert operation["description"], name
        assert operation["tags"], name
        assert set(operation["tags"]) <= tags, name
        assert "_v1_" not in name, "a generated operation id"


def test_every_operation_declares_its_errors_as_problems(document: dict[str, Any]) -> None:
    for name, operation in operations(document).items():
        codes = set(operation["responses"])
        if operation["path"] in ("/healthz", "/readyz"):
            continue
        assert {"401", "503"} <= codes, name
        if "{" in operation["path"]:
            assert "404" in codes, name
        if operation["method"] == "POST":
            assert "413" in codes, name
        if "requestBody" in operation:
            assert "422" in codes, name
        for code, response in operation["responses"].items():
            if code.startswith(("4", "5")):
                schema = response["content"][PROBLEM_JSON]["schema"]
                assert schema == {"$ref": "#/components/schemas/Problem"}, (name, code)


def test_every_operation_declares_its_security(document: dict[str, Any]) -> None:
    schemes = document["components"]["securitySchemes"]
    assert {name: (s["type"], s["scheme"]) for name, s in schemes.items()} == {
        "token": ("http", "bearer"),
        "worker_secret": ("http", "bearer"),
    }
    for name, operation in operations(document).items():
        path = operation["path"]
        expected = "worker_secret" if path.startswith("/internal/") else "token"
        security = [] if path in ("/healthz", "/readyz") else [{expected: []}]
        assert operation.get("security", []) == security, name


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    references = _references(document)
    assert references
    assert {ref.removeprefix("#/components/schemas/") for ref in references} <= set(schemas)
    assert "HTTPValidationError" not in schemas


def _references(node: Any) -> set[str]:
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*map(_references, node.values()))
    if isinstance(node, list):
        return set().union(*map(_references, node))
    return set()


def test_examples_are_accepted(api: TestClient, document: dict[str, Any]) -> None:
    seen = 0
    for name, operation in operations(document).items():
        content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        for title, example in content.get("examples", {}).items():
            seen += 1
            body = example["value"]
            if "spec" in body:
                parse_spec(apply_overrides(body["spec"], body.get("overrides", {})))
            if name in ("create_plan", "create_token") or (name, title) == ("create_job", "pretrain"):
                response = api.request(operation["method"], operation["path"], json=body)
                assert response.status_code in (200, 201), (name, title, response.text)
    assert seen >= 6


def test_answers_fit_their_schemas(api: TestClient, app: FastAPI, document: dict[str, Any]) -> None:
    """What the API says about a job holds every field that the document promises."""
    job = submit(api)
    required = document["components"]["schemas"]["JobPublic"]["required"]
    assert set(required) <= set(job)
    assert json.loads(api.get("/openapi.json").content) == app.openapi()
