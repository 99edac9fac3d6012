"""8-bit floats: e4m3, four bits of exponent and three of mantissa, as levels that end at 1.75.

A level is the number times 2**-8, which float16 has with the same bits, sign and rest moved apart.
"""

import torch
from torch import Tensor

FLOAT8_MAX = 1.75
"""The largest level: 448, the largest e4m3 number, times 2**-8."""


def to_float8(ratio: Tensor) -> Tensor:
    """The nearest e4m3 numbers to `ratio * 2**8`, ends included, as the bytes they are: uint8."""
    return (ratio.clamp(-FLOAT8_MAX, FLOAT8_MAX) * 256).to(torch.float8_e4m3fn).view(torch.uint8)


def from_float8(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `to_float8`, of uint8 codes."""
    return codes.view(torch.float8_e4m3fn).to(dtype).mul_(1 / 256)
