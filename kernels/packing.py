"""Codes to int32 words and back, in the plane layout the decode kernels read.

A word is two 16-bit halves. With `P = 16 / bits` planes per half, bits `[j*bits, (j+1)*bits)` of half `h` of word `w`
hold code `(L/P)*j + 2*w + h` of a row of `L` codes: a plane is a run of consecutive codes, so unpacking is one shift
and one mask per plane, with no shuffle. Codebook rows of 4 bits order the same codes by nibble
`4*(j//2) + j%2 + 2*h` instead, which is what two byte permutes of a table look-up produce. Rows of 3 bits are a 2-bit
row followed by a 1-bit row.
"""

import torch
from torch import Tensor

from .format import row_words


def pack(codes: Tensor, bits: int, by_nibble: bool = False) -> Tensor:
    """Pack codes `[..., L]` (any integer dtype, values below `2**bits`) into int32 words `[..., W]`.

    `by_nibble` selects the codebook order of 4-bit rows. Rows are padded with zeros to whole words.
    """
    words = row_words(codes.shape[-1], bits)
    padding = words * 32 // bits - codes.shape[-1]
    codes = torch.nn.functional.pad(codes.to(torch.int32), (0, padding))
    if bits == 3:
        return _pack3(codes)
    planes = 16 // bits
    codes = codes.unflatten(-1, (planes, words, 2))
    packed = torch.zeros_like(codes[..., 0, :, 0])
    for plane in range(planes):
        for half in range(2):
            # int32 shifts wrap into the sign bit, which is the bit pattern wanted
            packed |= codes[..., plane, :, half] << _shift(plane, half, bits, by_nibble)
    return packed


def unpack(words: Tensor, bits: int, length: int, by_nibble: bool = False, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Codes `[..., length]` of int32 words `[..., W]`, written as `dtype`."""
    if bits == 3:
        return _unpack3(words, dtype)[..., :length]
    planes, mask = 16 // bits, (1 << bits) - 1
    run = words.shape[-1] * 2
    codes = torch.empty(*words.shape[:-1], planes * run, dtype=dtype, device=words.device)
    if by_nibble and bits == 4:
        for plane in range(planes):
            for half in range(2):
                shift = _shift(plane, half, bits, True)
                codes[..., plane * run + half : (plane + 1) * run : 2] = (words >> shift) & mask
    else:
        halves = words.contiguous().view(torch.int16)
        for plane in range(planes):
            codes[..., plane * run : (plane + 1) * run] = (halves >> (plane * bits)) & mask
    return codes[..., :length]


def _shift(plane: int, half: int, bits: int, by_nibble: bool) -> int:
    if by_nibble and bits == 4:
        return 4 * (4 * (plane // 2) + plane % 2 + 2 * half)
    return plane * bits + 16 * half


def _planes3() -> list[tuple[int, int, int, int]]:
    """(plane, half, shift in the 2-bit word, shift in the 1-bit word) of the sixteen codes a 2-bit word carries."""
    table = []
    for k in range(2):
        for p in range(4):
            for half in range(2):
                nibble = 4 * (p // 2) + p % 2 + 2 * half
                table.append((4 * k + p, half, 4 * nibble + 2 * k, 4 * nibble + k))
    return table


_PLANES3 = _planes3()


def _pack3(codes: Tensor) -> Tensor:
    words = codes.shape[-1] // 16
    codes = codes.unflatten(-1, (8, words, 2))
    low = torch.zeros_like(codes[..., 0, :, 0])
    high = torch.zeros_like(low)
    for plane, half, low_shift, high_shift in _PLANES3:
        code = codes[..., plane, :, half]
        low |= (code & 3) << low_shift
        high |= (code >> 2) << high_shift
    # two neighbouring 2-bit words share one word of high bits
    high = high[..., 0::2] | (high[..., 1::2] << 2)
    return torch.cat([low, high], dim=-1)


def _unpack3(words: Tensor, dtype: torch.dtype) -> Tensor:
    count = words.shape[-1] // 3 * 2
    low, high = words[..., :count], words[..., count:]
    high = torch.stack([high, high >> 2], dim=-1).flatten(-2)
    codes = torch.empty(*words.shape[:-1], 8, count, 2, dtype=dtype, device=words.device)
    for plane, half, low_shift, high_shift in _PLANES3:
        codes[..., plane, :, half] = ((low >> low_shift) & 3) | (((high >> high_shift) & 1) << 2)
    return codes.flatten(-3)
