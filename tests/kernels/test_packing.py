"""Words hold codes where the layout says they do: against golden words and a scalar reading of the layout."""

import pytest
import torch
from torch import Tensor

from cachequant.kernels.format import row_words
from cachequant.kernels.packing import pack, unpack

BITS = [2, 3, 4, 8]
LENGTHS = [1, 8, 32, 63, 64, 80, 96, 100, 128, 256]
# (bits, by_nibble): only rows of 4 bits have two orders
ORDERS = [(2, False), (3, False), (4, False), (4, True), (8, False)]


def random_codes(bits: int, *shape: int) -> Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(0))


def position(code: int, words: int, bits: int, by_nibble: bool) -> tuple[int, int]:
    """(word, lowest bit) of code number `code` in a row of `words` words."""
    plane, rest = divmod(code, 2 * words)
    word, half = divmod(rest, 2)
    if by_nibble:
        return word, 4 * (4 * (plane // 2) + plane % 2 + 2 * half)
    return word, plane * bits + 16 * half


def positions3(code: int, low_words: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """((word, bit) of the two low bits, (word, bit) of the high bit) of a code of 3 bits."""
    plane, rest = divmod(code, 2 * low_words)
    word, half = divmod(rest, 2)
    pair, plane = divmod(plane, 4)
    nibble = 4 * (plane // 2) + plane % 2 + 2 * half
    return (word, 4 * nibble + 2 * pair), (low_words + word // 2, 4 * nibble + 2 * (word % 2) + pair)


def scalar_pack(codes: list[int], bits: int, by_nibble: bool) -> list[int]:
    """One row, code by code, in Python integers: the layout as it is written down."""
    words = [0] * row_words(len(codes), bits)
    for index, code in enumerate(codes):
        if bits == 3:
            (word, bit), (high_word, high_bit) = positions3(index, len(words) * 2 // 3)
            words[word] |= (code & 3) << bit
            words[high_word] |= (code >> 2) << high_bit
        else:
            word, bit = position(index, len(words), bits, by_nibble)
            words[word] |= code << bit
    return [word - 2**32 if word >= 2**31 else word for word in words]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("bits", "by_nibble"), ORDERS)
def test_unpacking_returns_the_packed_codes(bits, by_nibble, length):
    codes = random_codes(bits, 2, 3, length)
    words = pack(codes, bits, by_nibble)
    assert words.dtype == torch.int32
    assert words.shape == (2, 3, row_words(length, bits))
    assert torch.equal(unpack(words, bits, length, by_nibble), codes.to(torch.uint8))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("bits", "by_nibble"), ORDERS)
def test_words_follow_the_layout(bits, by_nibble, length):
    codes = random_codes(bits, 2, length)
    expected = [scalar_pack(row, bits, by_nibble) for row in codes.tolist()]
    assert pack(codes, bits, by_nibble).tolist() == expected


GOLDEN = [
    # one plane of a half after the other: codes 1 3 5 7 in the low half, 2 4 6 8 in the high one
    pytest.param(4, False, [1, 2, 3, 4, 5, 6, 7, 8], [0x86427531], id="4bit"),
    pytest.param(4, True, [1, 2, 3, 4, 5, 6, 7, 8], [0x86754231], id="4bit-by-nibble"),
    # two words: codes 0 1 | 2 3 of plane 0, 4 5 | 6 7 of plane 1
    pytest.param(8, False, list(range(0x10, 0x18)), [0x15111410, 0x17131612], id="8bit"),
    pytest.param(2, False, [0, 1, 2, 3] * 4, [0xDDDD8888], id="2bit"),
    pytest.param(3, False, [3] * 32, [0xFFFFFFFF, 0xFFFFFFFF, 0], id="3bit-low-bits"),
    pytest.param(3, False, [4] * 32, [0, 0, 0xFFFFFFFF], id="3bit-high-bits"),
    pytest.param(3, False, [7] + [0] * 31, [3, 0, 1], id="3bit-first"),
    pytest.param(3, False, [0] * 6 + [7] + [0] * 25, [0, 3 << 4, 1 << 6], id="3bit-second-plane-second-word"),
    pytest.param(3, False, [0] * 31 + [7], [0, 3 << 30, 1 << 31], id="3bit-last"),
]


@pytest.mark.parametrize(("bits", "by_nibble", "codes", "words"), GOLDEN)
def test_golden_words(bits, by_nibble, codes, words):
    packed = pack(torch.tensor([codes, codes]), bits, by_nibble)
    assert [[word % 2**32 for word in row] for row in packed.tolist()] == [words, words]
    assert unpack(packed, bits, len(codes), by_nibble).tolist() == [codes, codes]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("length", [32, 64, 96, 128, 256])
def test_whole_words_take_exactly_their_bits(bits, length):
    assert row_words(length, bits) * 32 == length * bits


@pytest.mark.parametrize("bits", BITS)
def test_padding_of_a_row_is_zero_and_less_than_a_unit(bits):
    unit = 32 if bits == 3 else 32 // bits
    for length in (1, unit - 1, unit, unit + 1):
        words = pack(torch.full((2, length), 2**bits - 1), bits)
        room = words.shape[-1] * 32 // bits
        assert 0 <= room - length < unit
        assert unpack(words, bits, room)[:, length:].eq(0).all()


@pytest.mark.parametrize("source", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("bits", "by_nibble"), ORDERS)
def test_codes_may_come_as_any_integer_type(bits, by_nibble, source):
    codes = random_codes(bits, 96)
    assert torch.equal(pack(codes.to(source), bits, by_nibble), pack(codes, bits, by_nibble))


@pytest.mark.parametrize("target", [torch.uint8, torch.int32, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("bits", "by_nibble"), ORDERS)
def test_codes_are_written_as_the_type_asked_for(bits, by_nibble, target):
    codes = random_codes(bits, 5, 80)
    written = unpack(pack(codes, bits, by_nibble), bits, 80, by_nibble, dtype=target)
    assert written.dtype == target
    assert torch.equal(written.long(), codes)


@pytest.mark.parametrize(("bits", "by_nibble"), ORDERS)
def test_views_of_larger_tensors_are_unpacked_alike(bits, by_nibble):
    # the store hands out slices of its buffers, never contiguous
    words = pack(random_codes(bits, 2, 3, 7, 64), bits, by_nibble)
    view = words[:, 1:, 2:5]
    assert not view.is_contiguous()
    assert torch.equal(unpack(view, bits, 64, by_nibble), unpack(view.contiguous(), bits, 64, by_nibble))


@pytest.mark.parametrize(("bits", "length"), [(2, 16), (4, 8), (8, 4)])
def test_one_row_of_one_word_is_unpacked(bits, length):
    codes = random_codes(bits, length)
    assert torch.equal(unpack(pack(codes, bits), bits, length).long(), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_rows_pack_to_no_words(bits):
    words = pack(random_codes(bits, 0, 64), bits)
    assert words.shape == (0, row_words(64, bits))
    assert unpack(words, bits, 64).shape == (0, 64)
