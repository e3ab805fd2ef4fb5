"""From a batch of routed tokens to the launches around the products of experts. Imports triton, so calls import it."""

import torch
import triton

from requant_kernels.dense_sparse.triton.launch import OPTIONS, Routing
from requant_kernels.dense_sparse.triton.routing import activate_kernel, align_kernel, combine_kernel
from requant_kernels.dense_sparse.triton.table import Tile

COLUMNS = 1024  # of a program
COMPARED = 8192  # ids with numbers of experts, at a time


def routed_blocks(pairs: int, experts: int, tokens: int) -> int:
    """The most blocks of up to ``tokens`` pairs of one expert that there can be."""
    return min(pairs, (pairs + (tokens - 1) * min(pairs, experts)) // tokens)


def align(ids: torch.Tensor, experts: int, tile: Tile, pdl: bool) -> Routing:
    """ids [M, k] of ``experts``, contiguous; blocks that ``tile`` takes."""
    count, blocks = ids.numel(), routed_blocks(ids.numel(), experts, tile.tokens)
    pairs = ids.new_empty(blocks, tile.tokens, dtype=torch.int32)
    chosen = ids.new_empty(blocks, dtype=torch.int32)
    width = triton.next_power_of_2(experts)
    constants = {"EXPERTS": width, "TOKENS": tile.tokens, "CHUNK": max(16, COMPARED // width), "num_warps": 4}
    align_kernel[experts,](ids, pairs, chosen, count, blocks, **constants, **OPTIONS[pdl])
    return Routing(tile, pairs, chosen, count, ids.shape[1], experts)


def activate(h: torch.Tensor, pdl: bool) -> torch.Tensor:
    """h [P, 2 I] -> silu(gates) * ups [P, I]."""
    count, columns = h.shape[0], h.shape[1] // 2
    out = h.new_empty(count, columns)
    grid = (count, -(-columns // COLUMNS))
    activate_kernel[grid](h, out, columns, COLUMNS=COLUMNS, num_warps=4, **OPTIONS[pdl])
    return out


def combine(y: torch.Tensor, weights: torch.Tensor, pdl: bool) -> torch.Tensor:
    """y [M k, C], weights [M, k] -> [M, C]."""
    count, top = weights.shape
    out = y.new_empty(count, y.shape[1])
    grid = (count, -(-y.shape[1] // COLUMNS))
    combine_kernel[grid](y, weights, out, y.shape[1], TOP=top, COLUMNS=COLUMNS, num_warps=4, **OPTIONS[pdl])
    return out
