"""The seam between the control plane and the cluster: what is there, start, look, stop, and what is left over.

An attempt's id is the cluster's key for it, so a submission whose reply was lost can be repeated.

    LauncherError
      Unreachable   the cluster did not answer: a condition, not a failure; nothing may be concluded from it
      Refused       it answered, and said no (wrong token, malformed request): a fault of settings or of ours
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple, Protocol

from configs.base import Stored


class LauncherError(Exception):
    pass


class Unreachable(LauncherError):
    pass


class Refused(LauncherError):
    pass


class NodeInfo(Stored):
    """A node of the cluster and everything it has (not what is free)."""

    id: str
    alive: bool = True
    host: str = ""
    cpus: float = 0.0
    gpus: float = 0.0
    accelerator: str | None = None
    is_head: bool = False


class ClusterStatus(Stored):
    cluster_id: str
    """Changes when the cluster is started anew: whatever ran on the old one is gone."""
    nodes: tuple[NodeInfo, ...]

    @property
    def alive_nodes(self) -> tuple[NodeInfo, ...]:
        return tuple(node for node in self.nodes if node.alive)


class LaunchState(StrEnum):
    PENDING = "PENDING"
    RUNNING = "RUNNING"
    STOPPED = "STOPPED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    MISSING = "MISSING"
    """The cluster never heard of it."""

    @property
    def is_terminal(self) -> bool:
        """Whether the driver is gone. Actors it started may live on: see `Launcher.leftovers`."""
        return self in (LaunchState.STOPPED, LaunchState.SUCCEEDED, LaunchState.FAILED)


class JobStatus(NamedTuple):
    state: LaunchState
    message: str = ""


class Launcher(Protocol):
    """Every method may raise Unreachable or Refused."""

    def cluster(self) -> ClusterStatus:
        """The cluster's identity and nodes."""
        ...

    def submit(self, attempt_id: str) -> None:
        """Start the attempt's driver. A repeated submission changes nothing and is no error."""
        ...

    def status(self, attempt_id: str) -> JobStatus:
        """What the cluster says about the attempt's driver."""
        ...

    def stop(self, attempt_id: str) -> None:
        """Tell the driver to go now (SIGTERM, then SIGKILL). Returns at once; look at `status`."""
        ...

    def leftovers(self, attempt_id: str) -> list[str]:
        """What of the attempt still lives: actors and placement groups, each in a few words. Empty: it is gone."""
        ...

    def reap(self, attempt_id: str) -> None:
        """Begin to remove what `leftovers` names. Returns at once."""
        ...
