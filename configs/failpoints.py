"""Named places where a test makes a process die, stop, wait or fail.

Off unless the environment names a folder (FAILPOINTS): then `failpoint("checkpoint.committed", rank=0, step=20)` looks
for a file `checkpoint.committed` there. Its one line is an action and conditions, `kill rank=0 step=20`: where every
condition equals what the place passes, the action happens once in all processes together, because the process that acts
renames the file to `checkpoint.committed.fired` first. With the word `always` the file stays and the action repeats.

Actions: `kill` (SIGKILL itself), `stop` (SIGSTOP itself), `exit` (end without cleaning up, status 1), `raise`
(FailpointError), `sleep=SECONDS`.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

VARIABLE = "FAILPOINTS"
_FOLDER = os.environ.get(VARIABLE)


class FailpointError(RuntimeError):
    """What `raise` raises."""


def failpoint(name: str, **where: object) -> None:
    """Acts as the armed file of this name says; costs one comparison where no folder is named.

    Raises FailpointError (`raise`), ValueError for a file that says something else.
    """
    if _FOLDER is not None:
        _act(Path(_FOLDER) / name, where)


def arm(folder: Path, name: str, action: str) -> Path:
    """Arms a failpoint; returns the path that exists once it has fired (unless it is to fire always)."""
    fired = folder / f"{name}.fired"
    fired.unlink(missing_ok=True)
    partial = folder / f".{name}.partial"
    partial.write_text(action)
    partial.rename(folder / name)
    return fired


def _act(path: Path, where: dict[str, object]) -> None:
    try:
        words = path.read_text().split()
    except FileNotFoundError:
        return
    action, conditions = words[0], [word for word in words[1:] if word != "always"]
    for condition in conditions:
        key, _, value = condition.partition("=")
        if str(where.get(key)) != value:
            return
    if "always" not in words:
        try:
            path.rename(path.with_name(f"{path.name}.fired"))
        except FileNotFoundError:  # another process was first
            return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "exit":
        os._exit(1)
    elif action == "raise":
        raise FailpointError(f"failpoint {path.name} was hit ({where})")
    elif action.startswith("sleep="):
        time.sleep(float(action.removeprefix("sleep=")))
    else:
        raise ValueError(f"failpoint {path.name}: unknown action {action!r}")
