"""The order of training samples: a pure function of the seed, with one integer as its whole state.

Positions count the infinite concatenation of epochs. Epoch e holds positions [e*n, (e+1)*n) and visits each of the n
samples once, in its own order. Global batch k is positions [k*B, (k+1)*B), whatever the number of ranks.

The order of an epoch is a keyed permutation of 0..n-1 computed element by element, so a job resumed at position
10**9 pays nothing and no epoch boundary stalls for a shuffle of 14 million numbers. It is a Feistel network over the
mixed-radix pair (i mod a, i div a) with a*b just above n; results outside 0..n-1 are walked on until they fall
inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, methods 2 and 3).
This algorithm never changes: resumed jobs depend on it.
"""

from __future__ import annotations

from math import isqrt

import numpy as np
from numpy.typing import NDArray

from workers.data.random_bits import Bits, Stream, as_words, mix, random_bits

Indices = NDArray[np.int64]

_ROUNDS = 4
_ROUND_KEY = 0xD1342543DE82EF95
_ONE = np.uint64(1)


def epoch_of(position: int, num_examples: int) -> int:
    """The epoch, from 0, that `position` falls in."""
    return position // num_examples


def sample_at(seed: int, num_examples: int, position: int) -> int:
    """The sample index, 0..num_examples-1, at `position`."""
    return int(batch_indices(seed, num_examples, position, 1)[0])


def batch_indices(seed: int, num_examples: int, start: int, count: int) -> Indices:
    """The sample indices at positions start..start+count-1, int64 (count,). The range may span epochs."""
    return indices_at(seed, num_examples, np.arange(start, start + count, dtype=np.int64))


def indices_at(seed: int, num_examples: int, positions: Indices) -> Indices:
    """The sample index at each of `positions`, int64."""
    epochs, offsets = np.divmod(positions, num_examples)
    key = random_bits(Stream.ORDER, seed, num_examples, epochs)
    return _permute(offsets.astype(np.uint64), num_examples, key).astype(np.int64)


REPEAT_BLOCK = 64
"""Images whose repeated views lie together."""


def repeated_at(seed: int, num_examples: int, positions: Indices, repeats: int) -> tuple[Indices, Indices]:
    """The sample index at each of `positions` when each image is seen `repeats` times in a row of blocks, and the
    occurrence: a number that is different for each time an image is seen, the epoch if `repeats` is 1.

    Repeated augmentation (Hoffer et al., arXiv 1901.09335): an epoch still has `num_examples` positions, so it visits
    1/repeats of the images. The views of 64 images fill one block of 64 * repeats positions, in which view v pairs
    each even place with another neighbour than the other views do: mixup never mixes an image with itself.
    """
    epochs, offsets = np.divmod(positions, num_examples)
    if repeats == 1:
        return indices_at(seed, num_examples, positions), epochs
    blocks, places = np.divmod(offsets, REPEAT_BLOCK * repeats)
    views, slots = np.divmod(places, REPEAT_BLOCK)
    slots = np.where(slots % 2 == 1, (slots + 2 * views) % REPEAT_BLOCK, slots)
    # Of the last block only a part may be left, and a tiny set has fewer images than a block: go round.
    images = (blocks * REPEAT_BLOCK + slots) % num_examples
    return indices_at(seed, num_examples, epochs * num_examples + images), epochs * repeats + views


def _permute(values: Bits, n: int, key: Bits) -> Bits:
    """The image of each of `values` under the permutation of 0..n-1 that its key names."""
    out = _feistel(values, n, key)
    outside = np.flatnonzero(out >= n)
    while outside.size:
        out[outside] = _feistel(out[outside], n, key[outside])
        outside = outside[out[outside] >= n]
    return out


def _feistel(values: Bits, n: int, key: Bits) -> Bits:
    """A permutation of 0..a*b-1 with n <= a*b < n + a."""
    a = isqrt(n - 1) + 1
    b = -(-n // a)
    radix_a, radix_b = as_words(a), as_words(b)
    high, low = np.divmod(values, radix_a)
    for round_ in range(_ROUNDS):
        # The shift by one keeps the sum below 2**64: a wrapped sum would not be a rotation, so not a bijection.
        low = (low + (mix(high ^ _round_key(key, 2 * round_)) >> _ONE)) % radix_a
        high = (high + (mix(low ^ _round_key(key, 2 * round_ + 1)) >> _ONE)) % radix_b
    return high * radix_a + low


def _round_key(key: Bits, half_round: int) -> Bits:
    return key + np.uint64((half_round * _ROUND_KEY) % 2**64)
