"""Run benchmarks one after the other, each in a process of its own: `python -m tests.benchmarks [names] [-- options]`.

Exits with 1 if one of them failed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.benchmarks.harness import run_programs


def programs() -> list[str]:
    """The benchmarks there are: modules of this package that can be run, but for the scripts they run themselves."""
    files = [f for f in sorted(Path(__file__).parent.glob("[a-z]*.py")) if not f.stem.endswith("_script")]
    return [file.stem for file in files if '\nif __name__ == "__main__":' in file.read_text()]


def main(words: list[str]) -> int:
    return run_programs("tests.benchmarks", "benchmark", programs(), words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
