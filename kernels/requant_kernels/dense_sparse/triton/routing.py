# Triton's language, typed by its own compiler; the arguments of a kernel are positional.
# mypy: ignore-errors
# ruff: noqa: PLR0917
"""What stands around the products of routed experts: pairs of tokens and experts in blocks of one expert each, the
activation between the products, and the weighted sum over a token's experts. None of them asks the host."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["P", "blocks"])
def align_kernel(
    ids_ptr, pairs_ptr, chosen_ptr, P, blocks,
    EXPERTS: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """pairs int32 [blocks, TOKENS] and chosen int32 [blocks] of the experts ids [P]: the pairs of an expert in order,
    its last block filled up with P, expert after expert; chosen is -1 for blocks behind all of them.

    Grid (experts,): a program counts the pairs of all, and writes the blocks of its own. EXPERTS: a power of two.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    expert = tl.program_id(0)
    numbers = tl.arange(0, EXPERTS)
    counts = tl.zeros((EXPERTS,), tl.int32)
    for start in range(0, P, CHUNK):
        p = start + tl.arange(0, CHUNK)
        ids = tl.load(ids_ptr + p, mask=p < P, other=-1).to(tl.int32)
        counts += tl.sum((ids[:, None] == numbers[None, :]).to(tl.int32), 0)
    used = (counts + TOKENS - 1) // TOKENS
    before = tl.sum(tl.where(numbers < expert, used, 0), 0)
    mine = tl.sum(tl.where(numbers == expert, counts, 0), 0)
    end = before + (mine + TOKENS - 1) // TOKENS
    pairs_ptr += before * TOKENS
    seen = 0
    for start in range(0, P, CHUNK):
        p = start + tl.arange(0, CHUNK)
        hit = (tl.load(ids_ptr + p, mask=p < P, other=-1).to(tl.int32) == expert).to(tl.int32)
        tl.store(pairs_ptr + seen + tl.cumsum(hit, 0) - 1, p, mask=hit != 0)
        seen += tl.sum(hit, 0)
    empty = mine + tl.arange(0, TOKENS)
    tl.store(pairs_ptr + empty, tl.full((TOKENS,), 0, tl.int32) + P, mask=empty < (end - before) * TOKENS)
    for start in range(before, end, CHUNK):
        block = start + tl.arange(0, CHUNK)
        tl.store(chosen_ptr + block, tl.full((CHUNK,), 0, tl.int32) + expert, mask=block < end)
    if expert == tl.num_programs(0) - 1:
        for start in range(end, blocks, CHUNK):
            block = start + tl.arange(0, CHUNK)
            tl.store(chosen_ptr + block, tl.full((CHUNK,), -1, tl.int32), mask=block < blocks)


@triton.jit
def activate_kernel(h_ptr, out_ptr, N, COLUMNS: tl.constexpr, PDL: tl.constexpr):
    """out DT [P, N] = silu(gate) * up of h DT [P, 2 N], gates first. Grid (P, ceil(N / COLUMNS))."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    gate = tl.load(h_ptr + row * 2 * N + n, mask=n < N, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + row * 2 * N + N + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * N + n, (gate / (1.0 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def combine_kernel(y_ptr, weights_ptr, out_ptr, C, TOP: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr):
    """out DT [M, C]: each token's sum over its TOP rows of y DT [M * TOP, C] times weights fp32 [M, TOP], in fp32 and
    in their order. Grid (M, ceil(C / COLUMNS))."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    m = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for j in tl.static_range(TOP):
        y = tl.load(y_ptr + (m * TOP + j) * C + c, mask=c < C, other=0.0).to(tl.float32)
        total += y * tl.load(weights_ptr + m * TOP + j).to(tl.float32)
    tl.store(out_ptr + m * C + c, total.to(out_ptr.dtype.element_ty), mask=c < C)
