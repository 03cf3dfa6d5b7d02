"""The wheel: it installs beside other packages with its base dependencies alone, without a network, and works."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: what lies beside the sources must not get in."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("configs", "vit", "workers", "orchestrator"):
        shutil.copytree(ROOT / name, folder / "src" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, folder / "src" / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(folder / "src")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def base_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the wheel, what its base install names, and nothing else."""
    env = tmp_path_factory.mktemp("base-env")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env)], check=True)
    python = env / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip())
    for name in _base_closure():
        _link(importlib.metadata.distribution(name), site)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index", "--no-deps", "--quiet"]
    subprocess.run([*pip, str(wheel)], check=True)
    return python


def _base_closure() -> set[str]:
    """Names of the packages that `pip install patchwork-vit` brings, with what they need in turn."""
    found: set[str] = set()
    todo = [Requirement(line) for line in importlib.metadata.requires("patchwork-vit") or []]
    while todo:
        wanted = todo.pop()
        if wanted.name in found or (wanted.marker is not None and not wanted.marker.evaluate({"extra": ""})):
            continue
        found.add(wanted.name)
        todo += [Requirement(line) for line in importlib.metadata.requires(wanted.name) or []]
    return found


def _link(distribution: importlib.metadata.Distribution, site: Path) -> None:
    """Make an installed package visible in `site` by links to its top-level entries."""
    root = Path(str(distribution.locate_file("")))
    for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
        if not (site / top).exists():
            (site / top).symlink_to(root / top)


def test_the_wheel_holds_the_packages_and_their_data_only(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"configs", "vit", "workers", "orchestrator"}
    assert "configs/presets/demo/fashion-mnist-pretrain.yaml" in names
    assert any(name.startswith("orchestrator/storage/migrations/versions/") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_base_install_plans_and_says_what_is_missing_for_more(base_python: Path, tmp_path: Path) -> None:
    def patchwork(*arguments: str) -> subprocess.CompletedProcess[str]:
        program = base_python.with_name("patchwork")
        env = {"PATH": os.defpath, "HOME": str(tmp_path)}
        return subprocess.run([program, *arguments], capture_output=True, text=True, cwd=tmp_path, env=env, check=False)

    missing = subprocess.run([base_python, "-c", "import torch"], capture_output=True, text=True, check=False)
    assert "No module named 'torch'" in missing.stderr

    plan = patchwork("plan", "--preset", "paper/pretrain/imagenet21k-l16-90ep", "--gpu", "H100:64")
    assert plan.returncode == 0, plan.stderr
    assert "326.74 M parameters" in plan.stdout
    assert "demo/fashion-mnist-pretrain" in patchwork("presets").stdout
    assert "patchwork-vit[local]" in patchwork("up").stderr
    train = patchwork("train", "--preset", "demo/fashion-mnist-pretrain")
    assert (train.returncode, "patchwork-vit[worker]" in train.stderr) == (1, True), train.stderr
    assert "Ctrl-C saves and leaves" in patchwork("train", "--help").stdout
    client = "from orchestrator.client import Client; Client('http://127.0.0.1:9').close()"
    assert subprocess.run([base_python, "-c", client], cwd=tmp_path, check=False).returncode == 0
