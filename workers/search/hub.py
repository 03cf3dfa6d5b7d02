"""The hubs of all trials of a search in one actor: a process for each would cost more than some trials."""

from __future__ import annotations

from typing import Any

import ray

from configs.states import Desired
from workers.hub import Drained, ReportHub

_TIMEOUT_S = 30.0


class SearchHub:
    """A ReportHub for each attempt of a trial, by the attempt's id. Nothing here blocks."""

    def __init__(self) -> None:
        self._hubs: dict[str, ReportHub] = {}

    def call(self, attempt_id: str, method: str, *arguments: Any) -> Any:
        """Calls a method of the attempt's hub, which is made at the first call."""
        return getattr(self._hubs.setdefault(attempt_id, ReportHub()), method)(*arguments)

    def forget(self, attempt_id: str) -> None:
        self._hubs.pop(attempt_id, None)


class TrialHub:
    """One attempt's hub, with the methods of a handle to a ReportHub of its own: what ranks are given."""

    def __init__(self, actor: Any, attempt_id: str) -> None:
        self.actor, self._attempt_id = actor, attempt_id
        for method in ("enter", "publish", "rendezvous", "push", "finish"):
            setattr(self, method, _Method(actor, attempt_id, method))

    def drain(self, desired: Desired) -> Drained:
        """As the driver calls it. Raises RayError or GetTimeoutError if the hub is gone."""
        drained: Drained = ray.get(self.actor.call.remote(self._attempt_id, "drain", desired), timeout=_TIMEOUT_S)
        return drained

    def forget(self) -> None:
        self.actor.forget.remote(self._attempt_id)


class _Method:
    def __init__(self, actor: Any, attempt_id: str, name: str) -> None:
        self._actor, self._attempt_id, self._name = actor, attempt_id, name

    def remote(self, *arguments: Any) -> Any:
        return self._actor.call.remote(self._attempt_id, self._name, *arguments)
