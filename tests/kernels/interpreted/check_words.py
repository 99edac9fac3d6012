"""Words unpack to the codes that were packed, or to their entries, whatever the width. Needs TRITON_INTERPRET=1."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from cachequant.kernels.packing import pack, unpack
from cachequant.kernels.triton.words import number_pair, plane_position, planes, power, unit_exponent, unpacked

# (bits, by table)
ORDERS = [(2, False), (2, True), (3, False), (3, True), (4, False), (4, True), (8, False)]


@triton.jit
def _unpack(
    packed, table, out, ROWS: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr, LUT: tl.constexpr,
    FLOAT: tl.constexpr,
):  # fmt: skip
    # of 3 bits the high row follows the low one
    row = WORDS // 2 * 3 if BITS == 3 else WORDS
    line = tl.arange(0, ROWS)[:, None]
    words = tl.load(packed + line * row + tl.arange(0, WORDS)[None, :])
    high = words
    if BITS == 3:
        high = tl.load(packed + line * row + WORDS + tl.arange(0, WORDS // 2)[None, :])
    tiles = unpacked(words, high, table, ROWS, WORDS, BITS, LUT, False, 1, FLOAT)
    for plane in tl.static_range(planes(BITS)):
        at = line * (planes(BITS) * 2 * WORDS) + plane * 2 * WORDS + tl.arange(0, 2 * WORDS)[None, :]
        codes = tiles[plane].to(tl.float32) * power(unit_exponent(FLOAT) - plane_position(BITS, LUT, plane))
        tl.store(out + at, codes)


@triton.jit
def _pairs(stored, low, high, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    first, second = number_pair(tl.load(stored + at))
    tl.store(low + at, first)
    tl.store(high + at, second)


def unpack_by_kernel(words: Tensor, bits: int, entries: Tensor, lut: bool, floats: bool = False) -> Tensor:
    """Codes, entries, or levels of 8-bit floats, `[rows, length]` of `words [rows, words]`, by the kernel."""
    rows, count = words.shape
    out = torch.full((rows, count * 32 // bits), torch.nan)
    table = entries.to(torch.uint8).view(torch.int32)
    _unpack[(1,)](words, table, out, rows, count // 3 * 2 if bits == 3 else count, bits, lut, floats)
    return out


@pytest.mark.parametrize("words", [2, 8, 32])
@pytest.mark.parametrize(("bits", "lut"), ORDERS)
def test_a_row_unpacks_to_what_the_reference_reads(bits, lut, words):
    draw = torch.Generator().manual_seed(bits)
    count = words // 2 * 3 if bits == 3 else words
    # any word is a row of some codes
    packed = torch.randint(-(2**31), 2**31, (16, count), generator=draw).to(torch.int32)
    codes = unpack(packed, bits, count * 32 // bits, by_nibble=lut, dtype=torch.int32)
    entries = torch.arange(16) if not lut else torch.randperm(128, generator=draw)[:16]
    found = unpack_by_kernel(packed, bits, entries, lut)
    assert torch.equal(found, (entries[codes] if bits < 8 else codes).float())


@pytest.mark.parametrize(("bits", "lut"), ORDERS)
def test_every_code_is_found_at_every_place(bits, lut):
    length = {3: 64, 8: 16}.get(bits, 128)
    codes = torch.arange(2**bits)[:, None, None] * torch.eye(length, dtype=torch.int64)
    codes = codes.flatten(0, 1)
    entries = torch.arange(16) * 8 + 7 if lut else torch.arange(16)
    found = unpack_by_kernel(pack(codes, bits, by_nibble=lut), bits, entries, lut)
    assert torch.equal(found, (entries[codes] if lut else codes).float())


def test_every_8_bit_float_is_found_at_every_place():
    length = 16
    codes = torch.arange(256)[:, None].repeat(1, length)
    codes[:, 1::2] = (codes[:, 1::2] * 37 + 11) % 256
    codes = torch.cat([codes, codes.flip(-1)])
    levels = codes.to(torch.uint8).view(torch.float8_e4m3fn).float() * 2**-8
    found = unpack_by_kernel(pack(codes, 8), 8, torch.arange(16), False, True)
    numbers = ~levels.isnan()
    assert numbers.sum() == 254 * 2 * length
    assert torch.equal(found[numbers].view(torch.int32), levels[numbers].view(torch.int32))
    # what is no number to e4m3 is one of float16
    assert (found[~numbers].abs() == 1.875).all()


def test_pairs_of_scales_come_apart_whatever_their_signs():
    bits = torch.randint(-(2**15), 2**15, (1024, 2), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    numbers = bits.view(torch.float16)
    low, high = torch.full((2, 1024), -1.0)
    _pairs[(1,)](numbers.view(torch.int32), low, high, 1024)
    torch.testing.assert_close(low, numbers[:, 0].float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(high, numbers[:, 1].float(), rtol=0, atol=0, equal_nan=True)
