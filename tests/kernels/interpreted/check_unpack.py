"""Triton's unpacked states are the reference's, bit for bit. Needs TRITON_INTERPRET=1."""

import warnings
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from cachequant.kernels import backend, quantize
from cachequant.kernels.format import Format
from cachequant.kernels.packing import pack
from cachequant.kernels.quantize import NO_TABLES, Tables, decode, encode
from cachequant.kernels.triton import unpack as kernels

HEADS, BLOCK, BLOCKS = 2, 32, 2
SIDES = ["key", "value"]
FLOAT8 = Format(bits=8, codes="float8", symmetric=True)
FORMATS = {
    **{f"{bits}bit": Format(bits=bits) for bits in (2, 3, 4, 8)},
    **{f"{bits}bit-book": Format(codes="codebook", bits=bits) for bits in (2, 3, 4, 8)},
    "groups": Format(bits=2, group=16),
    "symmetric": Format(bits=3, symmetric=True),
    "book-symmetric": Format(codes="codebook", symmetric=True),
    "channel": Format(bits=2, scale="channel"),
    "channel-symmetric": Format(bits=4, scale="channel", symmetric=True),
    "static": Format(bits=3, scale="static"),
    "rotated": Format(bits=4, rotation="hadamard"),
    "rotated-16": Format(bits=4, rotation="hadamard", rotation_size=16),
    "midpoint": Format(bits=2, grid="midpoint"),
    "float8": FLOAT8,
    "float8-groups": FLOAT8.model_copy(update={"group": 16}),
    "float8-channel": FLOAT8.model_copy(update={"scale": "channel"}),
    "float8-static": FLOAT8.model_copy(update={"scale": "static"}),
    "outliers": Format(bits=2, outliers=7),
    "kvquant-key": Format(codes="codebook", bits=3, scale="static", outliers=2, rope="pre"),
    "kvquant-value": Format(codes="codebook", bits=3, outliers=2, trim=1),
}


@pytest.fixture(autouse=True)
def kernels_or_an_error() -> Iterator[None]:
    """Whatever falls back to the reference is an error, and memory that nothing is written to is NaN."""
    assert backend.triton_serves(torch.device("cpu"))
    with warnings.catch_warnings(), patch.object(Tensor, "new_empty", _poisoned):
        warnings.simplefilter("error", UserWarning)
        yield
    backend.warn_once.cache_clear()


_new_empty = Tensor.new_empty


def _poisoned(*arguments: Any, **options: Any) -> Tensor:
    memory = _new_empty(*arguments, **options)
    return memory.fill_(torch.nan) if memory.is_floating_point() else memory


def tables_of(fmt: Format, head_dim: int, **more: Tensor) -> Tables:
    generator = torch.Generator().manual_seed(fmt.bits)
    return Tables(
        codebook=torch.randn(2**fmt.bits, generator=generator).sort().values,
        scale=torch.rand(HEADS, head_dim, generator=generator) * 3,
        zero=torch.randn(HEADS, head_dim, generator=generator),
        **more,
    )


def blocks_of(
    fmt: Format, side: str, head_dim: int, tables: Tables, blocks: int = BLOCKS, block: int = BLOCK, batch: int = 1
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(head_dim)
    states = torch.randn(batch, HEADS, blocks * block, head_dim, generator=generator)
    states = states * torch.logspace(-1, 1, head_dim) + torch.linspace(-2, 3, head_dim)
    with backend.reference_only():
        return encode(states, fmt, side, block, tables=tables)


def by_reference(
    packed: dict[str, Tensor], fmt: Format, side: str, head_dim: int, tables: Tables, dtype=torch.float32, block=BLOCK
) -> Tensor:
    with backend.reference_only():
        return decode(packed, fmt, side, head_dim, block, tables, dtype)


def every(formats: dict[str, Format]):
    return pytest.mark.parametrize("fmt", formats.values(), ids=formats)


@pytest.mark.parametrize("head_dim", [80, 128])
@pytest.mark.parametrize("side", SIDES)
@every(FORMATS)
def test_states_are_those_of_the_reference(fmt, side, head_dim):
    tables = tables_of(fmt, head_dim)
    packed = blocks_of(fmt, side, head_dim, tables)
    states, expected = (
        decode(packed, fmt, side, head_dim, BLOCK, tables),
        by_reference(packed, fmt, side, head_dim, tables),
    )
    if fmt.rotation == "none":
        assert torch.equal(states, expected)
    else:
        # products of matrices whose memory lies otherwise may be summed in another order
        torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("head_dim", "block"), [(64, 64), (96, 128), (256, 32), (64, 256)])
@every({name: FORMATS[name] for name in ("3bit", "channel", "kvquant-value")})
def test_heads_and_blocks_of_other_sizes_are_served(fmt, side, head_dim, block):
    tables = tables_of(fmt, head_dim)
    packed = blocks_of(fmt, side, head_dim, tables, 1, block)
    states = decode(packed, fmt, side, head_dim, block, tables)
    assert torch.equal(states, by_reference(packed, fmt, side, head_dim, tables, block=block))


@pytest.mark.parametrize("side", SIDES)
@every({name: FORMATS[name] for name in ("4bit", "static", "float8", "kvquant-key", "kvquant-value")})
def test_gain_and_offset_change_what_levels_stand_for(fmt, side):
    tables = tables_of(fmt, 64, gain=torch.tensor(1.05), offset=torch.tensor(-0.014))
    packed = blocks_of(fmt, side, 64, tables)
    states = decode(packed, fmt, side, 64, BLOCK, tables)
    assert torch.equal(states, by_reference(packed, fmt, side, 64, tables))
    assert not torch.equal(states, by_reference(packed, fmt, side, 64, tables_of(fmt, 64)))


@pytest.mark.parametrize("side", SIDES)
@every({name: FORMATS[name] for name in ("4bit", "kvquant-value", "float8", "rotated")})
def test_states_are_rounded_once_to_the_dtype_asked_for(fmt, side):
    tables = tables_of(fmt, 64)
    packed = blocks_of(fmt, side, 64, tables)
    for dtype, wide in (
        (torch.float64, torch.float64),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        states = decode(packed, fmt, side, 64, BLOCK, tables, dtype)
        assert states.dtype == dtype
        expected = by_reference(packed, fmt, side, 64, tables, wide)
        if dtype == torch.bfloat16 and fmt.rotation == "none":
            # the interpreter cuts bfloat16 off
            torch.testing.assert_close(states.float(), expected, rtol=2**-7, atol=0)
        elif fmt.rotation == "hadamard":
            torch.testing.assert_close(states, expected.to(dtype), atol=1e-5, rtol=2 * torch.finfo(dtype).eps)
        else:
            assert torch.equal(states, expected.to(dtype))


@pytest.mark.parametrize("side", SIDES)
@every({name: FORMATS[name] for name in ("channel", "kvquant-key", "kvquant-value")})
def test_blocks_may_be_views_of_longer_buffers(fmt, side):
    tables = tables_of(fmt, 64)
    packed = blocks_of(fmt, side, 64, tables, blocks=4, batch=3)
    chosen = {
        "inside": {name: tensor[:, :, 1:3] for name, tensor in packed.items()},
        "rows": {name: tensor[1:, :, 1:] for name, tensor in packed.items()},
        "every-other": {name: tensor[:, :, ::2] for name, tensor in packed.items()},
        "one-row-repeated": {name: tensor[:1].expand(2, *tensor.shape[1:]) for name, tensor in packed.items()},
        "heads": {name: tensor[:, 1:] for name, tensor in packed.items()},
        "capacities": {**packed, "codes": torch.cat([packed["codes"]] * 2, 2)[:, :, :4]},
    }
    for name, view in chosen.items():
        heads = slice(1, None) if name == "heads" else slice(None)
        some = Tables(**{
            key: table[heads] if key in ("scale", "zero") else table for key, table in tables.tensors().items()
        })  # fmt: skip
        states = decode(view, fmt, side, 64, BLOCK, some)
        assert torch.equal(states, by_reference(view, fmt, side, 64, some)), name


@pytest.mark.parametrize("side", SIDES)
def test_all_8_bit_floats_are_what_torch_reads(side):
    packed = blocks_of(FLOAT8, side, 64, NO_TABLES)
    codes = torch.arange(packed["codes"].numel() * 4) * 7 % 256
    packed["codes"] = pack(codes.view(1, HEADS, BLOCKS, -1, 64 if side == "key" else BLOCK), 8)
    packed["scales"] = torch.ones_like(packed["scales"])
    states = decode(packed, FLOAT8, side, 64, BLOCK)
    levels = codes.to(torch.uint8).view(torch.float8_e4m3fn).float() * 2**-8
    levels = levels.view(1, HEADS, BLOCKS, -1, 64 if side == "key" else BLOCK)
    levels = (levels if side == "key" else levels.transpose(-1, -2)).flatten(2, 3)
    torch.testing.assert_close(states, levels, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("side", SIDES)
def test_outliers_of_a_row_are_added_wherever_they_are(side):
    fmt = Format(bits=2, outliers=3)
    packed = blocks_of(fmt, side, 64, NO_TABLES)
    length = 64 if side == "key" else BLOCK
    packed["outlier_index"][:] = torch.tensor([0, length - 1, length // 2], dtype=torch.int16)
    packed["outlier_value"][:] = torch.tensor([1e4, -2e-7, torch.inf], dtype=torch.float16)
    # an idle slot beside one in use
    packed["outlier_index"][..., 0, :], packed["outlier_value"][..., 0, 1:] = 5, 0
    states = decode(packed, fmt, side, 64, BLOCK)
    assert torch.equal(states, by_reference(packed, fmt, side, 64, NO_TABLES))


@pytest.mark.parametrize("side", SIDES)
def test_poison_of_a_grid_stays_in_its_token_or_channel(side):
    packed = blocks_of(FORMATS["channel"], side, 64, NO_TABLES)
    packed["scales"][0, 1, 0, 3] = torch.nan
    states = decode(packed, FORMATS["channel"], side, 64, BLOCK)
    assert states[0, 1, :BLOCK, 3].isnan().all()
    assert states.isnan().sum() == BLOCK


@pytest.mark.parametrize("side", SIDES)
def test_no_blocks_are_no_tokens(side):
    fmt = FORMATS["outliers"]
    packed = {name: tensor[:, :, :0] for name, tensor in blocks_of(fmt, side, 64, NO_TABLES).items()}
    assert decode(packed, fmt, side, 64, BLOCK).shape == (1, HEADS, 0, 64)


@pytest.mark.parametrize("implementation", ["kernel", "reference"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda packed: packed.pop("scales"), r"packed blocks lack \['scales'\]"),
        (lambda packed: packed.update(codes=packed["codes"].long()), r"packed\['codes'\] must be torch.int32"),
        (lambda packed: packed.update(scales=packed["scales"][:, :, :1]), r"packed\['scales'\] must be torch.float16"),
        (lambda packed: packed.update(scales=packed["scales"].to("meta")), "scales is on meta"),
    ],
    ids=["missing", "dtype", "blocks", "device"],
)
def test_blocks_that_do_not_fit_are_refused(change, message, implementation):
    packed = blocks_of(FORMATS["4bit"], "key", 64, NO_TABLES)
    change(packed)
    with pytest.raises(ValueError, match=message):
        if implementation == "kernel":
            decode(packed, FORMATS["4bit"], "key", 64, BLOCK)
        else:
            by_reference(packed, FORMATS["4bit"], "key", 64, NO_TABLES)


def test_what_is_not_served_goes_to_the_reference_with_one_warning():
    fmt = FORMATS["static"]
    tables = tables_of(fmt, 64)
    packed = blocks_of(fmt, "key", 64, tables)
    double = Tables(scale=tables.scale.double(), zero=tables.zero)
    assert kernels.unserved(fmt, "key", 64, BLOCK, double) == "scale in torch.float64 (not float32)"
    with pytest.warns(UserWarning, match="do not decode scale in torch.float64") as caught:
        states = [decode(packed, fmt, "key", 64, BLOCK, double) for _ in range(2)]
    assert len(caught) == 1
    assert torch.equal(states[1], by_reference(packed, fmt, "key", 64, double))


def test_kernels_are_what_decodes():
    packed = blocks_of(FORMATS["4bit"], "key", 64, NO_TABLES)
    with patch.object(quantize, "decode_rows", side_effect=AssertionError):
        decode(packed, FORMATS["4bit"], "key", 64, BLOCK)
