"""The runtime layouts against their own description: naive loops read them back."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from requant_kernels.dense_sparse.triton.layer import build
from requant_kernels.dense_sparse.triton.lists import CHUNK, LONGEST, SEGMENT, SHORT, build_lists
from requant_kernels.dense_sparse.triton.patches import (
    AHEAD,
    LANES,
    PATCH,
    ROUNDS,
    SPARE_PATCHES,
    Patches,
    build_patches,
)
from requant_kernels.dense_sparse.triton.slots import (
    DEEPEST,
    LAST,
    SHALLOW,
    SPARE_STEPS,
    Slots,
    build_slots,
    choose_lanes,
    needed_steps,
)
from requant_kernels.dense_sparse.triton.strips import (
    BLOCK,
    SPARE_BLOCKS,
    STRIP,
    build_strips,
    pack_strips,
    unit,
)
from requant_kernels.errors import CheckpointError
from requant_kernels.scheme import LayerScheme, SparseScheme, WeightScheme
from requant_kernels.sparse import SparsePart

from tests.kernels.strategies import random_weight


def code_at(words: torch.Tensor, bits: int, row: int, column: int) -> int:
    """Reads one code of int32 [strips, blocks, bits, 128] as strips.py describes it."""
    block = words[row // STRIP, column // BLOCK]
    plane, inside = divmod(column % BLOCK, 16)
    kh, t, half = inside // 8, inside // 2 % 4, inside % 2
    word = 16 * (row % STRIP % 8) + 4 * t + 2 * kh + row % STRIP // 8
    upper, unit = plane // 2 % 2, plane // 4 * 2 + plane % 2
    bytes_ = [int(chosen) >> (16 * half + 8 * upper) & 0xFF for chosen in block[:, word]]
    if bits == 3:
        half, of_half = divmod(unit, 4)
        own, shared = bytes_[2 * half], bytes_[1] >> 4 * half
        return (own >> 5, own >> 2 & 7, (own & 3) << 1 | shared & 1, shared >> 1 & 7)[of_half]
    return (bytes_[unit * bits // 8] >> (unit * bits % 8)) & ((1 << bits) - 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_code_stands_where_the_description_says(bits):
    codes = torch.randint(0, 1 << bits, (32, 512), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    words = pack_strips(codes, bits)
    assert words.shape == (2, 2, bits, 128)
    read = [[code_at(words, bits, row, column) for column in range(0, 512, 7)] for row in range(32)]
    assert read == codes[:, ::7].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_code_becomes_a_centred_number_without_rounding(bits, dtype):
    """What decode.py does: a code among the lowest bits of a float is subnormal, times a power of two a number."""
    codes = torch.arange(1 << bits, dtype=torch.int16)
    largest = {torch.bfloat16: 127, torch.float16: 15}[dtype]
    for bit in range(9 - bits):
        values = (codes << bit).view(dtype) * 2.0 ** (largest - bit)
        zero_points = (codes.float() * unit(dtype)).to(dtype)
        centred = (values[:, None] - zero_points[None, :]).float() / unit(dtype)
        assert torch.equal(centred, (codes[:, None] - codes[None, :]).float())


def test_steps_beyond_float16_are_refused():
    weight = random_weight(LayerScheme(WeightScheme(4, 64)), (20, 128), dtype=torch.float16)
    with pytest.raises(CheckpointError, match=r"weight_scale: 200 is too large .*: use bfloat16"):
        build_strips(replace(weight, scale=torch.full_like(weight.scale, 200)))


def test_a_step_word_holds_two_groups():
    weight = random_weight(LayerScheme(WeightScheme(4, 64)), (20, 320))
    strips = build_strips(weight)
    assert (strips.blocks, strips.group, strips.rows) == (2, 64, 128)
    assert strips.codes.shape == (8 * 2 + SPARE_BLOCKS, 4, 128)
    assert strips.scales.shape == (2, 2, 128)
    assert strips.scale_step == 2 * 128
    halves = strips.scales.view(torch.bfloat16).view(2, 2, 128, 2)  # block, word, row, group of the word
    for group in range(5):
        block, within = divmod(group, 4)
        step = halves[block, within // 2, :20, within % 2] * unit(torch.bfloat16)
        assert torch.equal(step, weight.scale[:, group])


def test_one_step_a_row_is_stored_once():
    strips = build_strips(random_weight(LayerScheme(WeightScheme(3)), (20, 1024)))
    assert strips.scales.shape == (1, 1, 128)
    assert strips.scale_step == 0


def strips_of_lists(overflow: torch.Tensor) -> list[int]:
    """The strip that each list belongs to."""
    strips = range(len(overflow) - 1)
    return [*strips, *(strip for strip in strips for _ in range(overflow[strip], overflow[strip + 1]))]


def dense(lists, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """The sparse part read back, by lists."""
    strips = len(lists.overflow) - 1
    read = torch.zeros(strips * STRIP, shape[1], dtype=dtype)
    for strip, (start, end) in zip(strips_of_lists(lists.overflow), lists.bounds.tolist(), strict=False):
        for chunk in range(start, end):
            entries = lists.entries[chunk * CHUNK : (chunk + 1) * CHUNK]
            entries = entries[entries >> 16 != 0]
            values = (entries >> 16).to(torch.int16).view(dtype)
            columns = (entries & 0xFFF) + lists.segments[chunk]
            assert (columns.diff() >= 0).all()
            read[strip * STRIP + ((entries >> 12) & 0xF), columns] += values
    return read[: shape[0]]


@st.composite
def parts(draw: st.DrawFn, *columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [rows, one of ``columns``] and where they are entries, with or without a full row."""
    shape = (draw(st.integers(1, 60)), draw(st.sampled_from(columns)))
    generator = torch.Generator().manual_seed(shape[0])
    values = torch.randn(shape, generator=generator).to(draw(st.sampled_from((torch.bfloat16, torch.float16))))
    mask = torch.rand(shape, generator=generator) < draw(st.sampled_from((0.0, 0.01, 0.3, 1.0)))
    mask[-1] |= draw(st.booleans())
    return values, mask


@settings(max_examples=30)
@given(part=parts(1, 40, 300, SEGMENT + 5))
def test_lists_hold_every_entry_once_and_none_is_long(part):
    values, mask = part
    strips = 8
    lists = build_lists(SparsePart.from_mask(values, mask), strips)
    assert torch.equal(dense(lists, values.shape, values.dtype), values * mask)
    chunks = len(lists.segments)
    length = (lists.bounds[:, 1] - lists.bounds[:, 0]).max()
    assert length <= max(SHORT, LONGEST * -(-chunks // strips))
    assert lists.lists % 8 == 0
    assert len(lists.entries) == CHUNK * chunks


def test_a_full_row_becomes_overflow_lists():
    mask = torch.zeros(64, 4096, dtype=torch.bool)
    mask[20] = True
    lists = build_lists(SparsePart.from_mask(torch.ones(64, 4096, dtype=torch.bfloat16), mask), 8)
    assert lists.overflow.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1] or int(lists.overflow[-1]) >= 1
    assert int(lists.overflow[1]) == 0


def steps_of(slots: Slots, strip: int) -> torch.Tensor:
    """All steps of a strip, int32 [steps, 32], as slots.py describes them."""
    strips = len(slots.owners)
    further = slots.slots[strips:].reshape(-1, LANES)
    return torch.cat([slots.slots[strip], further[slots.further[strip] : slots.further[strip + 1]]])


def in_slots(slots: Slots, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """The slots read back, by loops."""
    strips = len(slots.owners)
    read = torch.zeros(strips * STRIP, shape[1], dtype=dtype)
    for strip in range(strips):
        for step, lane in (steps_of(slots, strip) != 0).nonzero().tolist():
            word = int(steps_of(slots, strip)[step, lane])
            bits = torch.tensor(word >> 16, dtype=torch.int16)
            read[strip * STRIP + slots.owners[strip, lane] % STRIP, word & 0xFFFF] += bits.view(dtype)
    return read[: shape[0]]


@st.composite
def with_entries(draw: st.DrawFn, *columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, mask = draw(parts(*columns))
    mask &= values != 0
    assume(bool(mask.any()))
    return values, mask


@settings(max_examples=30)
@given(part=with_entries(1, 40, 300))
def test_a_lane_knows_its_place_among_those_of_its_row(part):
    values, mask = part
    slots = build_slots(SparsePart.from_mask(values, mask), 8)
    assert slots is not None
    for lanes in slots.owners.tolist():
        rows = [lane % STRIP for lane in lanes]
        assert rows == sorted(rows)
        assert set(rows) == set(range(STRIP))
        assert [lane // STRIP % LANES for lane in lanes] == [rows[:i].count(row) for i, row in enumerate(rows)]
        assert [bool(lane & LAST) for lane in lanes] == [row not in rows[i + 1 :] for i, row in enumerate(rows)]


def test_kernels_may_read_behind_the_last_slot():
    mask = torch.rand(128, 256) < 0.01
    slots = build_slots(SparsePart.from_mask(torch.ones(128, 256, dtype=torch.bfloat16), mask), 8)
    assert slots is not None
    assert (len(slots.slots) - 8) * slots.depth - int(slots.further[-1]) >= SPARE_STEPS


@settings(max_examples=30)
@given(part=with_entries(1, 40, 300))
def test_slots_and_the_rest_hold_every_entry_once(part):
    values, mask = part
    slots = build_slots(SparsePart.from_mask(values, mask), 4)
    assert slots is not None
    assert slots.slots.shape == (len(slots.slots), slots.depth, LANES)
    assert slots.deepened == (int(slots.further[-1]) > 0)
    rest = 0 if slots.rest is None else slots.rest.to_dense()
    assert torch.equal(in_slots(slots, values.shape, values.dtype) + rest, values * mask)


def in_patches(patches: Patches, blocks: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """The patches read back, by loops: each patch as words of two weights, in the order of a strip's codes."""
    count, across = len(patches.starts) - 1 - SPARE_PATCHES, blocks * (BLOCK // PATCH)
    read = torch.zeros(count // across * STRIP, blocks * BLOCK, dtype=dtype)
    for at in range(count):
        words = torch.zeros(8 * 128 * 2, dtype=torch.int16)
        for entry in patches.entries[patches.starts[at] : patches.starts[at + 1]].tolist():
            words[(entry >> 16) // 2] = torch.tensor(entry & 0xFFFF).to(torch.int16)
        strip, patch = divmod(at, across)
        for plane, word, half in (words != 0).view(8, 128, 2).nonzero().tolist():
            g, t, kh, rh = word // 16, word // 4 % 4, word // 2 % 2, word % 2
            row, column = strip * STRIP + 8 * rh + g, patch * PATCH + 16 * plane + 8 * kh + 2 * t + half
            read[row, column] = words.view(8, 128, 2)[plane, word, half].view(dtype)
    return read[: shape[0], : shape[1]]


@settings(max_examples=30)
@given(part=with_entries(1, 40, 300, 600))
def test_patches_hold_every_entry_once_at_its_place(part):
    values, mask = part
    blocks = -(-values.shape[1] // BLOCK)
    patches = build_patches(SparsePart.from_mask(values, mask), 4, blocks)
    assert len(patches.entries) == int(mask.sum())
    assert torch.equal(in_patches(patches, blocks, values.shape, values.dtype), values * mask)
    most = int(patches.starts.diff().max())
    assert patches.rounds in ROUNDS
    assert patches.rounds > AHEAD or patches.rounds * LANES >= most
    assert patches.rounds == 1 or ROUNDS[ROUNDS.index(patches.rounds) - 1] * LANES < most


def uneven_part(shape: tuple[int, int], sigma: float) -> SparsePart:
    """0.5 % entries; rows differ log-normally, in trained models by a sigma of 1.2."""
    generator = torch.Generator().manual_seed(0)
    density = 0.005 * torch.exp(sigma * torch.randn(shape[0], 1, generator=generator) - sigma**2 / 2)
    mask = torch.rand(shape, generator=generator) < density
    return SparsePart.from_mask(torch.ones(shape, dtype=torch.bfloat16), mask)


@pytest.mark.parametrize(("sigma", "slots_an_entry"), [(0.0, 1.7), (1.2, 1.55)])
def test_scattered_entries_stand_in_slots_most_of_which_they_fill(sigma, slots_an_entry):
    sparse = uneven_part((2048, 4096), sigma)
    slots = build_slots(sparse, 128)
    assert slots is not None
    assert slots.deepened == (sigma > 0)
    assert slots.slots.numel() <= slots_an_entry * sparse.nnz
    assert slots.rest is None or slots.rest.nnz <= 0.01 * sparse.nnz


def test_one_crowded_row_deepens_no_strip_but_its_own_and_that_not_beyond_measure():
    counts = torch.full((64, 16), 20)
    counts[6, 4] = 4096
    steps = needed_steps(counts, choose_lanes(counts))
    assert int(steps.median()) == 10
    assert (steps != 10).sum() == 1
    assert int(steps[6]) <= DEEPEST * (10 + 4096 // 17 // 64 + 1) + SHALLOW


def test_rows_with_more_entries_have_more_lanes_and_none_is_without():
    counts = torch.tensor([[0, 1, 40, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5], [9] * 16])
    lanes = choose_lanes(counts)
    assert lanes[1].tolist() == [2] * 16
    assert int(lanes[0, 2]) >= 8
    assert (lanes.sum(1) <= LANES).all()
    assert int((-(-counts // lanes))[0].max()) == 5


def test_layers_that_differ_in_depth_alone_are_of_one_kind():
    scheme = LayerScheme(WeightScheme(4, 64), SparseScheme())
    few, more = (build(random_weight(scheme, (256, 4096), density=density)) for density in (0.003, 0.004))
    assert few[0]["sparse_slots"].shape[1] != more[0]["sparse_slots"].shape[1]
    assert few[1] == more[1]  # so the second is not warmed up again


def test_columns_that_do_not_fit_a_slot_stay_in_lists():
    mask = torch.zeros(16, 70_000, dtype=torch.bool)
    mask[3, [5, 69_999]] = True
    part = SparsePart.from_mask(torch.ones(16, 70_000, dtype=torch.bfloat16), mask)
    assert build_slots(part, 1) is None


def test_a_layer_without_entries_has_no_sparse_tensors():
    weight = random_weight(LayerScheme(WeightScheme(4, 64), SparseScheme()), (20, 128), density=0.0)
    tensors, _ = build(weight)
    assert list(tensors) == ["weight_packed", "weight_scale", "arrived"]
