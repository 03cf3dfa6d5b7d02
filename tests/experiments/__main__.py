"""Run experiments one after the other, each in a process of its own:
`python -m tests.experiments [names] [-- options]`.

Exits with 1 if one of them failed.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.harness import progress
from tests.experiments.experiment import Experiment


def programs() -> list[str]:
    """The experiments there are: modules of this package that hold one."""
    files = sorted(Path(__file__).parent.glob("[a-z]*.py"))
    return [file.stem for file in files if "\nEXPERIMENT = " in file.read_text()]


def load(name: str) -> Experiment:
    """The experiment of one of `programs`."""
    found = importlib.import_module(f"tests.experiments.{name}").EXPERIMENT
    assert isinstance(found, Experiment)
    return found


def main(words: list[str]) -> int:
    split = words.index("--") if "--" in words else len(words)
    names, options = words[:split], words[split + 1 :]
    known = programs()
    for name in names:
        if name not in known:
            print(f"experiment {name!r}, must be one of {', '.join(known)}", file=sys.stderr)
            return 2
    failed = []
    for name in names or known:
        progress(f"{name} begins")
        if subprocess.run([sys.executable, "-m", f"tests.experiments.{name}", *options], check=False).returncode:
            failed.append(name)
    if failed:
        progress(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
