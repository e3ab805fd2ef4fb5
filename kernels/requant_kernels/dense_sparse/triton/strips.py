"""The dense part's runtime layout: codes in the order in which a warp's registers take them, steps beside them.

Strips. Rows are cut into strips of 16, columns into blocks of 256, both padded. A block of a strip is ``bits`` sets of
128 words: int32 [strips, blocks, bits, 128] in all, exactly ``bits`` bits a code. Column c of a block is plane c // 16,
column c % 16 = 8 kh + 2 t + half of it; row r of a strip is 8 rh + g. The code stands in word 16 g + 4 t + 2 kh + rh,
in its upper 16 bits where half = 1. Eight units of 32 columns make up a block, unit 2 i + j planes 4 i + j and, in the
upper bytes of halves, 4 i + j + 2. A set has the codes of 8 // bits of them, from the lowest bit of a byte up. With 3
bits half a block, i, has set 2 i to itself and shares set 1: unit 4 i is in bits 5-7 of set 2 i, 4 i + 1 in bits 2-4,
the upper bits of 4 i + 2 in bits 0-1; its last one is bit 4 i of set 1, and the next three are 4 i + 3.

Steps. int32 [blocks, words, rows], or one block where a step covers the row. A word holds the 16 bits of two
consecutive groups' steps, or, asymmetric, of a group's step and zero point: a step over ``unit``, a zero point times
``unit`` and negative. With a codebook: int32 [2**bits, rows], a level in both halves.
"""

from dataclasses import dataclass
from itertools import product

import torch

from requant_kernels.dense_sparse.planes import pack_planes, spread
from requant_kernels.errors import CheckpointError
from requant_kernels.packing import unpack
from requant_kernels.weight import DenseSparseWeight

STRIP = 16
BLOCK = 256
SET = 128
ROW_ALIGNMENT = 128  # the largest tile of rows, but for two stacks of it
SPARE_BLOCKS = 16  # kernels may copy, never use, as many blocks behind the last one
ROWS_AT_ONCE = 1024  # bounds the memory of a conversion


def padded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


@dataclass(frozen=True)
class Strips:
    """codes int32 [strips * blocks + SPARE_BLOCKS, bits, 128] and scales int32 as the module's docstring says."""

    codes: torch.Tensor
    scales: torch.Tensor
    strips: int
    blocks: int
    group: int  # columns a step covers within a block: 16, 32, 64, 128 or 256
    scale_step: int  # words from a block's steps to the next block's; 0 where one step covers the row

    @property
    def rows(self) -> int:
        return self.strips * STRIP


def unit(dtype: torch.dtype) -> float:
    """What one code weighs in the kernels' centred values (decode.py)."""
    return 2.0**-6 if dtype == torch.bfloat16 else 2.0**-9


def bits16(values: torch.Tensor) -> torch.Tensor:
    """bfloat16 or float16 -> int32 in [0, 65536): the same bits."""
    return values.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF


def upper_half(values: torch.Tensor) -> torch.Tensor:
    """bfloat16 or float16 -> int32: the same bits in its upper half, zero below."""
    return bits16(values) << 16


def pair_words(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Two 16-bit values a word: floats of two bytes [...] -> int32 [...]."""
    return bits16(low) | upper_half(high)


def _threes(planes: torch.Tensor) -> torch.Tensor:
    """Units int32 [8, 2, ..], their planes -> int32 [3, ..]."""
    words = torch.zeros(3, *planes.shape[2:], dtype=torch.int32, device=planes.device)
    for half, byte in product(range(2), range(2)):
        first, second, third, fourth = planes[4 * half : 4 * half + 4, byte]
        words[2 * half] |= (first << 5 | second << 2 | (third >> 1 & 0x00030003)) << (8 * byte)
        words[1] |= (fourth << 1 | (third & 0x00010001)) << (8 * byte + 4 * half)
    return words


def pack_strips(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [16 * strips, 256 * blocks] -> int32 [strips, blocks, bits, 128]."""
    strips, blocks = codes.shape[0] // STRIP, codes.shape[1] // BLOCK
    pairs = codes.contiguous().view(torch.int16).view(-1, 16, 8).transpose(0, 1).contiguous()
    units = pairs.view(4, 2, 2, *pairs.shape[1:]).transpose(1, 2).reshape(8, 2, *pairs.shape[1:])
    if bits == 3:
        words = _threes(spread(units))
    else:
        words = pack_planes(units.view(bits, 8 // bits, *units.shape[1:]).transpose(1, 2).reshape(pairs.shape), bits)
    # set, strip, rh, g, block, kh, t -> strip, block, set, g, t, kh, rh
    return words.view(bits, strips, 2, 8, blocks, 2, 4).permute(1, 4, 0, 3, 6, 5, 2).reshape(strips, blocks, bits, SET)


def _codes(weight: DenseSparseWeight, strips: int, blocks: int) -> torch.Tensor:
    bits = weight.scheme.weights.bits
    packed = torch.zeros(strips * blocks + SPARE_BLOCKS, bits, SET, dtype=torch.int32, device=weight.packed.device)
    by_strip = packed[: strips * blocks].view(strips, blocks, bits, SET)
    for start in range(0, weight.out_features, ROWS_AT_ONCE):
        codes = unpack(weight.packed[start : start + ROWS_AT_ONCE], bits, weight.in_features)
        rows = padded(codes.shape[0], STRIP)
        codes = torch.nn.functional.pad(codes, (0, blocks * BLOCK - codes.shape[1], 0, rows - codes.shape[0]))
        by_strip[start // STRIP : (start + rows) // STRIP] = pack_strips(codes, bits)
    return packed


def _scale_words(weight: DenseSparseWeight, rows: int, blocks: int, group: int, per_row: bool) -> torch.Tensor:
    """int32 [blocks, words, rows]; padded rows and groups step by zero."""
    dtype = weight.dtype
    assert weight.scale is not None
    groups = 1 if per_row else blocks * (BLOCK // group)

    def grid(values: torch.Tensor) -> torch.Tensor:  # [N, K/g] -> [groups, rows]
        return torch.nn.functional.pad(values.T, (0, rows - values.shape[0], 0, groups - values.shape[1]))

    steps = grid((weight.scale.float() / unit(dtype)).to(dtype))
    if not bool(steps.isfinite().all()):
        most = float(weight.scale.max())
        raise CheckpointError(f"weight_scale: {most:g} is too large for the kernels in {dtype}: use bfloat16")
    zero_points = weight.zero_points()
    if zero_points is not None:
        words = pair_words(steps, grid((-zero_points.float() * unit(dtype)).to(dtype)))
    elif group < BLOCK:
        words = pair_words(steps[0::2], steps[1::2])
    else:
        words = pair_words(steps, steps)
    return words.view(1 if per_row else blocks, -1, rows).contiguous()


def step_group(weight: DenseSparseWeight) -> int:
    """Columns that one step covers within a block (BLOCK where it covers the row)."""
    return BLOCK if weight.group_size == weight.in_features else weight.group_size


def build_strips(weight: DenseSparseWeight) -> Strips:
    """The dense part of ``weight``, whose dtype is bfloat16 or float16, on its device.

    Raises CheckpointError for a step of 128 or more in float16, which the kernels take 512 times."""
    rows = padded(weight.out_features, ROW_ALIGNMENT)
    strips, blocks = rows // STRIP, padded(weight.in_features, BLOCK) // BLOCK
    group, per_row = step_group(weight), weight.group_size == weight.in_features
    codes = _codes(weight, strips, blocks)
    if weight.codebook is not None:
        levels = torch.nn.functional.pad(weight.codebook.T, (0, rows - weight.out_features))
        return Strips(codes, pair_words(levels, levels), strips, blocks, BLOCK, 0)
    scales = _scale_words(weight, rows, blocks, group, per_row)
    return Strips(codes, scales, strips, blocks, group, 0 if per_row else scales.shape[1] * rows)
