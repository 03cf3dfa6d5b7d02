"""Bytes that each rank sends per step at ZeRO stages 0 to 3, counted at torch.distributed, against theory.

Theory, in units of the weights P times (n - 1) / n for n ranks: 2 at stages 0 to 2, 3 at stage 3. Counted is what
bandwidth-optimal collectives send for what is asked of them (tests/workers/traffic.py). These are no timings: one
repetition says it.
"""

from __future__ import annotations

import sys
import tempfile

from tests.benchmarks.harness import Row, arguments, progress, report
from tests.ranks import run_ranks
from tests.workers.traffic import StepTraffic, step_traffic
from workers.distributed import Ranks

THEORY = {0: 2, 1: 2, 2: 2, 3: 3}
GLOBAL_BATCH = 12


def measure(ranks: Ranks, folder: str) -> list[StepTraffic]:
    micro_batch_size = GLOBAL_BATCH // ranks.world_size
    return [step_traffic(ranks, stage, micro_batch_size, f"{folder}/{stage}") for stage in THEORY]


def main(argv: list[str]) -> int:
    given = arguments(__doc__ or "", repetitions=1).parse_args(argv)
    rows, notes = [], {}
    for world_size in (2, 3):
        with tempfile.TemporaryDirectory(prefix="pw-bench-") as folder:
            measured: list[StepTraffic] = run_ranks(world_size, measure, folder)[0]
        for (stage, theory), traffic in zip(THEORY.items(), measured, strict=True):
            name = f"ZeRO {stage}, {world_size} ranks"
            expected = 4 * traffic.num_weights * theory * (world_size - 1) / world_size
            rows.append(
                Row(name, "bytes/step", [sum(traffic.sent.values())], f"theory, {name}", ("at most", 1.02)),
            )
            rows.append(Row(f"theory, {name}", "bytes/step", [expected]))
            notes[name] = traffic.sent
            progress(f"{name}: {traffic.weights_sent:.3f} P")
    report("comm_bytes", "Bytes sent per step and rank", rows, given.out, notes)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
