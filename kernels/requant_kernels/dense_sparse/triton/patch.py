# Triton's language, typed by its own compiler; the arguments of a kernel are positional.
# mypy: ignore-errors
"""Entries become part of a strip's decoded weights (patches.py): a warp scatters those of a patch over a buffer in
shared memory that otherwise holds what adds nothing, and reads it in the order of the tensor core's operand.

Triton has no such scatter, so it is PTX: one warp for each strip, which touches no buffer but its own. Where PTX is
false (the interpreter, GPUs that are not NVIDIA's) every entry is compared with every pair of weights.

T strips are patched side by side, by as many warps; what a lane of a warp has is an element of [32 T].
"""

import triton
import triton.language as tl

from requant_kernels.dense_sparse.triton import patches

PATCH = tl.constexpr(patches.PATCH)
BYTES = tl.constexpr(patches.PATCH * 32)  # of a patch of 16 rows
NOWHERE = tl.constexpr(BYTES.value << 16)  # an entry behind the last of a patch's places
AHEAD = tl.constexpr(patches.AHEAD)
STRIDE = tl.constexpr(BYTES.value + 16)  # bytes from a warp's buffer to the next one's, with room for NOWHERE


@triton.constexpr_function
def _reserve(warps, none):
    """Buffers of words ``none``; $1: where the first 16 of a lane's bytes are. Their size keeps the alignment of what
    follows, which products read (1024)."""
    places = range(0, BYTES.value, 512)
    stores = "\n".join(f"st.shared.v4.b32 [%at+{place}], {{%pair, %pair, %pair, %pair}};" for place in places)
    return f""".shared .align 1024 .b8 requant_patch[{-(-STRIDE.value * warps // 1024) * 1024}];
        {{
        .reg .b32 %at, %pair;
        mov.b32 %pair, {none};
        mov.b32 %at, requant_patch;
        add.s32 %at, %at, $1;
        {stores}
        mov.b32 $0, 0;
        }}"""


@triton.constexpr_function
def _store():
    """The value of entry $2 goes to its place in the buffer at $1, at address $0."""
    return """{
        .reg .b16 %half, %rest;
        mov.b32 $0, requant_patch;
        add.s32 $0, $0, $1;
        mov.b32 {%half, %rest}, $2;
        .reg .b32 %place;
        shr.u32 %place, $2, 16;
        add.s32 $0, $0, %place;
        st.shared.b16 [$0], %half;
        }"""


@triton.constexpr_function
def _empty(none):
    """A half of ``none`` goes to address $1."""
    return f"""{{
        .reg .b16 %none;
        mov.b16 %none, {none & 0xFFFF};
        st.shared.b16 [$1], %none;
        mov.b32 $0, 0;
        }}"""


@triton.constexpr_function
def _store_others(value, none):
    """``value``, %half or %none, a half of ``none``, goes to the places, in the buffer at $1, of the entries at address
    $2, of which the warp has $3."""
    return f"""{{
        .reg .pred %done, %mine;
        .reg .b16 %half, %rest, %none;
        .reg .b32 %at, %buffer, %entry, %left, %lane;
        .reg .b64 %from;
        mov.b16 %none, {none & 0xFFFF};
        mov.b32 %buffer, requant_patch;
        add.s32 %buffer, %buffer, $1;
        mov.b64 %from, $2;
        mov.b32 %left, $3;
        mov.u32 %lane, %laneid;
        MORE_${{:uid}}:
        setp.le.s32 %done, %left, 0;
        @%done bra.uni DONE_${{:uid}};
        setp.lt.s32 %mine, %lane, %left;
        mov.b32 %entry, {NOWHERE.value};
        @%mine ld.global.b32 %entry, [%from];
        shr.u32 %at, %entry, 16;
        add.s32 %at, %at, %buffer;
        mov.b32 {{%half, %rest}}, %entry;
        st.shared.b16 [%at], {value};
        sub.s32 %left, %left, 32;
        add.s64 %from, %from, 128;
        bra.uni MORE_${{:uid}};
        DONE_${{:uid}}:
        mov.b32 $0, 0;
        }}"""


@triton.constexpr_function
def read_words(buffer, at):
    """PTX: four words from ``at`` bytes behind $4 on, of a buffer in shared memory."""
    return f"""{{
        .reg .b32 %at;
        mov.b32 %at, {buffer};
        add.s32 %at, %at, $4;
        ld.shared.v4.b32 {{$0, $1, $2, $3}}, [%at+{at}];
        }}"""


@triton.jit
def reserve(NONE: tl.constexpr, T: tl.constexpr):
    """Buffers, of words NONE. Once, at the beginning of a kernel."""
    lane = tl.arange(0, 32 * T)
    at = lane // 32 * STRIDE + lane % 32 * 16
    tl.inline_asm_elementwise(_reserve(T, NONE), "=r,r", [at], tl.int32, False, 1)


@triton.jit
def locate(starts_ptr, patch, live, COUNT: tl.constexpr):
    """Where the entries of COUNT patches from ``patch`` on begin, and where the last ones end; there are none unless
    ``live``, or that is None. starts int32* [32 T]: of a lane's strip."""
    starts = ()
    for i in tl.static_range(COUNT + 1):
        at = starts_ptr + patch + i
        starts = starts + (tl.load(at) if live is None else tl.load(at, mask=live, other=0),)  # noqa: RUF005
    return starts


@triton.jit
def fetch(entries_ptr, starts, ROUNDS: tl.constexpr):
    """A lane's entries of the patches that ``starts`` tells, for each a tuple: int32 [32 T], ROUNDS, at most AHEAD, of
    them; where that may not be all of the warp's, the others' address and number, too."""
    patches = ()
    for i in tl.static_range(len(starts) - 1):
        end = starts[i + 1]
        at = starts[i] + tl.arange(0, end.shape[0]) % 32
        entries = ()
        for j in tl.static_range(min(ROUNDS, AHEAD)):
            entry = tl.load(entries_ptr + at + 32 * j, mask=at + 32 * j < end, other=NOWHERE)
            entries = entries + (entry,)  # noqa: RUF005
        if ROUNDS > AHEAD:
            far = (entries_ptr + at + 32 * AHEAD).to(tl.int64, bitcast=True)
            entries = entries + (far, end - starts[i] - 32 * AHEAD)  # noqa: RUF005
        patches = patches + (entries,)  # noqa: RUF005
    return patches


@triton.jit
def _meet(lanes):
    """What the lanes of a warp have done, all of them see. lanes: any tensor of [32 T]."""
    tl.inline_asm_elementwise("bar.warp.sync 0xffffffff; mov.b32 $0, 0;", "=r,r", [lanes], tl.int32, False, 1)


@triton.jit
def _others(entries, buffer, VALUE: tl.constexpr, NONE: tl.constexpr):
    code: tl.constexpr = _store_others(VALUE, NONE)
    tl.inline_asm_elementwise(code, "=r,r,l,r", [buffer, entries[AHEAD], entries[AHEAD + 1]], tl.int32, False, 1)


@triton.jit
def put(entries, ROUNDS: tl.constexpr):
    """Entries of a patch, as ``fetch`` gives them, go to the buffers, which are empty. What ``clear`` wants, which has
    to follow: where they are."""
    buffer = tl.arange(0, entries[0].shape[0]) // 32 * STRIDE
    _meet(buffer)
    places = ()
    for i in tl.static_range(min(ROUNDS, AHEAD)):
        place = tl.inline_asm_elementwise(_store(), "=&r,r,r", [buffer, entries[i]], tl.int32, False, 1)
        places = places + (place,)  # noqa: RUF005
    if ROUNDS > AHEAD:
        _others(entries, buffer, "%half", 0)
    _meet(buffer)
    return places


@triton.jit
def read(like, S: tl.constexpr, KW: tl.constexpr):
    """What has been put, as pairs of weights: a tuple of 8 planes int32 [S, KW, 8, 4, 2, 2] in the layout of ``like``,
    a word of codes."""
    T: tl.constexpr = S * KW
    at = tl.arange(0, T)[:, None] * STRIDE + tl.arange(0, 128)[None, :] * 4
    at = tl.reshape(at, (S, KW, 8, 4, 2, 2))
    planes = ()
    for plane in tl.static_range(8):
        # ``like`` is not used, but says that a lane has four words in turn
        words = tl.inline_asm_elementwise(
            read_words("requant_patch", plane * 512), "=r,=r,=r,=r,r,r,r,r,r,r,r,r", [at, like], tl.int32, False, 4
        )
        planes = planes + (words,)  # noqa: RUF005
    return planes


@triton.jit
def clear(places, entries, NONE: tl.constexpr, ROUNDS: tl.constexpr):
    """NONE where ``put`` has put the entries."""
    buffer = tl.arange(0, entries[0].shape[0]) // 32 * STRIDE
    _meet(buffer)
    for i in tl.static_range(min(ROUNDS, AHEAD)):
        tl.inline_asm_elementwise(_empty(NONE), "=r,r", [places[i]], tl.int32, False, 1)
    if ROUNDS > AHEAD:
        _others(entries, buffer, "%none", NONE)


@triton.jit
def compared(entries_ptr, starts, NONE: tl.constexpr, S: tl.constexpr, KW: tl.constexpr):
    """What ``read`` gives of a patch, without shared memory. starts: as ``locate`` gives them."""
    T: tl.constexpr = S * KW
    planes = ()
    for _ in tl.static_range(8):
        planes = planes + (tl.full((T, 128), NONE, tl.int32),)  # noqa: RUF005
    at = starts[0] + tl.arange(0, 32 * T) % 32
    for first in range(0, tl.max(starts[1] - starts[0]), 32):
        entry = tl.load(entries_ptr + at + first, mask=at + first < starts[1], other=NOWHERE)
        entry = tl.reshape(entry, (T, 32, 1))
        place = entry >> 16
        word = (place >> 2) - tl.arange(0, 128)[None, None, :]
        value = ((entry & 0xFFFF) - (NONE & 0xFFFF)) << ((place & 2) << 3)
        added = ()
        for plane in tl.static_range(8):
            hit = tl.sum(tl.where(word == plane * 128, value, 0), 1)
            added = added + (planes[plane] + hit,)  # noqa: RUF005
        planes = added
    shaped = ()
    for plane in tl.static_range(8):
        shaped = shaped + (tl.reshape(planes[plane], (S, KW, 8, 4, 2, 2)),)  # noqa: RUF005
    return shaped
