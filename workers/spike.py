"""Loss spikes: whether the loss, as it is logged, has left where it was, and back to which step that is undone.

Pure: every rank sees the same mean losses and decides alike. A spike is `patience` losses in a row above `factor` times
the median of the last `window` calm ones. What follows is the control plane's: the next attempt continues from a
checkpoint before the spike and passes over the data since (PaLM, section 5.1: "restarted training from a checkpoint
roughly 100 steps before the spike started, and skipped roughly 200-500 data batches").
"""

from __future__ import annotations

import math
import statistics

from configs.train import SpikeRollback
from configs.wire import LossWatch


def watch_loss(watch: LossWatch, step: int, loss: float, options: SpikeRollback) -> LossWatch:
    """The watch after the loss logged at `step`. Before it has seen `window` losses only a non-finite one is high."""
    is_full = len(watch.calm) == options.window
    is_high = not math.isfinite(loss) or (is_full and loss > options.factor * statistics.median(watch.calm))
    if is_high:
        return watch.model_copy(update={"num_high": watch.num_high + 1})
    return LossWatch(calm=(*watch.calm, loss)[-options.window :], calm_step=step)


def is_spike(watch: LossWatch, options: SpikeRollback) -> bool:
    """Whether enough losses in a row were high."""
    return watch.num_high >= options.patience


def sound_step(watch: LossWatch) -> int:
    """The last step whose weights are known to have had a calm loss: that logged at step s is of the weights before
    its update."""
    return max(watch.calm_step - 1, 0)


def describe_spike(watch: LossWatch, loss: float, options: SpikeRollback) -> str:
    """What happened, for people."""
    if not watch.calm:
        return f"the loss is {loss:.4g}, and was never finite"
    calm = f"{statistics.median(watch.calm):.4g} it was around step {watch.calm_step}"
    if not math.isfinite(loss):
        return f"the loss is {loss:.4g}, after the {calm}"
    return f"the loss is {loss:.4g}, more than {options.factor:g} times the {calm}"
