"""The process of one rank of a trial. By itself: what this module imports, every rank's process waits for."""

from __future__ import annotations

from typing import Any


class RankProcess:
    """An actor in a trial's placement group; rank 0's is the one that Tune starts."""

    def run(self, config: dict[str, Any], rank: int, local_rank: int) -> None:
        from workers.rank_main import rank_process_main

        rank_process_main(config, rank, local_rank)
