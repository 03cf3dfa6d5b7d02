"""Which versions an attempt ran with; recorded in every manifest."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("patchwork-vit", "torch", "torchvision", "deepspeed", "ray", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """Package name to version, with Python's; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
