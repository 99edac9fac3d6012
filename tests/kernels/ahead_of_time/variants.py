"""The kernels that are compiled ahead of time, with bounds on what comes out.

Host code is given small tensors on the CPU: constants and the specialisation of arguments are those of a launch.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple
from unittest.mock import patch

import torch
from machine_code import Code, compiled

from cachequant.kernels import quantize
from cachequant.kernels.format import DEFAULT_BLOCK, Format, LayerFormat, Side
from cachequant.kernels.fused import ExactSegment, PackedSegment
from cachequant.kernels.quantize import Tables
from cachequant.kernels.rows import Run, encode_rows
from cachequant.kernels.triton import encode, launch, rows, unpack

HEADS = 2
BLOCKS = 3


class Variant(NamedTuple):
    """What to launch, which of the kernels to look at, and how many elements one turn of its hottest loop treats.

    registers: most that a thread may have. stack: most bytes that it may spill, outside the loop. stores: most
        instructions of the loop that store to shared memory: weights pass through it, unpacked codes must not. shared:
        most bytes of shared memory. on: the targets to compile for, not all for the sake of time.
    """

    launch: Callable[[], object]
    kernel: str
    elements: int
    registers: int = 168
    stores: int = 20
    shared: int = 48 * 1024
    on: tuple[str, ...] = ("sm_90",)
    stack: int = 0


def measure(variant: Variant, target: str) -> Code:
    """The machine code of `variant` for one of `machine_code.TARGETS`."""
    with patch.object(launch, "processors", lambda device: 132), compiled(target) as codes:
        variant.launch()
    return {code.name: code for code in codes}[variant.kernel]


def attention(
    key: Format,
    value: Format | None = None,
    head_dim: int = 128,
    block: Literal[32, 64, 128, 256] = DEFAULT_BLOCK,
    group: int = 4,
    registers: int = 168,
    stores: int = 20,
    shared: int = 48 * 1024,
    on: tuple[str, ...] = ("sm_90",),
) -> Variant:
    """A decoding step of `group` query heads per kv head; an element is a number of a key or of a value."""
    formats = LayerFormat(key=key, value=value or key.model_copy(update={"rope": "post"}), block=block)
    step = 2 * head_dim * max(block, 128)
    return Variant(partial(_attend, formats, head_dim, group), "attend_blocks", step, registers, stores, shared, on)


def _attend(formats: LayerFormat, head_dim: int, group: int) -> None:
    tokens = BLOCKS * formats.block
    states = torch.randn(1, HEADS, tokens, head_dim)
    tables: dict[Side, Tables] = {"key": _tables(formats.key, head_dim), "value": _tables(formats.value, head_dim)}
    key = quantize.encode(states, formats.key, "key", formats.block, tables=tables["key"])
    value = quantize.encode(states, formats.value, "value", formats.block, tables=tables["value"])
    cos = sin = torch.zeros(1, tokens, head_dim // 2, dtype=torch.float16)
    angles = (cos, sin) if formats.key.rope == "pre" else None
    segment = PackedSegment(key, value, formats, tables, angles=angles)
    query = torch.zeros(1, HEADS * group, 1, head_dim, dtype=torch.bfloat16)
    launch.attend(query, segment, [], head_dim**-0.5, None, None)


def _tables(fmt: Format, head_dim: int) -> Tables:
    codebook = torch.linspace(-1, 1, 2**fmt.bits) ** 3 if fmt.codes == "codebook" else None
    if fmt.scale != "static":
        return Tables(codebook=codebook)
    return Tables(codebook=codebook, scale=torch.ones(HEADS, head_dim), zero=torch.zeros(HEADS, head_dim))


def _attend_exact() -> None:
    key, value = torch.zeros(2, 1, HEADS, 1024, 128, dtype=torch.bfloat16)
    query = torch.zeros(1, HEADS * 4, 1, 128, dtype=torch.bfloat16)
    launch.attend(query, None, [ExactSegment(key, value)], 128**-0.5, None, None)


def _run(fmt: Format, tokens: int = 256, dim: int = 128) -> Run:
    numbers = torch.randn(tokens, dim)
    starts = torch.tensor([0, tokens], dtype=torch.int32)
    return Run(fmt, encode_rows(numbers, fmt), starts, torch.arange(tokens, dtype=torch.int32), tokens, 0.0)


def _row_scores(fmt: Format) -> None:
    rows.scores(torch.zeros(1, 1, 4, 128), [_run(fmt)], 256)


def _row_mix(fmt: Format) -> None:
    rows.mix(torch.zeros(1, 1, 4, 256), [_run(fmt)], 128)


def _encode(fmt: Format, side: Side) -> None:
    states = torch.zeros(1, HEADS, BLOCKS * 128, 128, dtype=torch.bfloat16)
    encode.encode(states, fmt, side, 128, tables=_tables(fmt, 128))


def _unpack(fmt: Format, side: Side) -> None:
    states = torch.zeros(1, HEADS, BLOCKS * 128, 128)
    packed = quantize.encode(states, fmt, side, 128, tables=_tables(fmt, 128))
    unpack.decode(packed, fmt, side, 128, 128, _tables(fmt, 128), torch.bfloat16)


BITS = {bits: Format(bits=bits) for bits in (2, 3, 4, 8)}
CODEBOOK = Format(bits=4, codes="codebook")
STATIC = Format(bits=4, codes="codebook", scale="static")
FLOAT8 = Format(bits=8, codes="float8", symmetric=True)
NORM = Format(bits=4, codes="codebook", symmetric=True, unit="norm")

ANY = 255
"""Registers that the hardware has for a thread."""

VARIANTS = {
    "k4v4": attention(BITS[4], on=("sm_90", "sm_80", "sm_100", "gfx942")),
    "k2v2": attention(BITS[2], on=("sm_90", "gfx942")),
    "k3v3": attention(BITS[3]),
    "k8v8": attention(BITS[8], registers=192, on=("sm_80",)),
    "float8": attention(FLOAT8, registers=192, on=("sm_90", "sm_80")),
    "k4v2": attention(BITS[4], BITS[2]),
    # the stack is of Triton 3.6
    "k4v4, 8 query heads": attention(BITS[4], group=8, on=("sm_80",))._replace(stack=8),
    "k4v4, 16 query heads": attention(BITS[4], group=16, registers=ANY),
    "k4v4, head_dim 64": attention(BITS[4], head_dim=64),
    "k4v4, head_dim 96": attention(BITS[4], head_dim=96, on=("sm_80",)),
    "k4v4, head_dim 256": attention(BITS[4], head_dim=256, registers=ANY),
    "k4v4, block 32": attention(BITS[4], block=32, on=("sm_80",)),
    "k4v4, group 32": attention(Format(bits=4, group=32), registers=ANY, stores=40),
    "k2v2, keys by channel": attention(Format(bits=2, scale="channel"), BITS[2], registers=ANY, stores=40),
    # the hottest loop is that over the blocks of a step: a fourth of its keys
    "k2v2, keys by channel, block 32": attention(
        Format(bits=2, scale="channel"), Format(bits=2, group=32), block=32, registers=ANY, stores=80
    )._replace(elements=128 * 32, stack=80),
    "codebook": attention(STATIC, CODEBOOK, registers=ANY),
    "codebook, outliers": attention(
        STATIC.model_copy(update={"outliers": 2}),
        Format(bits=4, codes="codebook", outliers=4),
        registers=ANY,
        stores=60,
    ),
    "codebook before RoPE": attention(
        STATIC.model_copy(update={"rope": "pre"}),
        CODEBOOK,
        registers=ANY,
        stores=40,
        shared=72 * 1024,
    ),
    "exact": Variant(_attend_exact, "attend_exact", 2 * 64 * 128, shared=80 * 1024),
    "row scores": Variant(partial(_row_scores, BITS[4]), "score_rows", 64 * 128),
    "row mix": Variant(partial(_row_mix, BITS[4]), "mix_rows", 64 * 128, stores=60),
    "encode keys": Variant(partial(_encode, BITS[4], "key"), "_write_codes", 4096, stores=60, on=("sm_90", "gfx942")),
    "encode values": Variant(partial(_encode, BITS[4], "value"), "_write_codes", 4096, stores=60, stack=8),
    "encode float8": Variant(partial(_encode, FLOAT8, "key"), "_write_codes", 4096, stores=60),
    "encode norms": Variant(partial(_encode, NORM, "value"), "_restore_norms", 4096, stores=60),
    "unpack": Variant(partial(_unpack, BITS[4], "key"), "_write_states", 4096),
}

CASES = [(name, target) for name, variant in VARIANTS.items() for target in variant.on]
