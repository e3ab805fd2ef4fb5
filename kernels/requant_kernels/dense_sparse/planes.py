"""Codes in the order in which a GPU's and a CPU's kernels cut them out of words: two at a time, one in each half."""

import torch

PLANES = 16  # pairs of codes, 32 codes of a row


def spread(pairs: torch.Tensor) -> torch.Tensor:
    """int16, two uint8 codes each -> int32, one in each half."""
    both = pairs.to(torch.int32)
    return both & 0xFF | (both & 0xFF00) << 8


def pack_planes(pairs: torch.Tensor, bits: int) -> torch.Tensor:
    """int16 [16, ...], two uint8 codes each -> int32 [bits, ...].

    A half of a word takes the codes of 16 // bits planes from the lowest bit up, then the next word follows. With 3
    bits five planes fill 15 bits, and bit i of plane 15 is the highest of word i's halves.
    """
    planes = spread(pairs)
    words = torch.zeros(bits, *planes.shape[1:], dtype=torch.int32, device=planes.device)
    per_half = PLANES // bits
    for plane in range(bits * per_half):
        words[plane // per_half] |= planes[plane] << (plane % per_half * bits)
    if bits == 3:
        for bit in range(bits):
            words[bit] |= (planes[15] >> bit & 0x00010001) << 15
    return words
