"""What kernels write in assembly does what its portable form does.

`test_compiled.py` runs this with TRITON_INTERPRET=1.
"""

from typing import Any
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl
from assembly import emulated
from torch import Tensor
from torch.testing import assert_close

from cachequant.kernels import quantize
from cachequant.kernels.format import Format, LayerFormat, Side
from cachequant.kernels.fused import PackedSegment
from cachequant.kernels.quantize import Tables
from cachequant.kernels.triton import launch
from cachequant.kernels.triton.words import planes, unpacked

ROWS, WORDS = 4, 8
HEAD_DIM = 128


@triton.jit
def _unpack(
    WORDS_IN, HIGH, TABLE, OUT, R: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, LUT: tl.constexpr,
    FLOAT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, R)[:, None]
    words = tl.load(WORDS_IN + rows * W + tl.arange(0, W)[None, :])
    high = tl.load(HIGH + rows * (W // 2) + tl.arange(0, W // 2)[None, :])
    tiles: Any = unpacked(words, high, TABLE, R, W, BITS, LUT, ASM, 1, FLOAT)
    for plane in tl.static_range(planes(BITS)):  # pyright: ignore[reportGeneralTypeIssues]
        place = plane * R * 2 * W + rows * 2 * W + tl.arange(0, 2 * W)[None, :]
        tl.store(OUT + place, tiles[plane].to(tl.int16, bitcast=True))


@pytest.mark.parametrize(
    ("bits", "lut", "floats"),
    [
        (2, False, False),
        (2, True, False),
        (3, True, False),
        (4, False, False),
        (4, True, False),
        (8, False, False),
        (8, False, True),
    ],
)
def test_words_unpack_to_the_same_bits(bits: int, lut: bool, floats: bool) -> None:
    generator = torch.Generator().manual_seed(bits)

    def random_words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)

    words, high = random_words(ROWS, WORDS), random_words(ROWS, WORDS // 2)
    entries = torch.randperm(128, generator=generator)[:16].to(torch.uint8).view(torch.int32)
    shape = (8 if bits == 3 else 16 // bits, ROWS, 2 * WORDS)
    portable, assembly = (torch.full(shape, -1, dtype=torch.int16) for _ in range(2))
    launch_unpack: Any = _unpack[(1,)]
    launch_unpack(words, high, entries, portable, ROWS, WORDS, bits, lut, floats, False)
    with emulated():
        launch_unpack(words, high, entries, assembly, ROWS, WORDS, bits, lut, floats, True)
    assert (portable != -1).all()
    assert torch.equal(assembly, portable)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (Format(bits=4), Format(bits=2)),
        (Format(bits=3), Format(bits=8)),
        (Format(bits=8, codes="float8", symmetric=True), Format(bits=8, codes="float8", symmetric=True)),
        (Format(bits=4, codes="codebook", scale="static"), Format(bits=4, codes="codebook")),
        (Format(bits=4, codes="codebook", scale="static", rope="pre"), Format(bits=4)),
    ],
    ids=["plain", "planes of three bits", "8-bit floats", "codebook", "before RoPE"],
)
def test_attention_comes_to_the_same(key: Format, value: Format) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 1, 1, 256, HEAD_DIM, generator=generator)
    levels = torch.tensor([-1.0, -0.7, -0.5, -0.4, -0.3, -0.2, -0.1, 0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1])
    tables: dict[Side, Tables] = {
        "key": Tables(levels, torch.full((1, HEAD_DIM), 3.0), torch.full((1, HEAD_DIM), 0.5)),
        "value": Tables(levels),
    }
    packed_key = quantize.encode(states[0], key, "key", 128, tables=tables["key"])
    packed_value = quantize.encode(states[1], value, "value", 128, tables=tables["value"])
    turns = torch.outer(torch.arange(256.0), 0.5 ** torch.arange(HEAD_DIM // 2).div(8))[None]
    segment = PackedSegment(
        packed_key, packed_value, LayerFormat(key=key, value=value), tables,
        angles=(turns.cos(), turns.sin()) if key.rope == "pre" else None,
    )  # fmt: skip
    query = torch.randn(1, 4, 1, HEAD_DIM, generator=generator)
    portable = launch.attend(query, segment, [], HEAD_DIM**-0.5, None, None)
    with emulated(), patch.object(launch, "assembly", lambda: True):
        assembly = launch.attend(query, segment, [], HEAD_DIM**-0.5, None, None)
    assert_close(assembly, portable, rtol=2e-3, atol=2e-3)
