"""How long a stopped trial holds its workers: `python -m tests.workers.release_driver FILE.json`, run as a Ray job.

Seconds from the stop until Ray has placed a placement group of the same size are written down: of one that waited
behind the trial, and of one that is asked for once the trial was asked to stop, as a search asks for its next trial's.
Ray tries a group that waits again after growing pauses of its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from workers.search.tune import Controller, TuneTrial

BUNDLES = [{"CPU": 1.0}] * 4
DEADLINE_S = 120.0
STOPPED, WAITED, ASKED = "its own calls", "placed what waited", "placed what was asked for then"


class Listener:
    """Gives out one trial at a time and remembers where it was placed."""

    def __init__(self) -> None:
        self.waiting: list[TuneTrial] = []
        self.placed: list[Any] = []

    def next_trial(self) -> TuneTrial | None:
        return self.waiting.pop() if self.waiting else None

    def judge(self, trial: TuneTrial, step: int, value: float) -> bool:
        return value > 0.0

    def on_placed(self, trial: TuneTrial, actor: Any, placement_group: PlacementGroup) -> None:
        self.placed.append(actor)

    def on_lost(self, trial: TuneTrial, error: Exception) -> None:
        raise RuntimeError(f"{trial.trial_id} was lost") from error


def main(path: Path, repetitions: int = 3) -> None:
    ray.init(log_to_driver=False)
    listener = Listener()
    controller = Controller(listener)
    held: dict[str, list[float]] = {STOPPED: [], WAITED: [], ASKED: []}
    for number in range(2 * repetitions):
        trial = TuneTrial(f"trial-{number}", [dict(bundle) for bundle in BUNDLES])
        listener.waiting.append(trial)
        until = time.monotonic() + DEADLINE_S
        while len(listener.placed) <= number:
            controller.turn()
            assert time.monotonic() < until, "the trial was not placed"
            time.sleep(0.01)
        assert controller.report(trial, 1, 1.0), "a good value: it goes on"
        next_one = None
        if number % 2 == 0:
            next_one = placement_group(BUNDLES)
            assert not next_one.wait(timeout_seconds=0.3), "the trial holds every CPU"
        began = time.monotonic()
        # A bad one: Tune stops it, as after a rule's verdict.
        assert not controller.report(trial, 2, 0.0)
        held[STOPPED].append(time.monotonic() - began)
        kind = ASKED if next_one is None else WAITED
        next_one = next_one or placement_group(BUNDLES)
        assert next_one.wait(timeout_seconds=DEADLINE_S)
        held[kind].append(time.monotonic() - began)
        controller.end(trial)
        remove_placement_group(next_one)
    controller.close()
    path.write_text(json.dumps(held))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    # As drivers do: the end of this process is the end of its actors.
    os._exit(0)
