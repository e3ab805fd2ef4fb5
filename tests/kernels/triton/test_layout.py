"""The runtime layouts against their own description: naive loops read them back."""

from itertools import product

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from requant_kernels.dense_sparse.triton import leftovers
from requant_kernels.dense_sparse.triton.layer import build
from requant_kernels.dense_sparse.triton.leftovers import build_leftovers
from requant_kernels.dense_sparse.triton.lists import CHUNK, LONGEST, SEGMENT, SHORT, build_lists
from requant_kernels.dense_sparse.triton.slots import (
    DEEPEST,
    LANES,
    SHALLOW,
    Entries,
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
    code_value,
    pack_strips,
    unit,
)
from requant_kernels.dense_sparse.triton.windows import IN_SIGHT, QUARTER, Windows, build_windows, expected
from requant_kernels.scheme import LayerScheme, SparseScheme, WeightScheme
from requant_kernels.sparse import SparsePart

from tests.kernels.strategies import random_weight


def code_at(words: torch.Tensor, bits: int, row: int, column: int) -> int:
    """Reads one code of int32 [strips, blocks, bits, 128] as strips.py describes it."""
    block = words[row // STRIP, column // BLOCK]
    plane, inside = divmod(column % BLOCK, 16)
    kh, t, half = inside // 8, inside // 2 % 4, inside % 2
    word = 16 * (row % STRIP % 8) + 4 * t + 2 * kh + row % STRIP // 8
    halves = [(int(chosen) >> (16 * half)) & 0xFFFF for chosen in block[:, word]]
    per_half = 16 // bits
    if bits == 3 and plane == 15:
        return sum((value >> 15) << bit for bit, value in enumerate(halves))
    return (halves[plane // per_half] >> (plane % per_half * bits)) & ((1 << bits) - 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_code_stands_where_the_description_says(bits):
    codes = torch.randint(0, 1 << bits, (32, 512), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    words = pack_strips(codes, bits)
    assert words.shape == (2, 2, bits, 128)
    read = [[code_at(words, bits, row, column) for column in range(0, 512, 7)] for row in range(32)]
    assert read == codes[:, ::7].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_centring_is_exact(bits, dtype):
    codes = torch.arange(1 << bits)
    values = code_value(codes, bits, dtype)
    centred = (values[:, None].float() - values[None, :].float()).to(dtype).float() / unit(bits, dtype)
    assert torch.equal(centred, (codes[:, None] - codes[None, :]).float())


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
        step = halves[block, within // 2, :20, within % 2] * unit(4, torch.bfloat16)
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


@settings(max_examples=30)
@given(part=parts(1, 40, 300, 1500))
def test_leftovers_hold_every_entry_once_and_no_list_is_long(part):
    values, mask = part
    mask &= values != 0
    sparse, strips = SparsePart.from_mask(values, mask), 8
    left = build_leftovers(sparse, strips)
    read = torch.zeros(left.lists * STRIP, values.shape[1], dtype=values.dtype)
    for one in range(left.lists):
        for entry in range(int(left.offsets[one]), int(left.offsets[one + 1])):
            word = int(left.words[entry])
            assert (word & 0xFFFF) // STRIP == one
            read[word & 0xFFFF, left.columns[entry]] += torch.tensor(word >> 16, dtype=torch.int16).view(values.dtype)
    owner = strips_of_lists(left.overflow)
    owner += [0] * (left.lists - len(owner))
    whole = torch.zeros(strips, STRIP, values.shape[1], dtype=values.dtype)
    whole.index_add_(0, torch.tensor(owner), read.view(left.lists, STRIP, -1))
    assert torch.equal(whole.flatten(0, 1)[: len(values)], values * mask)
    assert left.offsets.diff().max() <= max(leftovers.SHORT, LONGEST * -(-sparse.nnz // strips))
    assert left.lists % 8 == 0


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
            read[strip * STRIP + slots.owners[strip, lane], word & 0xFFFF] += bits.view(dtype)
    return read[: shape[0]]


@st.composite
def with_entries(draw: st.DrawFn, *columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, mask = draw(parts(*columns))
    mask &= values != 0
    assume(bool(mask.any()))
    return values, mask


@settings(max_examples=30)
@given(part=with_entries(1, 40, 300))
def test_slots_and_the_rest_hold_every_entry_once(part):
    values, mask = part
    slots = build_slots(Entries.of(SparsePart.from_mask(values, mask)), 4)
    assert slots is not None
    assert slots.slots.shape == (len(slots.slots), slots.depth, LANES)
    assert slots.deepened == (int(slots.further[-1]) > 0)
    rest = 0 if slots.rest is None else slots.rest.to_dense()
    assert torch.equal(in_slots(slots, values.shape, values.dtype) + rest, values * mask)
    held = torch.zeros(4 * STRIP, dtype=torch.int64)
    held[: len(values)] = ((values * mask - rest) != 0).sum(1)
    assert torch.equal(slots.rows >> 10, held.int())


def in_windows(slots: Slots, windows: Windows, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """What windows show, read by loops as windows.py describes them; of a pair of columns the first entry hides all
    behind it."""
    blocks, rows = windows.starts.shape
    read = torch.zeros(rows, blocks * BLOCK, dtype=dtype)
    for row, block, t in product(range(shape[0]), range(blocks), range(4)):
        place = int(slots.rows[row])
        first, lanes, held = place & 31, place >> 5 & 31, place >> 10
        byte = int(windows.starts[block, row]) >> (8 * t) & 0xFF
        begin = byte - 128 + int(expected(torch.tensor(4 * block + t), torch.tensor(held), blocks))
        entries = range(begin, min(begin + windows.width, held))
        words = [int(steps_of(slots, row // STRIP)[entry // lanes, first + entry % lanes]) for entry in entries]
        for quarter in range(4):
            bound = BLOCK * block + QUARTER * quarter
            ahead = [i for i, word in enumerate(words) if word & 0xFFFF >= bound]
            start = ahead[0] if ahead else len(words)
            sight = words if windows.width <= IN_SIGHT else words[start : start + IN_SIGHT]
            seen = set()
            for column, value in ((word & 0xFFFF, word >> 16) for word in sight):
                if bound <= column < bound + QUARTER and column // 2 % 4 == t and column // 2 not in seen:
                    seen.add(column // 2)
                    read[row, column] = torch.tensor(value, dtype=torch.int16).view(dtype)
    return read[: shape[0], : shape[1]]


@settings(max_examples=30)
@given(part=with_entries(1, 40, 300))
def test_windows_and_the_rest_hold_every_entry_once(part):
    values, mask = part
    sparse = SparsePart.from_mask(values, mask)
    entries = Entries.of(sparse)
    slots = build_slots(entries, 4)
    assert slots is not None
    windows = build_windows(slots, entries, -(-values.shape[1] // BLOCK))
    rest = 0 if windows.rest is None else windows.rest.to_dense()
    assert torch.equal(in_windows(slots, windows, values.shape, values.dtype) + rest, values * mask)


@pytest.mark.parametrize(("density", "width", "outside"), [(0.001, 1, 0.04), (0.005, 2, 0.02), (0.01, 4, 0.01)])
def test_windows_hold_nearly_all_scattered_entries(density, width, outside):
    mask = torch.rand(512, 4096, generator=torch.Generator().manual_seed(0)) < density
    sparse = SparsePart.from_mask(torch.ones(512, 4096, dtype=torch.bfloat16), mask)
    entries = Entries.of(sparse)
    slots = build_slots(entries, 32)
    assert slots is not None
    windows = build_windows(slots, entries, 16)
    assert windows.width == width
    assert windows.rest is not None
    assert windows.rest.nnz <= outside * sparse.nnz


def test_windows_find_entries_that_crowd_at_one_end():
    mask = torch.zeros(16, 8192, dtype=torch.bool)
    mask[:, -700::3] = True  # far from where they would be at equal distances
    mask[3] = False
    mask[3, 5] = True
    sparse = SparsePart.from_mask(torch.ones(16, 8192, dtype=torch.bfloat16), mask)
    entries = Entries.of(sparse)
    slots = build_slots(entries, 1)
    assert slots is not None
    windows = build_windows(slots, entries, 32)
    rest = 0 if windows.rest is None else windows.rest.to_dense()
    assert torch.equal(in_windows(slots, windows, mask.shape, torch.bfloat16) + rest, sparse.to_dense())


def uneven_part(shape: tuple[int, int], sigma: float) -> SparsePart:
    """0.5 % entries; rows differ log-normally, in trained models by a sigma of 1.2."""
    generator = torch.Generator().manual_seed(0)
    density = 0.005 * torch.exp(sigma * torch.randn(shape[0], 1, generator=generator) - sigma**2 / 2)
    mask = torch.rand(shape, generator=generator) < density
    return SparsePart.from_mask(torch.ones(shape, dtype=torch.bfloat16), mask)


@pytest.mark.parametrize(("sigma", "slots_an_entry"), [(0.0, 1.4), (1.2, 1.55)])
def test_scattered_entries_stand_in_slots_most_of_which_they_fill(sigma, slots_an_entry):
    sparse = uneven_part((2048, 4096), sigma)
    slots = build_slots(Entries.of(sparse), 128)
    assert slots is not None
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
    assert build_slots(Entries.of(part), 1) is None


def test_a_layer_without_entries_has_no_sparse_tensors():
    weight = random_weight(LayerScheme(WeightScheme(4, 64), SparseScheme()), (20, 128), density=0.0)
    tensors, _ = build(weight)
    assert list(tensors) == ["weight_packed", "weight_scale", "arrived"]
