"""Run as a program: start a command, and leave nothing of it behind.

    python -I -S guardian.py [--remove PATH]... -- COMMAND...

The guardian is the command's parent and, on Linux, the subreaper of everything below it: orphans become its children,
so that none escapes, whatever session or process group it put itself in. It ends them all with SIGKILL and removes each
PATH when the command ends, or when its own standard input closes: that is a pipe from the process that started it, so
it closes even when that process is killed. SIGTERM is passed on to the command. Exit code: the command's, or
128 + signal. Standard library only; no thread.
"""

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LINUX = sys.platform == "linux"


def main() -> int:
    split = sys.argv.index("--")
    remove, command = sys.argv[2:split:2], sys.argv[split + 1 :]
    if _LINUX:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    owner = sys.stdin.fileno()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)
    signal.signal(signal.SIGTERM, lambda *_: child.send_signal(signal.SIGTERM))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    died = _wake_on_death()
    while child.poll() is None and owner not in select.select([owner, died], [], [], 5.0)[0]:
        with contextlib.suppress(BlockingIOError):
            os.read(died, 4096)
        _reap_orphans(child.pid)
    _kill_all(child)
    for path in remove:
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.unlink(path)
    code = child.returncode
    return code if code >= 0 else 128 - code


def _wake_on_death() -> int:
    """A file descriptor that becomes readable when a child of ours dies, orphans we adopted included."""
    read, write = os.pipe()
    for end in (read, write):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # a signal without a handler wakes nobody
    return read


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _die_with_parent() -> None:
    if _LINUX:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _kill_all(child: "subprocess.Popen[bytes]") -> None:
    """SIGKILL until nothing is left below us. What is killed hands its children to us, so some rounds are needed."""
    if child.poll() is None:
        child.kill()
    deadline = time.monotonic() + 10.0
    while time.monotonic() < deadline:
        child.poll()
        _reap_orphans(child.pid)
        below = _descendants()
        if not below:
            break
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    child.wait()


def _descendants() -> list[int]:
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc") if _LINUX else ():
        if name.isdigit():
            with contextlib.suppress(OSError):
                with open(f"/proc/{name}/stat") as stat:
                    # The command's name, in parentheses, may hold spaces.
                    parent = int(stat.read().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    found = list(children.get(os.getpid(), []))
    for pid in found:
        found.extend(children.get(pid, []))
    return found


def _reap_orphans(child_pid: int) -> None:
    """Collect dead orphans; the command itself belongs to its Popen."""
    with contextlib.suppress(ChildProcessError):
        while dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if dead.si_pid == child_pid:
                return
            os.waitpid(dead.si_pid, 0)


if __name__ == "__main__":
    sys.exit(main())
