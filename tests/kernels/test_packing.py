import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from requant_kernels.packing import pack, packed_length, spare_bits, take_range, unpack

BITS = st.sampled_from((2, 3, 4, 8))


def words_of(codes: list[int], bits: int) -> list[int]:
    """The definition in exact integers: one little-endian bit stream, cut into 32-bit words."""
    stream = sum(code << (k * bits) for k, code in enumerate(codes))
    return [(stream >> (32 * j)) & 0xFFFFFFFF for j in range(packed_length(len(codes), bits))]


@given(bits=BITS, rows=st.integers(1, 4), length=st.integers(1, 130), seed=st.integers(0, 999))
def test_packed_words_are_one_little_endian_bit_stream_and_unpack_inverts(bits, rows, length, seed):
    codes = torch.randint(0, 1 << bits, (rows, length), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    for row in range(rows):
        assert [int(word) & 0xFFFFFFFF for word in packed[row]] == words_of(codes[row].tolist(), bits)
    assert torch.equal(unpack(packed, bits, length), codes.to(torch.uint8))


@given(bits=BITS, length=st.integers(1, 130), data=st.data())
def test_a_range_of_codes_is_packed_as_if_it_were_alone(bits, length, data):
    anywhere, borders = st.integers(0, length), st.integers(0, length // 32).map(lambda block: 32 * block)
    start, stop = sorted(data.draw(st.tuples(*(st.one_of(anywhere, borders) for _ in range(2)))))
    codes = torch.randint(0, 1 << bits, (3, length), generator=torch.Generator().manual_seed(length))
    assert torch.equal(take_range(pack(codes, bits), bits, start, stop), pack(codes[:, start:stop], bits))


@given(bits=BITS, length=st.integers(1, 130), bit=st.integers(0, 31))
def test_bits_above_the_last_code_are_seen(bits, length, bit):
    packed = pack(torch.zeros(3, length, dtype=torch.int64), bits)
    assert not spare_bits(packed, bits, length).any()
    packed[1, -1] = torch.tensor(1 << bit).to(torch.int32)
    used = length * bits - (packed.shape[1] - 1) * 32
    assert spare_bits(packed, bits, length).tolist() == [0, (1 << bit) >> used, 0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("bad", [-1, 256])
def test_a_code_out_of_range_is_refused(bits, bad):
    with pytest.raises(ValueError, match=f"not {bits} bit"):
        pack(torch.tensor([[0, bad]]), bits)


def test_a_wrong_number_of_words_is_refused():
    with pytest.raises(ValueError, match="2 words do not hold 96 codes of 3 bit"):
        unpack(torch.zeros(1, 2, dtype=torch.int32), 3, 96)
