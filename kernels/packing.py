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
    codes = _contiguous(torch.nn.functional.pad(codes.to(torch.uint8), (0, padding)))
    if bits == 3:
        return _pack3(codes)
    if bits == 4 and by_nibble:
        low, high = codes.unflatten(-1, (2, 2, words * 2)).unbind(-2)
        return _join_pairs(low | (high << 4))
    planes = codes.unflatten(-1, (16 // bits, words * 2)).to(torch.int16)
    halves = torch.zeros_like(planes[..., 0, :])
    for plane in range(16 // bits):
        halves |= planes[..., plane, :] << (plane * bits)  # the sign bit is a bit like any other
    return halves.view(torch.int32)


def unpack(words: Tensor, bits: int, length: int, by_nibble: bool = False, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Codes `[..., length]` of int32 words `[..., W]`, written as `dtype`."""
    if bits == 3:
        return _unpack3(words, dtype)[..., :length]
    if bits == 4 and by_nibble:
        codes = _planes(_split_pairs(words), torch.arange(0, 8, 4, device=words.device), 15)
        return codes.movedim(0, -2).to(dtype, memory_format=torch.contiguous_format).flatten(-3)[..., :length]
    halves = _contiguous(words).view(torch.int16)
    codes = _planes(halves, torch.arange(0, 16, bits, device=words.device), (1 << bits) - 1)
    return codes.movedim(0, -2).to(dtype, memory_format=torch.contiguous_format).flatten(-2)[..., :length]


def _pack3(codes: Tensor) -> Tensor:
    # [..., k, pair, plane, byte]: see `_unpack3`
    codes = codes.unflatten(-1, (2, 2, 2, -1))
    low = torch.zeros_like(codes[..., 0, :, 0, :])
    high = torch.zeros_like(low)
    for k in range(2):
        for plane in range(2):
            code = codes[..., k, :, plane, :]
            low |= (code & 3) << (4 * plane + 2 * k)
            high |= (code >> 2) << (4 * plane + k)
    even, odd = high.unflatten(-1, (-1, 2, 2)).unbind(-2)
    return torch.cat([_join_pairs(low), _join_pairs((even | (odd << 2)).flatten(-2))], dim=-1)


def _unpack3(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Plane `4*k + 2*pair + plane` of half `h` of 2-bit word `u`: bits `4*plane + 2*k` of byte `2*pair + h` of that
    word, and bit `4*plane + 2*(u % 2) + k` of the same byte of 1-bit word `u // 2`."""
    count = words.shape[-1] // 3 * 2
    low = _split_pairs(words[..., :count])
    high = _split_pairs(words[..., count:]).view(torch.int16)
    # what a shift by two carries from one byte into the next is never read
    high = torch.stack([high, high >> 2], dim=-1).flatten(-2).view(torch.uint8)
    two = torch.arange(2, device=words.device)
    plane, k = 4 * two, two[:, None]
    codes = _planes(low, (plane + 2 * k).flatten(), 3) | _planes(high, (plane + k).flatten(), 1) << 2
    # [k, plane, ..., pair, byte] to [..., k, pair, plane, byte]
    codes = codes.unflatten(0, (2, 2)).movedim((0, 1), (-4, -2))
    return codes.to(dtype, memory_format=torch.contiguous_format).flatten(-4)


def _planes(packed: Tensor, shifts: Tensor, mask: int) -> Tensor:
    """What `packed [...]` holds at each of `shifts [n]`: `[n, ...]`, by three operations on whole tensors."""
    shifts = shifts.to(packed.dtype).view(-1, *[1] * packed.ndim)
    return (packed >> shifts).bitwise_and_(mask)


def _split_pairs(words: Tensor) -> Tensor:
    """int32 words `[..., W]` as the bytes of their low and of their high halves: `[..., 2, 2*W]`."""
    halves = _contiguous(words).view(torch.int16).unflatten(-1, (-1, 2))
    return _contiguous(halves.transpose(-1, -2)).view(torch.uint8)


def _join_pairs(parts: Tensor) -> Tensor:
    """The inverse of `_split_pairs`."""
    halves = _contiguous(parts).view(torch.int16).transpose(-1, -2)
    return _contiguous(halves).flatten(-2).view(torch.int32)


def _contiguous(tensor: Tensor) -> Tensor:
    # `contiguous()` leaves odd strides on dimensions of size 1, which `view(dtype)` then refuses
    plain = tensor.is_contiguous() and tensor.stride(-1) == 1
    return tensor if plain else tensor.clone(memory_format=torch.contiguous_format)
