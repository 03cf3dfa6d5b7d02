"""Run experiments one after the other, each in a process of its own:
`python -m tests.experiments [names] [-- options]`.

Exits with 1 if one of them failed.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from tests.benchmarks.harness import run_programs
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
    return run_programs("tests.experiments", "experiment", programs(), words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
