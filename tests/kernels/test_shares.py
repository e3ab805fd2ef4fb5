# ruff: noqa: PLR0917 (the arguments of a kernel are positional)
"""Programs that wait for each other's shares, as the compiler makes them, on the emulator."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="the package triton is not installed")
import triton.language as tl  # noqa: E402
from requant_kernels.shares import added_up, await_all, leave  # noqa: E402

from tests.emulator.driver import emulated  # noqa: E402
from tests.emulator.machine import RESIDENT  # noqa: E402
from tests.emulator.memory import Fault  # noqa: E402

SIZE = 256


@triton.jit
def sum_kernel(shares_ptr, arrived_ptr, out_ptr, expected, SIZE: tl.constexpr, WAITS: tl.constexpr):
    """Share s of tile t is s + t; every program of a tile writes the tile's sum."""
    split, splits, tile = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    at = tl.arange(0, SIZE)
    shares = shares_ptr + tile * splits * SIZE + at
    tl.store(shares + split * SIZE, (at * 0 + split + tile).to(tl.float32))
    if WAITS:
        await_all(arrived_ptr + tile, expected)
    live = tl.full((SIZE,), True, tl.int1)
    total = added_up(shares[:, None], SIZE, splits, live[:, None], 4)
    tl.store((out_ptr + (tile * splits + split) * SIZE + at)[:, None], total)
    leave(arrived_ptr + tile, splits)


def sums(splits: int, tiles: int, missing: int = 0, waits: bool = True, order: int = 0) -> torch.Tensor:
    shares, out = torch.full((2, tiles, splits, SIZE), torch.nan)
    arrived = torch.zeros(tiles, dtype=torch.int32)
    with emulated(90, order=order):
        for _ in range(2):  # the counters are as they were
            sum_kernel[splits, tiles](shares, arrived, out, splits + missing, SIZE, waits, enable_fp_fusion=True)
            if waits:
                assert not arrived.any()
    return out


@pytest.mark.parametrize("splits", [1, 2, 5, RESIDENT])
@pytest.mark.parametrize("order", range(3))
def test_all_programs_of_a_tile_add_up_all_shares(splits: int, order: int) -> None:
    tiles = 3
    expected = splits * (splits - 1) / 2 + splits * torch.arange(tiles)
    assert torch.equal(sums(splits, tiles, order=order), expected[:, None, None].expand(tiles, splits, SIZE))


def test_who_does_not_wait_reads_too_early() -> None:
    with pytest.raises(Fault, match=r"another warp may .* at the same time"):
        sums(4, 1, waits=False)


def test_a_share_that_never_comes_is_waited_for_without_end() -> None:
    with pytest.raises(Fault, match="all programs that run wait for others"):
        sums(4, 2, missing=1)


def test_more_programs_than_run_at_the_same_time_must_not_wait_for_each_other() -> None:
    with pytest.raises(Fault, match="all programs that run wait for others"):
        sums(RESIDENT + 1, 1)
