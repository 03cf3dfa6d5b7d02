"""A driver for the launcher's tests: `python -m tests.orchestrator.launched`, run by Ray.

It leaves a detached actor and a detached placement group behind, which outlive it, and waits to be stopped.
"""

from __future__ import annotations

import threading

import ray
from ray.util.placement_group import placement_group


@ray.remote(num_cpus=0, lifetime="detached", name="survivor")
class Survivor:
    def ping(self) -> str:
        return "here"


def main() -> None:
    ray.init(log_to_driver=False)
    survivor = Survivor.remote()
    ray.get(survivor.ping.remote())
    group = placement_group([{"CPU": 1}], lifetime="detached", name="kept")
    ray.get(group.ready())
    threading.Event().wait()


if __name__ == "__main__":
    main()
