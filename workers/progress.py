"""Whether an attempt moves. A rank that hangs still pushes heartbeats from its reporting thread; a frozen process
does not."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from configs.wire import Heartbeat
from workers.diagnosis import Hang

SLOW = 6.0
"""Phases without steps (building, loading, saving…) and the first step, which compiles, may take so much longer."""
_STEPPING = ("training", "evaluating")


class ProgressWatch:
    """Watches phase, step and beats of every rank. Times are seconds of a monotonic clock."""

    def __init__(self, hang_timeout_s: float, silent_timeout_s: float) -> None:
        self._hang_timeout_s = hang_timeout_s
        self._silent_timeout_s = silent_timeout_s
        self._seen: dict[int, tuple[str, int, int]] = {}
        self._moved_at: dict[int, float] = {}
        self._first_step: dict[int, int] = {}

    def observe(
        self, now: float, heartbeats: Mapping[int, Heartbeat], silent_s: Mapping[int, float], ended: Collection[int]
    ) -> Hang | None:
        """The rank that holds the attempt up, if it stands still."""
        for rank, beat in heartbeats.items():
            sign = (beat.phase, beat.step, beat.beats)
            if self._seen.get(rank) != sign:
                self._seen[rank] = sign
                self._moved_at[rank] = now
            if beat.phase == "training":
                self._first_step.setdefault(rank, beat.step)
        live = {rank: beat for rank, beat in heartbeats.items() if rank not in ended}
        return self._silent(live, silent_s) or self._stuck(now, live)

    def _silent(self, live: Mapping[int, Heartbeat], silent_s: Mapping[int, float]) -> Hang | None:
        """A process that says nothing while another one still speaks."""
        silent = [r for r in live if silent_s.get(r, 0.0) > self._silent_timeout_s]
        if not silent or len(silent) == len(live):
            return None
        rank = max(silent, key=lambda r: silent_s[r])
        beat = live[rank]
        text = (
            f"Rank {rank} on {beat.node} (process {beat.pid}) has been silent for {silent_s[rank]:.0f} s "
            f"in phase {beat.phase}, step {beat.step}."
        )
        return Hang(rank, beat.node, text)

    def _stuck(self, now: float, live: Mapping[int, Heartbeat]) -> Hang | None:
        """All live ranks stand still. A rank that waits for a peer stands still too, so one moving rank is enough."""
        if not live:
            return None
        for rank, beat in live.items():
            if now - self._moved_at[rank] <= self._limit_s(beat):
                return None
        behind = min(beat.step for beat in live.values())
        suspects = tuple(sorted(rank for rank, beat in live.items() if beat.step == behind))
        rank = suspects[0]
        beat = live[rank]
        still_s = min(now - self._moved_at[r] for r in live)
        place = f"at step {behind} ({beat.phase})"
        if len(suspects) > 1:
            who = f"ranks {list(suspects)} stand" if len(suspects) <= 8 else f"{len(suspects)} ranks stand"
            return Hang(rank, beat.node, f"No rank made progress for {still_s:.0f} s; {who} {place}.", suspects)
        others = sorted({b.step for r, b in live.items() if r != rank})
        ahead = f"; the other ranks stand at step {', '.join(map(str, others))}" if others else ""
        text = f"Rank {rank} on {beat.node} made no progress for {still_s:.0f} s {place}{ahead}."
        return Hang(rank, beat.node, text, suspects)

    def _limit_s(self, beat: Heartbeat) -> float:
        is_first_step = beat.step <= self._first_step.get(beat.rank, beat.step)
        is_slow = beat.phase not in _STEPPING or (beat.phase == "training" and is_first_step)
        return self._hang_timeout_s * (SLOW if is_slow else 1.0)
