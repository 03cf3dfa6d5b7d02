"""What the residual networks of `vit/resnet.py` cost: parameters, multiply-accumulates, saved activations.

Under bf16 autocast convolutions read and write bfloat16; group norms, ReLUs and the residual stream are fp32, so that a
convolution's input is kept as a bfloat16 copy beside them. In fp32 it is the ReLU's own output, except where uneven
padding copies it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

EXPANSION = 4
FP32 = 4
BF16 = 2
INDEX = 8
"""Bytes of an index that pooling keeps."""
NORM_STATISTICS = 2 * 32 * FP32
"""Mean and 1/std of each of 32 groups."""


@dataclass(frozen=True)
class Conv:
    """One convolution: channels, side of its kernel, and rows and columns of what it gives."""

    in_channels: int
    out_channels: int
    kernel: int
    rows: int
    columns: int

    stride: int = 1

    @property
    def weights(self) -> int:
        return self.in_channels * self.out_channels * self.kernel**2

    @property
    def outputs(self) -> int:
        """Elements of what it gives."""
        return self.out_channels * self.rows * self.columns

    @property
    def macs(self) -> int:
        return self.weights * self.rows * self.columns


@dataclass(frozen=True)
class Backbone:
    """Stages of a ResNet on an image of `image_hw` pixels; `preact` as in BiT, otherwise as in the hybrids."""

    layers: tuple[int, ...]
    width: int
    in_channels: int
    image_hw: tuple[int, int]
    preact: bool = False

    @property
    def num_features(self) -> int:
        """Channels of the feature map."""
        return self.width * EXPANSION * 2 ** (len(self.layers) - 1) if self.layers else self.width

    @property
    def feature_hw(self) -> tuple[int, int]:
        """Rows and columns of the feature map; each stride of 2 rounds up."""
        rows, columns = self._stem_hw()
        for _ in self.layers[1:]:
            rows, columns = _halved(rows, columns)
        return rows, columns

    def convolutions(self) -> Iterator[Conv]:
        """All of them, in order."""
        yield Conv(self.in_channels, self.width, 7, *_halved(*self.image_hw), stride=2)
        for _, convs in self.blocks():
            yield from convs

    def blocks(self) -> Iterator[tuple[bool, list[Conv]]]:
        """Each bottleneck: whether its shortcut is a convolution (then the last), and its convolutions."""
        rows, columns = self._stem_hw()
        channels = self.width
        for index, depth in enumerate(self.layers):
            width = self.width * 2**index
            for block in range(depth):
                before = rows, columns
                strided = index > 0 and block == 0
                if strided:
                    rows, columns = _halved(rows, columns)
                convs = [
                    Conv(channels, width, 1, *before),
                    Conv(width, width, 3, rows, columns, stride=2 if strided else 1),
                    Conv(width, width * EXPANSION, 1, rows, columns),
                ]
                projected = strided or channels != width * EXPANSION
                if projected:
                    convs.append(Conv(channels, width * EXPANSION, 1, rows, columns))
                yield projected, convs
                channels = width * EXPANSION

    @property
    def num_parameters(self) -> int:
        """Exact: kernels, and a scale and a bias per channel of each group norm (the norm after the last stage of a
        pre-activation network is its head's)."""
        kernels = sum(conv.weights for conv in self.convolutions())
        norms = 0 if self.preact else 2 * self.width
        for _, convs in self.blocks():
            # Before each of the three convolutions, or after every one.
            norms += 2 * sum(c.in_channels if self.preact else c.out_channels for c in convs[: 3 if self.preact else 4])
        return kernels + norms

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image's forward pass. Standardising the kernels is not counted: it costs the
        same for one image and for a thousand."""
        return sum(conv.macs for conv in self.convolutions())

    # -- what autograd keeps -------------------------------------------------------------------------------------------
    def saved_bytes(self, is_bf16: bool) -> int:
        """Of one image. A post-activation network's fp32 feature map is included, because its last ReLU keeps it. Tests
        compare this with what autograd keeps on the CPU."""
        return self._saved_by_stem(is_bf16) + sum(self._saved_by_blocks(is_bf16))

    def checkpointed_bytes(self, is_bf16: bool) -> int:
        """Of one image where blocks are recomputed: the stem's, every block's input in fp32, the feature map, and the
        largest block whole while it is recomputed."""
        inputs = self._pooled + sum(convs[2].outputs for _, convs in self.blocks())
        return self._saved_by_stem(is_bf16) + FP32 * inputs + self.largest_block_bytes(is_bf16)

    def largest_block_bytes(self, is_bf16: bool) -> int:
        """Of one image: what the backward pass of a block needs beside all that is kept, at most."""
        return max(self._saved_by_blocks(is_bf16), default=0)

    def kernel_copy_bytes(self, is_bf16: bool) -> int:
        """Independent of the batch: each kernel less its mean, and the standardised kernel as it is convolved with."""
        return sum(conv.weights for conv in self.convolutions()) * (FP32 + (BF16 if is_bf16 else FP32))

    @property
    def _pooled(self) -> int:
        rows, columns = self._stem_hw()
        return self.width * rows * columns

    def _saved_by_stem(self, is_bf16: bool) -> int:
        element = BF16 if is_bf16 else FP32
        rows, columns = _halved(*self.image_hw)
        channels, indices = self.width, INDEX * self._pooled
        if self.preact:
            image = element * self.in_channels * self.image_hw[0] * self.image_hw[1]
            return image + element * channels * (rows + 2) * (columns + 2) + indices
        image = element * self.in_channels * _padded(*self.image_hw, 7, 2)
        normalised = NORM_STATISTICS + 2 * FP32 * channels * rows * columns
        copied = _padded(rows, columns, 3, 2)
        pooled = FP32 * channels * copied if copied != rows * columns else 0
        return image + normalised + pooled + indices + (0 if is_bf16 else FP32 * self._pooled)

    def _saved_by_blocks(self, is_bf16: bool) -> Iterator[int]:
        for projected, convs in self.blocks():
            yield self._saved_by_block(projected, convs, is_bf16)

    def _saved_by_block(self, projected: bool, convs: list[Conv], is_bf16: bool) -> int:
        first, second, third = convs[:3]
        given = first.in_channels * first.rows * first.columns
        total = 3 * NORM_STATISTICS
        # Inputs of group norms and outputs of ReLUs; a post-activation block's last are as wide as what it gives.
        total += 2 * FP32 * (first.outputs + second.outputs + (given if self.preact else third.outputs))
        if projected and not self.preact:
            total += NORM_STATISTICS + FP32 * third.outputs
        padded = first.rows * first.columns
        if not self.preact:
            padded = _padded(first.rows, first.columns, 3, second.stride)
        copied = second.in_channels * padded
        if is_bf16:
            return total + BF16 * (
                given * (2 if projected else 1) + copied + third.in_channels * third.rows * third.columns
            )
        return total + (FP32 * copied if padded != first.rows * first.columns else 0)

    def _stem_hw(self) -> tuple[int, int]:
        return _halved(*_halved(*self.image_hw))


def _halved(rows: int, columns: int) -> tuple[int, int]:
    return -(-rows // 2), -(-columns // 2)


def _padded(rows: int, columns: int, kernel: int, stride: int) -> int:
    """Pixels after the padding that `vit.resnet.padded` copies: none where both sides get the same."""
    missing = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in (rows, columns)]
    if missing[0] % 2 == missing[1] % 2 == 0:
        return rows * columns
    return (rows + missing[0]) * (columns + missing[1])
