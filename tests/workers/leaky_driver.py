"""A Ray job that ends and leaves an actor and a placement group behind: what the reaper is for."""

from __future__ import annotations

import ray
from ray.util.placement_group import placement_group


class Forgotten:
    def is_here(self) -> bool:
        return True


if __name__ == "__main__":
    ray.init(log_to_driver=False)
    actor = ray.remote(num_cpus=0)(Forgotten).options(lifetime="detached").remote()
    ray.get(actor.is_here.remote())
    ray.get(placement_group([{"CPU": 1}], lifetime="detached", name="forgotten").ready())
