"""Codes <-> packed words, exactly ``bits`` bits a code (docs/FORMAT.md, "Bit order").

A row of codes is one little-endian bit stream: code k occupies stream bits [k*b, (k+1)*b), lowest bit first,
and stream bit j is bit j % 32 of word j // 32. A code may straddle two words (3 bit); unused high bits of the
last word are zero.
"""

import math

import torch

WORD = 32


def packed_length(length: int, bits: int) -> int:
    """Words that hold ``length`` codes."""
    return -(-length * bits // WORD)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [..., L] of any integer dtype, each in [0, 2**bits) -> int32 [..., ceil(L*bits/32)].

    Raises ValueError for a code out of range.
    """
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise ValueError(f"codes reach from {int(codes.min())} to {int(codes.max())}: not {bits} bit")
    *lead, length = codes.shape
    padded = torch.nn.functional.pad(codes.to(torch.int32), (0, -length % WORD))
    # 32 codes fill exactly `bits` words, so the pattern of shifts repeats every block.
    blocks = padded.view(*lead, -1, WORD)
    words = torch.zeros(*lead, blocks.shape[-2], bits, dtype=torch.int64, device=codes.device)
    for k in range(WORD):
        word, shift = divmod(k * bits, WORD)
        code = blocks[..., k].to(torch.int64)
        words[..., word] |= (code << shift) & 0xFFFFFFFF
        if shift + bits > WORD:
            words[..., word + 1] |= code >> (WORD - shift)
    # int64 in [0, 2**32) -> the int32 of the same bit pattern
    words = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return words.to(torch.int32).flatten(-2)[..., : packed_length(length, bits)].contiguous()


def unpack(packed: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """int32 [..., W] -> uint8 codes [..., length]. Raises ValueError where W words do not hold them."""
    if packed.shape[-1] != packed_length(length, bits):
        raise ValueError(f"{packed.shape[-1]} words do not hold {length} codes of {bits} bit")
    # As many bytes as hold a whole number of codes, all of whose n-th codes are cut out at once.
    together = math.lcm(8, bits) // 8
    data = packed.contiguous().view(torch.uint8)
    if together > 1:
        data = torch.nn.functional.pad(data, (0, -data.shape[-1] % together))
        data = data.view(*data.shape[:-1], data.shape[-1] // together, together)
        wide = torch.int32 if together < 4 else torch.int64
        data = torch.nn.functional.pad(data, (0, wide.itemsize - together)).view(wide).squeeze(-1)
    codes = [(data >> shift) & ((1 << bits) - 1) for shift in range(0, 8 * together, bits)]
    return torch.stack([code.to(torch.uint8) for code in codes], -1).flatten(-2)[..., :length].contiguous()


def spare_bits(packed: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """int32 [..., W] that holds ``length`` codes, at least one -> int64 [...]: what the last word has above them."""
    used = length * bits - (packed.shape[-1] - 1) * WORD
    return (packed[..., -1].to(torch.int64) & 0xFFFFFFFF) >> used


def take_range(packed: torch.Tensor, bits: int, start: int, stop: int) -> torch.Tensor:
    """The codes [start, stop) of int32 [..., W] -> int32 [..., ceil((stop-start)*bits/32)].

    Whole words are copied where both ends are borders of words, which every 32nd code is; else all are packed anew.
    """
    if start * bits % WORD == 0 and stop * bits % WORD == 0:
        return packed[..., start * bits // WORD : stop * bits // WORD].contiguous()
    codes = unpack(packed, bits, packed.shape[-1] * WORD // bits)
    return pack(codes[..., start:stop], bits)
