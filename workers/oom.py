"""Whether the kernel has killed processes for lack of memory: it says so to nobody but its own counters.

cgroup v2   <group>/memory.events        oom_kill N     of this process's group and those below it
cgroup v1   <group>/memory.oom_control   oom_kill N     of this process's group
neither     /proc/vmstat                 oom_kill N     of the whole machine
"""

from __future__ import annotations

import re
from pathlib import Path

_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


def num_oom_kills(root: Path = Path("/")) -> int | None:
    """How many processes that share this one's memory limit the kernel has killed so far; None: it does not say."""
    for path in (*_group_files(root), root / "proc/vmstat"):
        try:
            found = _COUNT.search(path.read_text())
        except OSError:
            continue
        if found is not None:
            return int(found[1])
    return None


def _group_files(root: Path) -> list[Path]:
    """Where this process's group keeps its count. In a container the group's path may be the host's: then what is
    mounted as the top is this container's group."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    mounted = root / "sys/fs/cgroup"
    files = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            files += [mounted / group.lstrip("/") / "memory.events", mounted / "memory.events"]
        elif "memory" in controllers.split(","):
            top = mounted / "memory"
            files += [top / group.lstrip("/") / "memory.oom_control", top / "memory.oom_control"]
    return files
