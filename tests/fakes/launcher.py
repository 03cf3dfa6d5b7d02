"""A cluster that does what a test says."""

from __future__ import annotations

from orchestrator.control.launcher import ClusterStatus, JobStatus, LaunchState, NodeInfo, Unreachable


class FakeLauncher:
    """`orchestrator.control.launcher.Launcher` in memory. Tests set its public fields.

    `lose_next_reply`: the next submission is accepted, and then looks as if the cluster were away.
    """

    def __init__(
        self, nodes: tuple[NodeInfo, ...] = (NodeInfo(id="n1", cpus=4),), cluster_id: str = "session_1"
    ) -> None:
        self.nodes = nodes
        self.cluster_id = cluster_id
        self.is_away = False
        self.lose_next_reply = False
        self.states: dict[str, LaunchState] = {}
        self.messages: dict[str, str] = {}
        self.remains: dict[str, list[str]] = {}
        self.submissions: list[str] = []
        """Every submission that reached the cluster, repeated ones too."""
        self.stopped: list[str] = []
        self.reaped: list[str] = []

    def replace_cluster(self, cluster_id: str) -> None:
        """The cluster dies and another one, which knows nothing, takes its address."""
        self.cluster_id = cluster_id
        self.states.clear()
        self.remains.clear()

    def end(self, attempt_id: str, state: LaunchState = LaunchState.SUCCEEDED, message: str = "") -> None:
        """The attempt's driver ends."""
        self.states[attempt_id] = state
        self.messages[attempt_id] = message

    def cluster(self) -> ClusterStatus:
        self._answer()
        return ClusterStatus(cluster_id=self.cluster_id, nodes=self.nodes)

    def submit(self, attempt_id: str) -> None:
        self._answer()
        self.submissions.append(attempt_id)
        self.states.setdefault(attempt_id, LaunchState.RUNNING)
        if self.lose_next_reply:
            self.lose_next_reply = False
            raise Unreachable("the reply was lost")

    def status(self, attempt_id: str) -> JobStatus:
        self._answer()
        return JobStatus(self.states.get(attempt_id, LaunchState.MISSING), self.messages.get(attempt_id, ""))

    def stop(self, attempt_id: str) -> None:
        self._answer()
        self.stopped.append(attempt_id)
        if self.states.get(attempt_id) is LaunchState.RUNNING:
            self.states[attempt_id] = LaunchState.STOPPED

    def leftovers(self, attempt_id: str) -> list[str]:
        self._answer()
        return list(self.remains.get(attempt_id, []))

    def reap(self, attempt_id: str) -> None:
        self._answer()
        self.reaped.append(attempt_id)
        self.remains.pop(attempt_id, None)

    def _answer(self) -> None:
        if self.is_away:
            raise Unreachable("the cluster is away")
