"""The kernels against float64: interpreted everywhere, and the same grid on a GPU where there is one."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from tests.kernels.triton.cases import FEW, MIDDLE, ONE, Case, check

SPLIT = 64  # programs: enough to split the columns of every case
FOUR_STRIPS = replace(ONE, strips=4, k_warps=2)
ONE_GROUP = replace(ONE, strips=8, k_warps=1)  # of warps, each with a strip of its own
WIDE = replace(MIDDLE, columns=256)  # a product
HALVES = replace(MIDDLE, span=128, bits=(2, 4, 8))  # of a block at a time
GRID = {
    "one token, W4 g128": Case(1, 40, 384, 4, 128, tile=FOUR_STRIPS),
    "one token, W3 per row": Case(1, 33, 300, 3, tile=ONE, dtype=torch.float16),
    "one token, W2 g32 asymmetric, split": Case(
        1, 20, 544, 2, 32, symmetric=False, tile=replace(FOUR_STRIPS, programs=SPLIT)
    ),
    "one token, W8 g64 float16": Case(1, 17, 320, 8, 64, dtype=torch.float16, tile=ONE),
    "one token, W8 g32 asymmetric": Case(1, 150, 288, 8, 32, symmetric=False, tile=ONE_GROUP, dtype=torch.float16),
    "one token, W4 codebook": Case(1, 16, 256, 4, codebook=True, sparse=0.005, tile=ONE),
    "one token, dense only": Case(1, 1, 32, 4, sparse="none", tile=ONE),
    "one token, one entry": Case(1, 50, 32, 2, sparse="one", tile=ONE),
    "one token, sparse 5 %, no bias": Case(1, 64, 96, 4, 32, sparse=0.05, bias=False, tile=ONE_GROUP),
    "one token, 20 %, split": Case(1, 33, 1100, 2, sparse=0.2, tile=replace(ONE, programs=SPLIT)),
    "one token, crowded strip": Case(1, 48, 600, 2, sparse="strip", tile=ONE_GROUP),
    "one token, crowded strip, split": Case(1, 40, 1100, 2, sparse="strip", tile=replace(ONE_GROUP, programs=SPLIT)),
    "one token, row full": Case(1, 40, 1100, 3, sparse="row", tile=replace(ONE, programs=SPLIT)),
    "one token, uneven rows": Case(1, 200, 640, 4, 64, sparse="uneven", tile=ONE),
    "one token, columns beyond 65536": Case(1, 20, 66_000, 4, sparse=0.001, tile=ONE),
    "one token, several strips": Case(1, 40, 640, 4, 128, tile=FOUR_STRIPS),
    "one token, columns among 8 groups": Case(1, 40, 2048, 2, 32, symmetric=False, tile=replace(ONE, programs=8)),
    "few W4 g128": Case(3, 40, 384, 4, 128),
    "few W2 g32 asymmetric, split": Case(5, 20, 544, 2, 32, symmetric=False, tile=replace(FEW, programs=SPLIT)),
    "few W3 g256 asymmetric": Case(2, 16, 512, 3, 256, symmetric=False),
    "few W8 g64 float16": Case(16, 17, 320, 8, 64, dtype=torch.float16),
    "few W8 per row asymmetric": Case(4, 128, 256, 8, symmetric=False),
    "few W2 codebook float16": Case(3, 130, 70, 2, codebook=True, dtype=torch.float16),
    "few W3 codebook, split": Case(2, 200, 600, 3, codebook=True, tile=replace(MIDDLE, programs=SPLIT)),
    "few W4 refined to g16, row full": Case(2, 40, 272, 4, 64, cut=48, sparse="row"),
    "few 20 %": Case(16, 40, 600, 4, sparse=0.2),
    "few columns beyond 65536": Case(2, 20, 66_000, 4, sparse=0.001),
    "middle W4 g128": Case(40, 150, 384, 4, 128, tile=MIDDLE),
    "middle W3 g32 asymmetric, split": Case(17, 16, 544, 3, 32, symmetric=False, tile=replace(MIDDLE, programs=SPLIT)),
    "middle W8 per row float16": Case(33, 20, 300, 8, tile=MIDDLE, dtype=torch.float16),
    "middle W2 codebook": Case(20, 100, 256, 2, codebook=True),
    "middle crowded strip": Case(18, 48, 800, 4, sparse="strip", tile=MIDDLE),
    "middle 0.5 %, whole blocks, split": Case(70, 40, 1024, 4, sparse=0.005, tile=replace(MIDDLE, programs=SPLIT)),
    "middle 20 %, split": Case(33, 40, 1100, 4, sparse=0.2, tile=replace(MIDDLE, programs=SPLIT)),
    "middle row full, split": Case(20, 40, 1100, 3, sparse="row", tile=replace(MIDDLE, strips=4, programs=SPLIT)),
    "middle wide W3 g32 asymmetric float16": Case(
        140, 40, 608, 3, 32, symmetric=False, sparse=0.01, dtype=torch.float16, tile=replace(WIDE, tokens=128)
    ),
    "middle wide W2 g16 asymmetric, split": Case(
        20, 40, 464, 2, 64, symmetric=False, cut=48, tile=replace(WIDE, strips=4, programs=SPLIT)
    ),
    "middle uneven rows, split": Case(20, 200, 800, 4, sparse="uneven", tile=replace(WIDE, programs=SPLIT)),
    "middle wide 10 %": Case(40, 150, 512, 4, 128, sparse=0.1, tile=WIDE),
    "middle, half blocks, W4 g128, split": Case(40, 150, 640, 4, 128, tile=replace(HALVES, programs=SPLIT)),
    "middle, half blocks, W2 g32 asymmetric": Case(
        20, 40, 416, 2, 32, symmetric=False, sparse="uneven", tile=replace(HALVES, strips=4)
    ),
    "middle, half blocks, W3 g128, split": Case(40, 150, 640, 3, 128, tile=replace(HALVES, programs=SPLIT)),
    "middle, half blocks, W3 g16 asymmetric": Case(
        20, 40, 400, 3, 32, symmetric=False, cut=16, sparse="uneven", tile=replace(HALVES, strips=4)
    ),
    "middle, half blocks, W8 g64 float16": Case(33, 20, 320, 8, 64, tile=HALVES, dtype=torch.float16),
    "middle, half blocks, W4 per row": Case(20, 40, 300, 4, tile=HALVES),
    "middle, two stacks, split": Case(
        140, 150, 384, 4, 64, symmetric=False, tile=replace(HALVES, tokens=128, strips=16, programs=SPLIT)
    ),
    "middle, one stack where rows are few": Case(20, 300, 384, 2, tile=replace(HALVES, strips=16)),
    "middle, half blocks, 256 tokens": Case(200, 40, 384, 4, 128, tile=replace(HALVES, tokens=256)),
    "middle dense only": Case(30, 20, 64, 4, sparse="none", bias=False, tile=MIDDLE),
    "middle one token": Case(1, 20, 64, 4, 32, tile=MIDDLE),
    "one token, steps of zero": Case(1, 40, 640, 4, 64, zero_steps=True, tile=ONE),
    "few, steps of zero": Case(5, 40, 640, 4, 128, zero_steps=True),
    "middle, steps of zero, W3 float16": Case(20, 40, 640, 3, 64, zero_steps=True, dtype=torch.float16, tile=MIDDLE),
    "many, steps of zero": Case(20, 40, 640, 2, 64, zero_steps=True, tile=None),
    "many W4 g128": Case(300, 200, 384, 4, 128, tile=None),
    "many W3 g16 asymmetric, no bias": Case(20, 40, 272, 3, 64, symmetric=False, cut=48, bias=False, tile=None),
    "many W4 codebook, row full": Case(33, 20, 4200, 4, codebook=True, sparse="row", tile=None),
    "many uneven rows": Case(20, 200, 600, 4, sparse="uneven", tile=None),
    "many W8 dense only": Case(5, 130, 100, 8, sparse="none", dtype=torch.float16, tile=None),
}


@pytest.mark.parametrize("case", GRID.values(), ids=GRID.keys())
def test_interpreted(interpreted, case):
    interpreted(check, case)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small cases of every regime, scheme, dtype, tail and sparsity."""
    codebook = draw(st.booleans())
    group = -1 if codebook else draw(st.sampled_from((-1, 32, 64, 128, 256)))
    refined = draw(st.sampled_from((0, 16))) if group != -1 else 0
    columns = draw(
        st.one_of(st.integers(1, 400), st.just(512)) if group == -1 else st.integers(1, 4).map(group.__mul__)
    )
    bits = draw(st.sampled_from((2, 3, 4) if codebook else (2, 3, 4, 8)))
    tile = draw(st.sampled_from((ONE, ONE_GROUP, FEW, MIDDLE, WIDE, HALVES, None)))
    programs = draw(st.sampled_from((1, SPLIT)))
    return Case(
        tokens=draw(st.integers(1, min(tile.up_to, 70) if tile else 70)),
        rows=draw(st.integers(1, 150)),
        columns=columns - refined,
        bits=bits,
        group=group,
        symmetric=codebook or draw(st.booleans()),
        codebook=codebook,
        cut=refined,
        dtype=draw(st.sampled_from((torch.bfloat16, torch.float16))),
        sparse=draw(st.sampled_from((0.0, 0.005, 0.05, 1.0, "none", "one", "row", "uneven"))),
        bias=draw(st.booleans()),
        tile=tile and replace(tile, programs=programs),
    )


@given(case=cases())
@settings(max_examples=25)
def test_any_case_interpreted(interpreted, case):
    interpreted(check, case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GRID.values(), ids=GRID.keys())
def test_on_a_gpu(poisoned, case):
    check(case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("part", range(16))  # side by side: nearly every case compiles kernels of its own
def test_any_case_on_a_gpu(part):
    @seed(part)
    @given(case=cases())
    @settings(max_examples=13, derandomize=False, database=None)
    def holds(case: Case) -> None:
        check(case, "cuda")

    holds()
