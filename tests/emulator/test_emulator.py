# ruff: noqa: PLR0917 (the arguments of a kernel are positional)
"""The emulator against torch, on small kernels of its own; and that it faults where a GPU might."""

import re
from textwrap import dedent

import pytest
import torch

triton = pytest.importorskip("triton", reason="the package triton is not installed")
import triton.language as tl  # noqa: E402
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait  # noqa: E402

from tests.emulator.driver import emulated  # noqa: E402
from tests.emulator.machine import Code, Launch  # noqa: E402
from tests.emulator.memory import Fault, Global  # noqa: E402
from tests.emulator.ptx import parse  # noqa: E402

CAPABILITIES = (80, 90)  # mma and wgmma
FUSION = {"enable_fp_fusion": True}


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, count, SIZE: tl.constexpr, MASKED: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    live = (at < count) | (not MASKED)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=live) + tl.load(y_ptr + at, mask=live), mask=live)


@triton.jit
def product_kernel(
    a_ptr, b_ptr, out_ptr, K, M: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr, TRANSPOSED: tl.constexpr
):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, STEP)
    total = tl.zeros((M, N), out_ptr.dtype.element_ty)
    for start in range(0, K, STEP):
        a = tl.load(a_ptr + m[:, None] * K + (start + k)[None, :])
        if TRANSPOSED:
            b = tl.load(b_ptr + (start + k)[:, None] + n[None, :] * K)
        else:
            b = tl.load(b_ptr + (start + k)[:, None] * N + n[None, :])
        total = tl.dot(a, b, total, out_dtype=total.dtype)
    tl.store(out_ptr + m[:, None] * N + n[None, :], total)


@triton.jit
def chained_kernel(x_ptr, out_ptr, WAITS: tl.constexpr):
    gdc_launch_dependents()
    if WAITS:
        gdc_wait()
    at = tl.arange(0, 128)
    x = tl.load(x_ptr + at)
    gdc_wait()
    tl.store(out_ptr + at, x + 1)


@triton.jit
def colliding_kernel(out_ptr):
    tl.store(out_ptr + tl.arange(0, 128), tl.program_id(0))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_sums_with_a_tail(capability):
    x, y, out = torch.randn(1000), torch.randn(1000), torch.full((1000,), torch.nan)
    with emulated(capability):
        add_kernel[(4,)](x, y, out, 1000, 256, True, **FUSION)
    assert torch.equal(out, x + y)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows of b", "columns of b"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_products(capability, dtype, transposed):
    if dtype == torch.int8:
        a, b = (torch.randint(-128, 128, shape, dtype=dtype) for shape in ((64, 256), (256, 64)))
        out = torch.full((64, 64), -1, dtype=torch.int32)
    else:
        a, b = torch.randn(64, 256).to(dtype), torch.randn(256, 64).to(dtype)
        out = torch.full((64, 64), torch.nan)
    given = b.T.contiguous() if transposed else b
    with emulated(capability):
        product_kernel[(1,)](a, given, out, 256, 64, 64, 32, transposed, **FUSION)
    expected = a.double() @ b.double()
    if dtype == torch.int8:
        assert torch.equal(out.double(), expected)
    else:
        bound = 2**-9 if dtype == torch.float32 else 2**-20  # tf32 has 10 bits
        assert ((out - expected).abs() <= bound * (a.double().abs() @ b.double().abs())).all()


def test_an_access_out_of_bounds_faults():
    x, y, out = torch.randn(1000), torch.randn(1000), torch.empty(1000)
    with emulated(90), pytest.raises(Fault, match=r"test_emulator.py:\d+ .* is in no tensor of this launch"):
        add_kernel[(4,)](x, y, out, 1000, 256, False, **FUSION)


def test_two_programs_must_not_write_the_same():
    with emulated(90), pytest.raises(Fault, match="overwrites what another warp may write at the same time"):
        colliding_kernel[(2,)](torch.empty(128, dtype=torch.int32), **FUSION)


@pytest.mark.parametrize("waits", [True, False])
def test_a_launch_must_wait_for_what_the_one_before_writes(waits):
    x, between, out = torch.randn(128), torch.empty(128), torch.empty(128)
    with emulated(90):
        chained_kernel[(1,)](x, between, waits, launch_pdl=True, **FUSION)  # nobody has written x
        if waits:
            chained_kernel[(1,)](between, out, True, launch_pdl=True, **FUSION)
            assert torch.equal(out, x + 1 + 1)
        else:
            with pytest.raises(Fault, match="before it has waited"):
                chained_kernel[(1,)](between, out, False, launch_pdl=True, **FUSION)


EXCHANGE = dedent("""
    .visible .entry exchange(
        .param .u64 .ptr .global exchange_param_0
    )
    {
        .reg .b32 %r<9>;
        .reg .b64 %rd<9>;
        ld.param.b64 %rd1, [exchange_param_0];
        mov.u32 %r1, %tid.x;
        shl.b32 %r2, %r1, 2;
        st.shared.b32 [%r2], %r1;
        bar.sync 0;
        xor.b32 %r3, %r1, 32;
        shl.b32 %r4, %r3, 2;
        ld.shared.b32 %r5, [%r4];
        mul.wide.u32 %rd2, %r1, 4;
        add.s64 %rd3, %rd1, %rd2;
        bar.sync 0;
        st.shared.b32 [%r2], %r5;
        st.global.b32 [%rd3+0], { %r5 };
        ret;
    }
""")


HAND_OVER = dedent("""
    .visible .entry hand_over(
        .param .u64 .ptr .global hand_over_param_0
    )
    {
        .reg .pred %p<9>;
        .reg .b32 %r<9>;
        .reg .b64 %rd<9>;
        ld.param.b64 %rd1, [hand_over_param_0];
        mov.u32 %r1, %tid.x;
        mov.u32 %r2, %ctaid.x;
        shl.b32 %r3, %r2, 8;
        mul.wide.u32 %rd2, %r1, 4;
        cvt.u64.u32 %rd3, %r3;
        add.s64 %rd4, %rd1, %rd2;
        add.s64 %rd5, %rd4, %rd3;
        st.global.b32 [%rd5+4], { %r1 };
        bar.sync 0;
        setp.eq.b32 %p1, %r1, 0;
        @%p1 atom.global.gpu.acq_rel.add.u32 %r4, [%rd1+0], 1;
        @%p1 st.shared.b32 [global_smem], %r4;
        bar.sync 0;
        ld.shared.b32 %r5, [global_smem];
        setp.ne.b32 %p2, %r5, 1;
        @%p2 bra $END;
        xor.b32 %r6, %r3, 256;
        cvt.u64.u32 %rd6, %r6;
        add.s64 %rd7, %rd4, %rd6;
        ld.global.b32 { %r7 }, [%rd7+4];
        add.s32 %r8, %r7, 1;
        st.global.b32 [%rd5+4], { %r8 };
    $END:
        ret;
    }
""")


def run(text: str, out: torch.Tensor, programs: int) -> torch.Tensor:
    """Two warps a program; int32 ``out`` is the only parameter."""
    launch = Launch([out.data_ptr()], (programs, 1, 1), warps=2, shared=256, pdl=False, order=0)
    Code(parse(text)).run(launch, Global([(out.data_ptr(), out.data_ptr() + 4 * len(out))], []))
    return out


def exchange(text: str) -> torch.Tensor:
    return run(text, torch.full((64,), -1, dtype=torch.int32), 1)


def test_warps_meet_at_barriers():
    assert torch.equal(exchange(EXCHANGE), torch.arange(64, dtype=torch.int32) ^ 32)


@pytest.mark.parametrize("barrier", [0, 1])
def test_a_missing_barrier_faults(barrier):
    begin, end = [match.span() for match in re.finditer(r"bar\.sync 0;", EXCHANGE)][barrier]
    with pytest.raises(Fault, match=r"shared.* what another warp may"):
        exchange(EXCHANGE[:begin] + EXCHANGE[end:])


def test_programs_hand_over_what_they_release_behind_a_barrier():
    out = run(HAND_OVER, torch.zeros(1 + 2 * 64, dtype=torch.int32), 2)
    lanes = torch.arange(64, dtype=torch.int32)
    first, second = out[1:].view(2, 64)
    assert out[0] == 2
    assert torch.equal(first + second, 2 * lanes + 1)
    with pytest.raises(Fault, match="reads what another warp may write at the same time"):
        run(HAND_OVER.replace("bar.sync 0;", "", 1), torch.zeros(1 + 2 * 64, dtype=torch.int32), 2)


WITHIN = dedent("""
    .visible .entry within(
        .param .u64 .ptr .global within_param_0
    )
    {
        .reg .b32 %r<9>;
        .reg .b64 %rd<9>;
        .shared .align 16 .b8 own[256];
        ld.param.b64 %rd1, [within_param_0];
        mov.u32 %r1, %tid.x;
        mov.b32 %r2, own;
        shl.b32 %r3, %r1, 2;
        add.s32 %r4, %r2, %r3;
        st.shared.b32 [%r4], %r1;
        bar.warp.sync -1;
        xor.b32 %r5, %r3, 4;
        add.s32 %r6, %r2, %r5;
        ld.shared.b32 %r7, [%r6];
        bar.warp.sync -1;
        st.shared.b32 [%r4], %r7;
        mul.wide.u32 %rd2, %r1, 4;
        add.s64 %rd3, %rd1, %rd2;
        st.global.b32 [%rd3+0], { %r7 };
        ret;
    }
""")


def test_lanes_exchange_behind_a_barrier_of_their_warp():
    assert torch.equal(exchange(WITHIN), torch.arange(64, dtype=torch.int32) ^ 1)


@pytest.mark.parametrize("barrier", [0, 1])
def test_a_missing_barrier_of_a_warp_faults(barrier):
    begin, end = [match.span() for match in re.finditer(r"bar\.warp\.sync -1;", WITHIN)][barrier]
    with pytest.raises(Fault, match="what another lane may"):
        exchange(WITHIN[:begin] + WITHIN[end:])


def test_what_lanes_write_at_the_same_time_is_not_to_be_read():
    with pytest.raises(Fault, match="what another lane may write"):
        exchange(
            WITHIN.replace("add.s32 %r4, %r2, %r3", "add.s32 %r4, %r2, 0").replace(
                "xor.b32 %r5, %r3, 4", "mov.b32 %r5, 0"
            )
        )


def test_what_it_does_not_know_it_says():
    with pytest.raises(NotImplementedError, match="xor"):
        Code(parse(EXCHANGE.replace("xor.b32", "xor.unheard.of")))
