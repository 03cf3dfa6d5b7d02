"""Randomness that needs no state: each micro-step's generators are a pure function of where it stands in training."""

from __future__ import annotations

import torch

_MASK = (1 << 64) - 1


def seed_micro_step(seed: int, step: int, micro_index: int) -> None:
    """Seed torch's generators (CPU and CUDA) for one micro-batch.

    `micro_index` is the micro-batch's place in the *global* batch (a * world_size + rank for the rank's a-th), so while
    the micro-batch size is unchanged, dropout does not depend on the number of workers, and a resumed run draws the
    same masks as an uninterrupted one.
    """
    torch.manual_seed(mix(seed, step, micro_index))


def mix(*values: int) -> int:
    """A 63-bit hash of non-negative integers (splitmix64, applied to one after the other)."""
    state = 0
    for value in values:
        state = _splitmix64(state ^ (value & _MASK))
    return state >> 1


def _splitmix64(state: int) -> int:
    # Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators (2014), as in java.util.SplittableRandom.
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)
