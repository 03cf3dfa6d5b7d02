"""Node files: what processes write, and what of it is shipped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from workers.logs import MAX_LINE_BYTES, clean, parse_line, tail

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
WRITER = """
import faulthandler, logging, os, sys
from pathlib import Path
import structlog
from workers import logs
logs.redirect_output(Path(sys.argv[1]))
logs.configure(sys.stderr)
structlog.get_logger().info("hello", step=3, worker_secret="hunter2")
logging.getLogger("lib").warning("careful")
print("plain")
os.write(1, b"from the descriptor\\n")
os.kill(os.getpid(), getattr(__import__("signal"), sys.argv[2]))
print("still here")
"""


def written(path: Path, signal_name: str) -> tuple[int, list[str]]:
    done = subprocess.run([sys.executable, "-c", WRITER, str(path), signal_name], check=False, timeout=60)
    return done.returncode, path.read_text().splitlines()


def test_everything_a_process_writes_lands_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "att" / "rank-00000.log"
    status, raw = written(path, "SIGUSR1")
    assert status == 0
    assert path.stat().st_mode & 0o777 == 0o600
    texts = [parse_line(line.encode(), "rank-00000", NOW).msg for line in raw]
    assert "hello step=3 worker_secret=***" in texts
    assert "lib: careful" in texts
    assert {"plain", "from the descriptor", "still here"} <= set(texts)
    assert any("most recent call first" in text for text in texts), "SIGUSR1 writes the stacks"
    assert "hunter2" not in path.read_text()


def test_a_crash_leaves_its_stacks(tmp_path: Path) -> None:
    status, raw = written(tmp_path / "rank-00000.log", "SIGSEGV")
    assert status == -signal.SIGSEGV
    assert any("Fatal Python error: Segmentation fault" in line for line in raw)


def test_own_lines_keep_time_and_level() -> None:
    raw = json.dumps({"t": "2026-01-01T00:00:00+00:00", "level": "error", "msg": "bad", "step": 4}).encode()
    line = parse_line(raw, "driver", NOW)
    assert (line.t.isoformat(), line.level, line.msg) == ("2026-01-01T00:00:00+00:00", "error", "bad step=4")


@pytest.mark.parametrize(
    "raw",
    [b"{}", b"{not json", b'{"t": "yesterday", "msg": "x"}', b'{"t": 1, "level": "loud", "msg": "x"}', b'{"msg": 3}'],
)
def test_what_only_looks_like_ours_is_wrapped(raw: bytes) -> None:
    line = parse_line(raw, "driver", NOW)
    assert (line.t, line.level, line.msg) == (NOW, "info", raw.decode())


def test_long_lines_are_cut_with_a_note() -> None:
    line = parse_line(b"x" * (MAX_LINE_BYTES + 100), "driver", NOW)
    assert line.msg == "x" * MAX_LINE_BYTES + " … [100 more bytes cut]"


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07text", "text"),
        ("a\x00b\x08c\x7f", "abc"),
        ("tab\tstays", "tab\tstays"),
        ("\x9b31mc1", "31mc1"),
        ("\u2028line\u2029", "line"),
    ],
)
def test_control_characters_are_taken_out(raw: str, shown: str) -> None:
    assert clean(raw) == shown


def test_invalid_utf8_and_progress_bars() -> None:
    assert parse_line(b"caf\xe9", "s", NOW).msg == "caf�"
    assert parse_line(b" 10%\r 50%\r100%", "s", NOW).msg == "100%"


def test_tail(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_text("".join(f"line {n}\n" for n in range(1000)))
    assert tail(path, 3) == ("line 997", "line 998", "line 999")
    assert tail(tmp_path / "none.log", 3) == ()
