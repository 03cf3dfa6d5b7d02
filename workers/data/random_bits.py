"""Counter-based random bits: each value is a pure function of the words it is asked for, in any order, on any rank.

The mixing function is the finaliser of SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number
Generators", OOPSLA 2014, section 3), applied once per word. It is spelled out here, and not left to a library's
generator, because its output decides the order and the augmentation of training samples: a job resumed under another
version of NumPy must see the same ones. Changing a constant here breaks every resume.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)


class Stream(IntEnum):
    """The first word of every use, so that no two uses share random bits."""

    ORDER = 1
    FLIP = 2
    CROP = 3
    HOLDOUT = 4
    SUBSET = 5
    SYNTHETIC = 6
    MIX = 7
    DISTORT = 8
    ERASE = 9


def as_words(values: Any) -> Bits:
    """Non-negative integers as an array of at least one dimension (array arithmetic wraps silently, scalars warn)."""
    return np.atleast_1d(np.asarray(values)).astype(np.uint64)


def mix(words: Bits) -> Bits:
    """One step of SplitMix64: a bijection of 64-bit words that changes each output bit with probability 1/2."""
    z = words + _GAMMA
    z ^= z >> _S30
    z *= _MIX_1
    z ^= z >> _S27
    z *= _MIX_2
    z ^= z >> _S31
    return z


def random_bits(stream: Stream, *words: Any) -> Bits:
    """64 random bits for each combination of `words` (non-negative integers or arrays of them, broadcast)."""
    bits = mix(as_words(int(stream)))
    for word in words:
        bits = mix(bits ^ as_words(word))
    return bits


def uniforms(stream: Stream, *words: Any) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) with 53 random bits, for each combination of `words`."""
    return (random_bits(stream, *words) >> _S11).astype(np.float64) * 2.0**-53
