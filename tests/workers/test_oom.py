"""Where the kernel says that it killed for lack of memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from workers.oom import num_oom_kills

V2 = {"proc/self/cgroup": "0::/pods/a\n", "proc/vmstat": "oom_kill 90\n"}
V1 = {
    "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/pods/a\n0::/\n",
    "proc/vmstat": "oom_kill 90\n",
}
EVENTS = "low 0\nmax 41\noom 2\noom_kill {}\noom_group_kill 8\n"
CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (V2 | {"sys/fs/cgroup/pods/a/memory.events": EVENTS.format(3)}, 3),
        (V2 | {"sys/fs/cgroup/memory.events": EVENTS.format(4)}, 4),  # in a container
        (V2, 90),  # in the top group, which counts nothing
        (V1 | {"sys/fs/cgroup/memory/pods/a/memory.oom_control": CONTROL.format(5)}, 5),
        (V1 | {"sys/fs/cgroup/memory/memory.oom_control": CONTROL.format(6)}, 6),
        (V1 | {"sys/fs/cgroup/memory/memory.oom_control": "under_oom 0\n"}, 90),  # an old kernel's
        ({"proc/vmstat": "pgfault 1\noom_kill 7\n"}, 7),
        ({}, None),
    ],
)
def test_the_count_is_that_of_our_own_limit(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert num_oom_kills(tmp_path) == expected


def test_this_kernel_counts() -> None:
    found = num_oom_kills()
    assert found is not None
    assert found >= 0
