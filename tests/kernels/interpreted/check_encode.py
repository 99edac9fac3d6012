"""Triton's encoder is the reference's, bit for bit. Needs TRITON_INTERPRET=1."""

import warnings
from collections.abc import Iterator
from itertools import product
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from cachequant.kernels import backend, quantize
from cachequant.kernels.format import Format
from cachequant.kernels.quantize import NO_TABLES, Tables, decode, encode, packed_shapes
from cachequant.kernels.rows import encode_rows
from cachequant.kernels.triton import encode as kernels

HEADS, BLOCK, BLOCKS = 2, 32, 2
SIDES = ["key", "value"]
GRIDS = {
    "token": {},
    "groups": {"group": 16},
    "symmetric": {"symmetric": True},
    "channel": {"scale": "channel"},
    "channel-symmetric": {"scale": "channel", "symmetric": True},
    "static": {"scale": "static"},
    "midpoint": {"grid": "midpoint"},
    "channel-midpoint": {"scale": "channel", "grid": "midpoint"},
}
AFFINE = {
    f"{bits}bit-{name}": Format(bits=bits, **GRIDS[name])
    for bits, name in [*product((2, 3), GRIDS), *product((4, 8), ("token", "channel"))]
}
CODEBOOKS = {
    f"{bits}bit-book-{name}": Format(codes="codebook", bits=bits, **GRIDS[name])
    for bits, name in [*product((2, 3, 4), ("token", "static")), (3, "symmetric"), (3, "channel"), (8, "token")]
}
FLOAT8 = Format(codes="float8", bits=8, symmetric=True)
FLOATS = {
    f"float8-{name}": FLOAT8.model_copy(update=change)
    for name, change in {
        "token": {}, "groups": {"group": 16}, "channel": {"scale": "channel"}, "static": {"scale": "static"}
    }.items()
}  # fmt: skip
UNITS = {
    name: Format(codes="codebook", symmetric=True, **settings)
    for name, settings in {
        "rms": {"unit": "rms"}, "norm": {"unit": "norm"}, "norm-groups": {"unit": "norm", "bits": 2, "group": 16}
    }.items()
}  # fmt: skip
SLOTS = {
    "kvquant-key": Format(codes="codebook", bits=3, scale="static", outliers=2, rope="pre"),
    "kvquant-value": Format(codes="codebook", bits=3, outliers=2, trim=1),
    "kvquant-prompt-key": Format(codes="codebook", bits=4, scale="channel", outliers=2, trim=1, rope="pre"),
    "many": Format(bits=2, outliers=7),
    "trimmed": Format(bits=4, outliers=5, trim=3),
    "trimmed-groups": Format(bits=2, group=16, outliers=3, trim=1),
    "trimmed-symmetric": Format(bits=3, scale="channel", symmetric=True, outliers=3, trim=2),
}
ROW_SLOTS = {"midpoint-slots": Format(bits=2, grid="midpoint", outliers=4, trim=2)}


@pytest.fixture(autouse=True)
def kernels_or_an_error() -> Iterator[None]:
    """Whatever falls back to the reference is an error."""
    assert backend.triton_serves(torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of numbers that are not finite
        warnings.simplefilter("error", UserWarning)
        yield
    backend.warn_once.cache_clear()


def random_states(
    head_dim: int, dtype: torch.dtype = torch.float32, blocks: int = BLOCKS, block: int = BLOCK, batch: int = 1
) -> Tensor:
    generator = torch.Generator().manual_seed(head_dim)
    states = torch.randn(batch, HEADS, blocks * block, head_dim, generator=generator)
    # channels of very different size and offset, as keys have
    return (states * torch.logspace(-1, 1, head_dim) + torch.linspace(-2, 3, head_dim)).to(dtype)


def random_tables(fmt: Format, head_dim: int, **more: Tensor) -> Tables:
    generator = torch.Generator().manual_seed(fmt.bits)
    return Tables(
        codebook=torch.randn(2**fmt.bits, generator=generator).sort().values,
        scale=torch.rand(HEADS, head_dim, generator=generator) * 3,
        zero=torch.randn(HEADS, head_dim, generator=generator),
        **more,
    )


def poisoned(
    fmt: Format, side: str, head_dim: int, capacity: int, block: int = BLOCK, batch: int = 1
) -> dict[str, Tensor]:
    """Buffers full of NaN and 77."""
    return {
        name: torch.full((batch, HEADS, capacity, *shape), torch.nan if dtype.is_floating_point else 77, dtype=dtype)
        for name, (shape, dtype) in packed_shapes(fmt, side, head_dim, block).items()
    }


def by_kernel(
    states: Tensor, fmt: Format, side: str, tables: Tables = NO_TABLES, valid: Tensor | None = None, block: int = BLOCK
) -> dict[str, Tensor]:
    blocks = states.shape[2] // block
    out = poisoned(fmt, side, states.shape[3], blocks + 1, block, states.shape[0])
    encode(states, fmt, side, block, valid, tables, out)
    for tensor in out.values():
        beyond = tensor[:, :, blocks:]
        assert (beyond.isnan() if tensor.is_floating_point() else beyond == 77).all()
    return {name: tensor[:, :, :blocks] for name, tensor in out.items()}


def by_reference(
    states: Tensor, fmt: Format, side: str, tables: Tables = NO_TABLES, valid: Tensor | None = None, block: int = BLOCK
) -> dict[str, Tensor]:
    with backend.reference_only():
        return encode(states, fmt, side, block, valid, tables)


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)


def same_but_for_idle_slots(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Slots that nothing needs point anywhere, and add nothing."""
    for name in expected.keys() - {"outlier_index"}:
        assert torch.equal(actual[name], expected[name]), name
    if "outlier_index" in expected:
        used = expected["outlier_value"] != 0
        assert torch.equal(actual["outlier_index"][used], expected["outlier_index"][used])


def every(formats: dict[str, Format]):
    return pytest.mark.parametrize("fmt", formats.values(), ids=formats)


@pytest.mark.parametrize("side", SIDES)
@every(AFFINE | CODEBOOKS | FLOATS | SLOTS)
def test_blocks_are_those_of_the_reference(fmt, side):
    states, tables = random_states(80), random_tables(fmt, 80)
    same(by_kernel(states, fmt, side, tables), by_reference(states, fmt, side, tables))


@pytest.mark.parametrize("head_dim", [96, 256])
@pytest.mark.parametrize("side", SIDES)
@every(
    {name: AFFINE[name] for name in ("3bit-token", "4bit-channel")}
    | {name: SLOTS[name] for name in ("kvquant-key", "kvquant-value", "trimmed-groups")}
)
def test_heads_of_other_sizes_are_served(fmt, side, head_dim):
    states, tables = random_states(head_dim, blocks=1), random_tables(fmt, head_dim)
    same(by_kernel(states, fmt, side, tables), by_reference(states, fmt, side, tables))


@pytest.mark.parametrize("block", [128, 256])
@pytest.mark.parametrize("side", SIDES)
@every({"2bit-channel": AFFINE["2bit-channel"], "kvquant-value": SLOTS["kvquant-value"]})
def test_blocks_of_other_sizes_are_served(fmt, side, block):
    states, tables = random_states(64, blocks=1, block=block), random_tables(fmt, 64)
    same(by_kernel(states, fmt, side, tables, block=block), by_reference(states, fmt, side, tables, block=block))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("bits", "size"), [(2, None), (4, None), (4, 16)])
def test_rotated_blocks_are_those_of_the_reference(bits, size, side):
    fmt, states = Format(bits=bits, rotation="hadamard", rotation_size=size), random_states(96)
    same(by_kernel(states, fmt, side), by_reference(states, fmt, side))


@every(ROW_SLOTS)
def test_slots_of_midpoint_grids_are_the_tails_of_each_key(fmt):
    states = random_states(80)
    same(by_kernel(states, fmt, "key"), by_reference(states, fmt, "key"))


@pytest.mark.parametrize("scale", ["token", "channel"])
@pytest.mark.parametrize("side", SIDES)
def test_mean_grids_differ_by_no_more_than_the_order_of_a_sum(side, scale):
    fmt, states = Format(bits=3, grid="mean", scale=scale), random_states(80)
    actual, expected = by_kernel(states, fmt, side), by_reference(states, fmt, side)
    assert torch.equal(actual["scales"][..., 0], expected["scales"][..., 0])
    torch.testing.assert_close(actual["scales"], expected["scales"], rtol=2**-10, atol=2**-24)
    equal = (actual["scales"] == expected["scales"]).all()
    assert not equal or torch.equal(actual["codes"], expected["codes"])


@pytest.mark.parametrize("head_dim", [80, 128])
@pytest.mark.parametrize("side", SIDES)
@every(UNITS)
def test_units_differ_by_no_more_than_the_order_of_a_sum(fmt, side, head_dim):
    states, tables = random_states(head_dim), random_tables(fmt, head_dim)
    actual, expected = by_kernel(states, fmt, side, tables), by_reference(states, fmt, side, tables)
    torch.testing.assert_close(actual["scales"], expected["scales"], rtol=2**-10, atol=2**-24)
    # few sums are so near to the middle between two numbers that their order matters
    assert (actual["scales"] == expected["scales"]).float().mean() > 0.9
    assert (actual["codes"] != expected["codes"]).float().mean() < 0.05


@pytest.mark.parametrize("side", SIDES)
@every(
    {"token": AFFINE["4bit-token"], "channel": AFFINE["2bit-channel"]}
    | {name: SLOTS[name] for name in ("kvquant-key", "kvquant-value", "kvquant-prompt-key", "trimmed-groups")}
)
def test_what_is_not_valid_is_kept_out_as_in_the_reference(fmt, side):
    states, tables = random_states(64, batch=2), random_tables(fmt, 64)
    # padding of one row through the first block, and a sink; all of the other row's second block
    valid = torch.ones(2, BLOCK * BLOCKS, dtype=torch.bool)
    valid[0, :37], valid[1, 0], valid[1, BLOCK:] = False, False, False
    states = states.masked_fill(~valid[:, None, :, None], 1e4)
    expected = by_reference(states, fmt, side, tables, valid)
    same_but_for_idle_slots(by_kernel(states, fmt, side, tables, valid), expected)


@pytest.mark.parametrize("side", SIDES)
@every({name: SLOTS[name] for name in ("kvquant-key", "kvquant-prompt-key", "trimmed-groups")})
def test_slots_go_by_sensitivity_as_in_the_reference(fmt, side):
    states = random_states(64)
    tables = random_tables(fmt, 64, sensitivity=torch.rand(HEADS, 64, generator=torch.Generator().manual_seed(1)))
    same(by_kernel(states, fmt, side, tables), by_reference(states, fmt, side, tables))


@pytest.mark.parametrize("side", SIDES)
@every({name: SLOTS[name] for name in ("kvquant-key", "kvquant-value", "many")})
def test_residuals_are_relative_to_normalised_levels(fmt, side):
    states = random_states(64)
    tables = random_tables(fmt, 64, gain=torch.tensor(1.05), offset=torch.tensor(-0.014))
    same(by_kernel(states, fmt, side, tables), by_reference(states, fmt, side, tables))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", SIDES)
@every({name: AFFINE[name] for name in ("4bit-token", "3bit-channel")})
def test_other_dtypes_are_encoded_as_their_float32_values(fmt, side, dtype):
    states = random_states(64, dtype)
    same(by_kernel(states, fmt, side), by_reference(states, fmt, side))


def near(points: Tensor) -> Tensor:
    """The points, the numbers next to them, and some beyond, `[1, HEADS, BLOCK, 64]`."""
    infinity = torch.tensor(torch.inf)
    found = torch.cat([points, points.nextafter(infinity), points.nextafter(-infinity), points * 9, -points * 9])
    count = HEADS * BLOCK * 64
    return found.repeat(-(-count // len(found)))[:count].view(1, HEADS, BLOCK, 64)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_numbers_between_two_codes_go_to_the_even_one(bits, side):
    fmt = Format(bits=bits, scale="static")
    tables = Tables(scale=torch.ones(HEADS, 64), zero=torch.zeros(HEADS, 64))
    states = near(torch.arange(2**bits) + 0.5)
    same(by_kernel(states, fmt, side, tables), by_reference(states, fmt, side, tables))


@pytest.mark.parametrize("side", SIDES)
def test_8_bit_floats_are_rounded_as_torch_casts(side):
    fmt, tables = FLOATS["float8-static"], Tables(scale=torch.ones(HEADS, 64), zero=torch.zeros(HEADS, 64))
    finite = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float() * 2**-8
    between = (finite[1:] + finite[:-1]) / 2  # ties, exact in float32
    # every exponent of float32, subnormals and infinity included, with many fractions
    bits = torch.arange(0, 0x7F800001, 0x7F800000 // 1360, dtype=torch.int32)
    sizes = torch.cat([between, finite, bits.view(torch.float32), torch.tensor([0.0, 1.7500001, torch.inf])])
    points = torch.cat([sizes, -sizes])
    infinity = torch.tensor(torch.inf)
    swept = torch.cat([points, points.nextafter(infinity), points.nextafter(-infinity)])
    swept = swept[~swept.isnan()]
    size = HEADS * BLOCK * 64
    for part in swept.split(size):
        states = torch.nn.functional.pad(part, (0, size - len(part))).view(1, HEADS, BLOCK, 64)
        same(by_kernel(states, fmt, side, tables), by_reference(states, fmt, side, tables))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_numbers_between_two_levels_go_where_bucketize_sends_them(bits, side):
    fmt = Format(codes="codebook", bits=bits, scale="static")
    levels = (torch.arange(2**bits) / 2 ** (bits - 1) - 1) ** 3
    tables = Tables(codebook=levels, scale=torch.ones(HEADS, 64), zero=torch.zeros(HEADS, 64))
    assert tables.codebook is not None
    states = near((tables.codebook[1:] + tables.codebook[:-1]) / 2)
    same(by_kernel(states, fmt, side, tables), by_reference(states, fmt, side, tables))


@pytest.mark.parametrize("side", SIDES)
@every({"static": Format(bits=2, scale="static", outliers=5), "token": Format(bits=2, outliers=5)})
def test_slots_that_are_tied_hold_the_same_values(fmt, side):
    states = random_states(64).round().clamp(-4, 5)  # every number many times
    tables = Tables(scale=torch.ones(HEADS, 64), zero=torch.zeros(HEADS, 64))
    actual, expected = by_kernel(states, fmt, side, tables), by_reference(states, fmt, side, tables)
    for name in actual.keys() & {"codes", "scales"}:
        assert torch.equal(actual[name], expected[name])
    sizes, reference = actual["outlier_value"].abs(), expected["outlier_value"].abs()
    assert torch.equal(sizes.sort(-1).values, reference.sort(-1).values)
    index = actual["outlier_index"].sort(-1).values
    assert (index[..., 1:] > index[..., :-1]).all()
    errors = [(decode(each, fmt, side, 64, BLOCK, tables) - states).abs() for each in (actual, expected)]
    rows = [error if side == "key" else error.unflatten(2, (-1, BLOCK)).transpose(-1, -2) for error in errors]
    torch.testing.assert_close(*(row.sort(-1).values for row in rows), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", ["token", "channel"])
@pytest.mark.parametrize("side", SIDES)
def test_ties_at_a_trimmed_range_stay_inside_it(side, scale):
    fmt, states = Format(bits=2, scale=scale, trim=2, outliers=4), random_states(64).round().clamp(-3, 3)
    back = decode(by_kernel(states, fmt, side), fmt, side, 64, BLOCK)
    assert (back - states).abs().max() <= 0.5 * 6 / 3 + 0.01


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 1e30], ids=str)
@pytest.mark.parametrize("side", SIDES)
@every(
    {name: AFFINE[name] for name in ("4bit-token", "2bit-channel", "3bit-symmetric")}
    | {name: FLOATS[name] for name in ("float8-token", "float8-static")}
    | {"norm": UNITS["norm"]}
)
def test_poison_does_what_it_does_to_the_reference(fmt, side, poison):
    states = random_states(64, blocks=1)
    states[0, 1, 5, 7] = poison
    tables = random_tables(fmt, 64)
    same(by_kernel(states, fmt, side, tables), by_reference(states, fmt, side, tables))


@pytest.mark.parametrize("side", SIDES)
@every({"kvquant-key": SLOTS["kvquant-key"], "kvquant-value": SLOTS["kvquant-value"]})
def test_poison_stays_in_its_token_and_channel(fmt, side):
    clean, tables = random_states(64), random_tables(fmt, 64)
    states = clean.clone()
    states[0, 1, 5, 7] = torch.nan
    back, expected = (
        decode(by_kernel(each, fmt, side, tables), fmt, side, 64, BLOCK, tables) for each in (states, clean)
    )
    spared = torch.ones_like(states, dtype=torch.bool)
    spared[0, 1, 5], spared[0, 1, :BLOCK, 7] = False, False
    assert back[0, 1, 5, 7].isnan()
    if fmt.scale == "static":
        assert torch.equal(back[spared], expected[spared])
    assert back[spared].isfinite().all()


@pytest.mark.parametrize("side", SIDES)
@every({"4bit-token": AFFINE["4bit-token"], "norm": UNITS["norm"], "kvquant-value": SLOTS["kvquant-value"]})
def test_states_need_not_be_contiguous(fmt, side):
    states, tables = random_states(64, blocks=1, batch=2), random_tables(fmt, 64)
    valid = torch.arange(BLOCK) >= torch.tensor([3, 20])[:, None]
    expected = by_reference(states, fmt, side, tables, valid)
    interleaved = states.transpose(1, 2).contiguous().transpose(1, 2)
    longer = torch.cat([states[:, :, :7], states, states[:, :, :9]], 2)[:, :, 7:-9]
    across = states.transpose(2, 3).contiguous().transpose(2, 3)
    for view in (interleaved, longer, across):
        same_but_for_idle_slots(by_kernel(view, fmt, side, tables, valid.T.contiguous().T), expected)


@pytest.mark.parametrize("side", SIDES)
@every({"4bit-token": AFFINE["4bit-token"], "kvquant-value": SLOTS["kvquant-value"]})
def test_blocks_without_buffers_get_their_own(fmt, side):
    states, tables = random_states(64), random_tables(fmt, 64)
    with patch.object(quantize, "_encode", side_effect=AssertionError):
        packed = encode(states, fmt, side, BLOCK, tables=tables)
    same(packed, by_reference(states, fmt, side, tables))
    before = states.clone()
    assert torch.equal(states, before)


@pytest.mark.parametrize("numbers", [8, 64, 80, 512, 4096])
@pytest.mark.parametrize("fmt", [Format(bits=3, grid="midpoint"), ROW_SLOTS["midpoint-slots"]], ids=["plain", "slots"])
def test_rows_that_stand_for_themselves_are_those_of_the_reference(fmt, numbers):
    states = torch.randn(5, numbers, generator=torch.Generator().manual_seed(0)) * 3 + 1
    with patch.object(quantize, "_encode", side_effect=AssertionError):
        actual = encode_rows(states, fmt)
    with backend.reference_only():
        same(actual, encode_rows(states, fmt))


@pytest.mark.parametrize("dims", [(0, HEADS, BLOCK), (2, HEADS, 0)], ids=str)
@pytest.mark.parametrize("side", SIDES)
def test_no_tokens_are_no_blocks(side, dims):
    packed = encode(torch.zeros(*dims, 64), SLOTS["trimmed"], side, BLOCK)
    for name, (shape, dtype) in packed_shapes(SLOTS["trimmed"], side, 64, BLOCK).items():
        assert packed[name].shape == (*dims[:2], dims[2] // BLOCK, *shape)
        assert packed[name].dtype == dtype


# ---- buffers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["kernel", "reference"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "kernel":
        yield request.param
        return
    with backend.reference_only():
        yield request.param


@pytest.mark.parametrize(("side", "index_dtype"), [("key", torch.int32), ("value", torch.int64)], ids=str)
@every({name: SLOTS[name] for name in ("kvquant-key", "kvquant-value", "kvquant-prompt-key")} | {"norm": UNITS["norm"]})
def test_blocks_are_written_where_a_tensor_says_and_nowhere_else(fmt, side, index_dtype, path):
    states, tables = random_states(64, batch=2), random_tables(fmt, 64)
    expected = by_reference(states, fmt, side, tables)
    out = poisoned(fmt, side, 64, 5, batch=2)
    at, when = torch.tensor([2], dtype=index_dtype), torch.tensor([1], dtype=torch.int32)
    assert encode(states, fmt, side, BLOCK, None, tables, out, at, when) is out
    same({name: tensor[:, :, 2:4] for name, tensor in out.items()}, expected)
    untouched = poisoned(fmt, side, 64, 5, batch=2)
    rest = [0, 1, 4]
    same(*({name: tensor[:, :, rest] for name, tensor in each.items()} for each in (out, untouched)))


@pytest.mark.parametrize("side", SIDES)
def test_nothing_is_written_when_it_is_not_time(side, path):
    fmt, states = SLOTS["trimmed"], random_states(64)
    out = poisoned(fmt, side, 64, 5)
    encode(states, fmt, side, BLOCK, out=out, at=torch.tensor([2]), when=torch.tensor([0], dtype=torch.int32))
    same(out, poisoned(fmt, side, 64, 5))


@pytest.mark.parametrize("at", [-1, 4, 2**40])
@pytest.mark.parametrize("side", SIDES)
def test_nothing_is_written_beyond_the_buffers(side, at, path):
    fmt, states = SLOTS["trimmed"], random_states(64)
    out = poisoned(fmt, side, 64, 5)
    encode(states, fmt, side, BLOCK, out=out, at=torch.tensor([at]))
    same(out, poisoned(fmt, side, 64, 5))


# ---- bad input -------------------------------------------------------------------------------------------------------


def changed(out: dict[str, Tensor], name: str, tensor: Tensor) -> dict[str, Tensor]:
    return {**out, name: tensor}


FMT = Format(bits=4)
OUT = poisoned(FMT, "key", 64, 2)
MISTAKES = {
    "integers": ({"states": torch.zeros(1, HEADS, BLOCK, 64, dtype=torch.int32)}, "states must be floats"),
    "three-dimensions": ({"states": torch.zeros(HEADS, BLOCK, 64)}, "states must be floats"),
    "part-of-a-block": ({"states": torch.zeros(1, HEADS, BLOCK + 1, 64)}, "33 tokens are not whole blocks of 32"),
    "valid-elsewhere": ({"valid": torch.ones(1, BLOCK, device="meta")}, "valid is on meta, states are on cpu"),
    "valid-floats": ({"valid": torch.ones(1, BLOCK)}, "valid must be bool"),
    "valid-short": ({"valid": torch.ones(1, 5, dtype=torch.bool)}, r"valid must be bool \[1, 32\]"),
    "tables-elsewhere": ({"tables": Tables(gain=torch.ones((), device="meta"))}, "tables.gain is on meta"),
    "tables-of-other-heads": ({"tables": Tables(scale=torch.ones(3, 64))}, r"tables.scale must be .* = \[2, 64\]"),
    "out-lacks": ({"out": {"codes": OUT["codes"]}}, "out must hold"),
    "out-dtype": ({"out": changed(OUT, "scales", OUT["scales"].float())}, r"out\['scales'\] must be torch.float16"),
    "out-elsewhere": ({"out": changed(OUT, "scales", OUT["scales"].to("meta"))}, "out.scales is on meta"),
    "out-strided": (
        {"out": {name: torch.cat([tensor, tensor], 2)[:, :, :2] for name, tensor in OUT.items()}},
        "must be contiguous",
    ),
    "out-short": ({"out": {name: tensor[:, :, :0] for name, tensor in OUT.items()}}, "1 blocks do not fit the 0"),
    "at-alone": ({"at": torch.tensor([0])}, "give out"),
    "at-many": ({"out": OUT, "at": torch.tensor([0, 1])}, "at must be one int32 or int64"),
    "at-elsewhere": ({"out": OUT, "at": torch.zeros(1, dtype=torch.int32, device="meta")}, "at is on meta"),
    "when-bool": ({"out": OUT, "when": torch.tensor([True])}, "when must be one int32 or int64"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_arguments_that_do_not_fit_are_refused(arguments, message, path):
    arguments = {"states": torch.zeros(1, HEADS, BLOCK, 64), **arguments}
    with pytest.raises(ValueError, match=message):
        encode(fmt=FMT, side="key", block=BLOCK, **arguments)


@pytest.mark.parametrize(
    ("fmt", "message"),
    [(Format(scale="static"), "needs tables with scale and zero"), (Format(codes="codebook"), "table of 16 levels")],
    ids=["static", "codebook"],
)
def test_tables_that_are_missing_are_named(fmt, message, path):
    with pytest.raises(ValueError, match=message):
        encode(random_states(64), fmt, "key", BLOCK)


@pytest.mark.parametrize(
    ("block", "tables", "option"),
    [
        (48, NO_TABLES, "block=48"),
        (32, Tables(gain=torch.tensor(1.0, dtype=torch.float64), offset=torch.tensor(0.0)), "gain in torch.float64"),
    ],
    ids=["block", "tables"],
)
def test_what_is_not_served_goes_to_the_reference_with_one_warning(block, tables, option):
    fmt, states = SLOTS["trimmed"], random_states(64, blocks=1, block=96)
    assert option in (kernels.unserved(fmt, "key", 64, block, tables) or "")
    with pytest.warns(UserWarning, match=option) as caught:
        packed = [encode(states, fmt, "key", block, tables=tables) for _ in range(2)]
    assert len(caught) == 1
    same(packed[1], by_reference(states, fmt, "key", tables, block=block))
