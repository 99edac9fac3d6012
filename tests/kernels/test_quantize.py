"""What encoding keeps of the states, for every format: error bounds, exactness, independence and bytes."""

from itertools import product

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.testing import assert_close

from cachequant.core.calibration import lloyd_max
from cachequant.kernels.float8 import FLOAT8_MAX, from_float8, to_float8
from cachequant.kernels.format import Format, LayerFormat
from cachequant.kernels.packing import pack, unpack
from cachequant.kernels.quantize import NO_TABLES, Tables, decode, encode
from cachequant.kernels.rotation import hadamard_rotate

BLOCK = 32
HALF = 2.0**-11  # relative rounding of float16
FINEST = 2.0**-24  # smallest float16

SIDES = ["key", "value"]
HEAD_DIMS = [64, 80, 96, 128]
GRIDS = {
    "token": {},
    "token-group16": {"group": 16},
    "token-symmetric": {"symmetric": True},
    "channel": {"scale": "channel"},
    "channel-symmetric": {"scale": "channel", "symmetric": True},
    "token-rotated": {"rotation": "hadamard"},
}
FORMATS = {
    f"{bits}bit-{name}": Format(bits=bits, **grid) for bits, (name, grid) in product((2, 3, 4, 8), GRIDS.items())
}

FLOAT8 = Format(codes="float8", bits=8, symmetric=True)
NORM = {"codes": "codebook", "symmetric": True, "unit": "norm"}

# two heads, three blocks, an odd batch
SHAPE = (3, 2, 3 * BLOCK)

FITTED = torch.tensor([-1.0, -0.7, -0.45, -0.3, -0.2, -0.1, -0.03, 0.0, 0.05, 0.13, 0.2, 0.31, 0.4, 0.6, 0.8, 1.0])
LEVELS = Tables(codebook=FITTED).codebook  # on the grid of codebooks


def random_states(head_dim: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(*SHAPE, head_dim, generator=generator)
    # channels of very different size and offset, as keys have
    return (states * torch.logspace(-1, 1, head_dim) + torch.linspace(-2, 3, head_dim)).to(dtype)


def decoded(states: Tensor, fmt: Format, side: str, tables: Tables = NO_TABLES, **options) -> Tensor:
    packed = encode(states, fmt, side, BLOCK, tables=tables, **options)
    return decode(packed, fmt, side, states.shape[-1], BLOCK, tables, torch.float64)


def parametrize_formats(formats: dict[str, Format] = FORMATS):
    return pytest.mark.parametrize("fmt", formats.values(), ids=formats)


def half_a_step(states: Tensor, fmt: Format) -> Tensor:
    """The largest error a grid over each group's range may make, float16 scales included."""
    blocks = states.double().unflatten(2, (-1, BLOCK))
    if fmt.scale == "token":
        blocks = blocks.unflatten(-1, (fmt.groups(states.shape[-1]), -1))
        dim = -1
    else:
        dim = 3
    low, high = blocks.amin(dim, keepdim=True), blocks.amax(dim, keepdim=True)
    reach = torch.maximum(high, -low)
    spread = 2 * reach if fmt.symmetric else high - low
    step = spread / (2**fmt.bits - 1)
    bound = step / 2 + 2 * HALF * spread + HALF * reach + 2**fmt.bits * FINEST
    return bound.expand_as(blocks).reshape(states.shape)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("side", SIDES)
@parametrize_formats({name: fmt for name, fmt in FORMATS.items() if fmt.rotation == "none"})
def test_no_number_is_off_by_more_than_half_a_step(fmt, side, head_dim):
    states = random_states(head_dim)
    error = (decoded(states, fmt, side) - states.double()).abs()
    assert (error <= half_a_step(states, fmt)).all()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("side", SIDES)
@parametrize_formats({name: fmt for name, fmt in FORMATS.items() if fmt.rotation == "hadamard"})
def test_rotated_states_are_off_by_half_a_step_of_their_own_basis(fmt, side, head_dim):
    states = random_states(head_dim)
    error = hadamard_rotate(decoded(states, fmt, side) - states.double()).abs()
    assert (error <= 1.001 * half_a_step(hadamard_rotate(states), fmt)).all()


def test_half_a_step_is_reached():
    # else the bound above would prove nothing
    states = random_states(64)
    error = (decoded(states, FORMATS["4bit-token"], "key") - states.double()).abs()
    assert (error / half_a_step(states, FORMATS["4bit-token"])).max() > 0.9


@pytest.mark.parametrize("side", SIDES)
@parametrize_formats()
def test_zeros_come_back_as_zeros(fmt, side):
    assert decoded(torch.zeros(*SHAPE, 64), fmt, side).eq(0).all()


@pytest.mark.parametrize("side", SIDES)
@parametrize_formats({name: fmt for name, fmt in FORMATS.items() if not fmt.symmetric})
def test_constants_come_back_to_half_precision(fmt, side):
    error = (decoded(torch.full((*SHAPE, 64), 3.1), fmt, side) - 3.1).abs().max()
    # rotated, a constant is a spike of 8 * 3.1 in a row of zeros
    assert error <= (3.1 * HALF if fmt.rotation == "none" else 8 * 3.1 * 4 * HALF)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_grids_reach_the_largest_number_of_a_token(bits, side):
    states = random_states(64).double()
    back = decoded(states, Format(bits=bits, symmetric=True), side)
    peak = states.abs() == states.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(back[peak], states[peak], rtol=2 * HALF, atol=0)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30], ids=str)
@pytest.mark.parametrize("side", SIDES)
@parametrize_formats()
def test_poison_stays_in_its_token_or_channel(fmt, side, poison):
    states = random_states(64)
    poisoned = states.clone()
    poisoned[1, 1, 5, 7] = poison
    clean, back = decoded(states, fmt, side), decoded(poisoned, fmt, side)
    spared = torch.ones_like(states, dtype=torch.bool)
    if fmt.scale == "token":
        spared[1, 1, 5] = False
    else:
        spared[1, 1, :BLOCK, 7] = False
    assert torch.equal(back[spared], clean[spared])


@pytest.mark.parametrize("side", SIDES)
@parametrize_formats()
def test_encoding_a_prefix_gives_the_prefix_of_the_encoding(fmt, side):
    states = random_states(80)
    whole = encode(states, fmt, side, BLOCK)
    part = encode(states[:, :, : 2 * BLOCK], fmt, side, BLOCK)
    assert whole.keys() == part.keys()
    assert all(torch.equal(whole[name][:, :, :2], part[name]) for name in whole)


@pytest.mark.parametrize("side", SIDES)
@parametrize_formats()
def test_batch_rows_and_heads_are_independent(fmt, side):
    states = random_states(80)
    whole = encode(states, fmt, side, BLOCK)
    single = encode(states[1:2, 1:2], fmt, side, BLOCK)
    assert all(torch.equal(whole[name][1:2, 1:2], single[name]) for name in whole)


@pytest.mark.parametrize("side", SIDES)
@parametrize_formats()
def test_states_are_not_changed(fmt, side):
    states = random_states(64)
    before = states.clone()
    encode(states, fmt, side, BLOCK, torch.ones(3, 3 * BLOCK, dtype=torch.bool))
    assert torch.equal(states, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", SIDES)
@parametrize_formats()
def test_other_dtypes_are_encoded_as_their_float32_values(fmt, side, dtype):
    states = random_states(64).to(dtype)
    expected, actual = encode(states.float(), fmt, side, BLOCK), encode(states, fmt, side, BLOCK)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", SIDES)
@parametrize_formats()
def test_states_are_decoded_to_the_dtype_asked_for(fmt, side, dtype):
    packed = encode(random_states(64), fmt, side, BLOCK)
    reference = decode(packed, fmt, side, 64, BLOCK, dtype=torch.float64)
    states = decode(packed, fmt, side, 64, BLOCK, dtype=dtype)
    assert states.dtype == dtype
    scale = reference.abs().amax()
    torch.testing.assert_close(states.double() / scale, reference / scale, rtol=0, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", SIDES)
def test_exact_codes_lose_nothing(side, dtype):
    states = random_states(80, dtype=dtype)
    packed = encode(states, Format(codes="exact"), side, BLOCK)
    assert packed["exact"].dtype == dtype
    assert torch.equal(decode(packed, Format(codes="exact"), side, 80, BLOCK, dtype=dtype), states)


# ---- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("scale", ["token", "channel"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_codebooks_round_to_their_nearest_level(side, scale, symmetric):
    fmt = Format(codes="codebook", bits=4, scale=scale, symmetric=symmetric)
    states = random_states(64)
    packed = encode(states, fmt, side, BLOCK, tables=Tables(codebook=LEVELS))
    back = decode(packed, fmt, side, 64, BLOCK, Tables(codebook=LEVELS), torch.float64)
    numbers = packed["scales"].double()
    numbers = numbers if scale == "token" else numbers.unsqueeze(3).unsqueeze(-2)
    step, zero = numbers[..., :1], (torch.zeros(()) if symmetric else numbers[..., 1:])
    shape = (*SHAPE[:2], -1, BLOCK, 64)
    candidates = LEVELS.double() * step + zero  # every level of every group, by brute force
    if scale == "token":
        candidates = candidates.expand(*shape[:2], 3, BLOCK, 1, 16)
    else:
        candidates = candidates.squeeze(-2).expand(*shape[:2], 3, BLOCK, 64, 16)
    blocks = states.double().unflatten(2, (-1, BLOCK))
    nearest = (blocks[..., None] - candidates).abs().amin(-1)
    error = (back.unflatten(2, (-1, BLOCK)) - blocks).abs()
    torch.testing.assert_close(error, nearest, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", SIDES)
def test_merged_levels_decode_alike(side):
    levels = torch.tensor([-1.0, 0.1, 0.101, 1.0])
    merged = Tables(codebook=levels)
    assert merged.steps().index.tolist() == [0, 69, 69, 126]
    fmt, states = Format(codes="codebook", bits=2), random_states(64)
    three = torch.tensor([-1.0, 69 * 2 / 126 - 1, 1.0]).double()
    packed = encode(states, fmt, side, BLOCK, tables=merged)
    back = decode(packed, fmt, side, 64, BLOCK, merged, torch.float64)
    scale, zero = packed["scales"].double().flatten(2, 3).unbind(-1)
    nearest = (states.double()[..., None] - (three * scale[..., None] + zero[..., None])).abs().amin(-1)
    assert_close((back - states).abs(), nearest, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("codes", ["affine", "codebook"])
def test_static_grids_take_scale_and_zero_from_the_tables(side, codes):
    fmt = Format(codes=codes, bits=4, scale="static")
    states = random_states(64)
    low, high = states.amin((0, 2)), states.amax((0, 2))
    zero, scale = ((high + low) / 2, (high - low) / 2) if codes == "codebook" else (low, (high - low) / 15)
    tables = Tables(codebook=LEVELS, scale=scale, zero=zero)
    packed = encode(states, fmt, side, BLOCK, tables=tables)
    assert set(packed) == {"codes"}
    back = decode(packed, fmt, side, 64, BLOCK, tables, torch.float64)
    gap = LEVELS.diff().max() / 2 if codes == "codebook" else 0.5
    assert ((back - states).abs() <= gap * scale[:, None, :] * 1.0001).all()


def test_numbers_beyond_a_static_grid_go_to_its_ends():
    fmt = Format(bits=2, scale="static")
    tables = Tables(scale=torch.ones(2, 64), zero=torch.full((2, 64), -1.0))
    back = decoded(torch.linspace(-9, 9, 3 * 2 * 96 * 64).view(*SHAPE, 64), fmt, "key", tables)
    assert back.min() == -1
    assert back.max() == 2


@pytest.mark.parametrize(
    ("fmt", "tables", "message"),
    [
        (Format(codes="codebook"), NO_TABLES, "needs a table of 16 levels"),
        (Format(codes="codebook", bits=3), Tables(codebook=LEVELS), "needs a table of 8 levels"),
        (Format(scale="static"), NO_TABLES, "needs tables with scale and zero"),
    ],
    ids=["no-codebook", "codebook-of-other-bits", "no-static-scale"],
)
def test_missing_tables_are_named(fmt, tables, message):
    with pytest.raises(ValueError, match=message):
        encode(random_states(64), fmt, "key", BLOCK, tables=tables)


# ---- outliers --------------------------------------------------------------------------------------------------------

OUTLIERS = {
    "affine-token": (Format(bits=2, outliers=3), NO_TABLES),
    "affine-group": (Format(bits=3, group=16, outliers=3), NO_TABLES),
    "affine-channel": (Format(bits=2, scale="channel", outliers=3), NO_TABLES),
    "codebook": (Format(codes="codebook", outliers=3), Tables(codebook=LEVELS)),
    "static": (Format(bits=2, scale="static", outliers=3), Tables(scale=torch.ones(2, 80), zero=-torch.ones(2, 80))),
}


def rows_of(states: Tensor, side: str) -> Tensor:
    """`[batch, heads, blocks, rows, length]`: tokens of a key block, channels of a value block."""
    blocks = states.unflatten(2, (-1, BLOCK))
    return blocks if side == "key" else blocks.transpose(-1, -2)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("fmt", "tables"), OUTLIERS.values(), ids=OUTLIERS)
def test_outliers_repair_the_worst_numbers_of_each_row_and_leave_the_others(fmt, tables, side):
    states = random_states(80)
    plain = decoded(states, fmt.model_copy(update={"outliers": 0}), side, tables)
    before = rows_of((plain - states).abs(), side)
    after = rows_of((decoded(states, fmt, side, tables) - states).abs(), side)
    worst = before.topk(fmt.outliers).indices
    repaired = torch.zeros_like(before, dtype=torch.bool).scatter(-1, worst, True)
    # a correction is a float16 of the residual
    assert (after[repaired] <= HALF * before[repaired] + 1e-5).all()
    assert torch.equal(after[~repaired], before[~repaired])
    # nothing left is worse than what was repaired
    least_repaired = before.gather(-1, worst).amin(-1, keepdim=True)
    assert (before.masked_fill(repaired, 0) <= least_repaired).all()


def test_ties_take_no_more_slots_than_there_are():
    fmt = Format(bits=2, scale="static", outliers=2)
    tables = Tables(scale=torch.ones(2, 64), zero=torch.zeros(2, 64))
    states = torch.full((*SHAPE, 64), 7.0)
    back = decoded(states, fmt, "key", tables)
    assert (back == 7).sum(-1).eq(2).all()
    assert (back == 3).sum(-1).eq(62).all()


# ---- valid -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def padding():
    """Rows that begin with 0, 5 and a block and a half of padding."""
    return torch.arange(3 * BLOCK) >= torch.tensor([0, 5, BLOCK * 3 // 2])[:, None]


@pytest.mark.parametrize("side", SIDES)
@parametrize_formats(
    FORMATS
    | {
        "2bit-channel-outliers": Format(bits=2, scale="channel", outliers=3),
        "2bit-token-outliers": Format(bits=2, outliers=3),
    }
)
def test_what_stands_at_padding_changes_no_real_token(fmt, side, padding):
    states = random_states(64)
    filled = states.masked_fill(~padding[:, None, :, None], 1e4)
    kept = padding[:, None, :, None].expand_as(states)
    expected, actual = (decoded(each, fmt, side, valid=padding) for each in (states, filled))
    assert torch.equal(actual[kept], expected[kept])
    assert actual.isfinite().all()


def test_padding_would_spoil_a_channel_if_it_were_counted(padding):
    fmt = FORMATS["4bit-channel"]
    states = random_states(64)
    filled = states.masked_fill(~padding[:, None, :, None], 1e4)
    kept = padding[:, None, :, None].expand_as(states)
    counted, ignored = (
        (decoded(filled, fmt, "key", valid=valid) - states)[kept].abs().max() for valid in (None, padding)
    )
    assert counted > 10 * ignored


def test_block_of_padding_alone_is_finite():
    nothing = torch.zeros(3, 3 * BLOCK, dtype=torch.bool)
    for fmt in FORMATS.values():
        assert decoded(random_states(64), fmt, "key", valid=nothing).isfinite().all()


# ---- bytes and formats -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("side", SIDES)
@parametrize_formats(
    FORMATS
    | {
        "exact": Format(codes="exact"),
        "outliers": Format(bits=2, outliers=3),
        "channel-outliers": Format(bits=3, scale="channel", outliers=1),
        "static": Format(scale="static"),
        "codebook": Format(codes="codebook"),
        "float8": FLOAT8,
        "float8-channel": FLOAT8.model_copy(update={"scale": "channel"}),
        "norm-groups": Format(**NORM, group=16),
    }
)
def test_byte_formula_counts_what_encode_returns(fmt, side, head_dim, block):
    states = torch.zeros(3, 2, 2 * block, head_dim, dtype=torch.bfloat16)
    tables = Tables(codebook=LEVELS, scale=torch.ones(2, head_dim), zero=torch.zeros(2, head_dim))
    held: dict[str, int] = {}
    for name, tensor in encode(states, fmt, side, block, tables=tables).items():
        kind = "outliers" if name.startswith("outlier") else name
        held[kind] = held.get(kind, 0) + tensor.numel() * tensor.element_size()
    blocks = 3 * 2 * 2
    assert held == {name: blocks * size for name, size in fmt.block_bytes(side, head_dim, block, 2).items()}
    assert sum(held.values()) == fmt.bytes_per_token(side, head_dim, block, 2) * blocks * block


def test_bytes_of_a_layer_are_those_of_both_sides():
    formats = LayerFormat(key=Format(bits=4), value=Format(bits=2, group=32), block=128)
    # 64 * 4 / 8 codes + 4 for scale and zero; 128 * 2 / 8 codes + 4 groups * 4
    assert formats.bytes_per_token(64, 128, 2) == (32 + 4) + (32 + 16)


def test_group_that_does_not_divide_the_head_names_those_that_do():
    with pytest.raises(
        ValueError, match=r"a group of 24 channels does not divide head_dim=80; use one of \[8, 10, 16, 20, 40, 80\]"
    ):
        Format(group=24).groups(80)


@pytest.mark.parametrize(
    "settings",
    [{"bits": 5}, {"bits": 0}, {"group": 0}, {"scale": "channel", "group": 32}, {"outliers": -1}, {"colour": 1}],
    ids=str,
)
def test_formats_that_cannot_be_are_refused(settings):
    with pytest.raises(ValidationError):
        Format(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codes": "float8", "bits": 4, "symmetric": True}, "needs bits=8, symmetric=True and no outliers, got bits=4"),
        ({"codes": "float8", "bits": 8}, "needs bits=8, symmetric=True and no outliers, .*symmetric=False"),
        ({**FLOAT8.model_dump(), "outliers": 1}, "needs bits=8, symmetric=True and no outliers, .*outliers=1"),
        ({**FLOAT8.model_dump(), "grid": "midpoint"}, "places affine levels"),
        ({**FLOAT8.model_dump(), "unit": "rms"}, "needs codes='codebook', symmetric=True"),
        ({**NORM, "scale": "static"}, "needs codes='codebook', symmetric=True, scale='token' and no outliers"),
        ({**NORM, "scale": "channel"}, "needs codes='codebook', symmetric=True, scale='token'"),
        ({**NORM, "symmetric": False}, "unit='norm' scales a codebook around zero"),
        ({**NORM, "outliers": 2}, "needs codes='codebook', symmetric=True, scale='token' and no outliers"),
        ({"rotation": "hadamard", "rotation_size": 12}, "rotation_size=12 is how many .* has to be a power of two"),
        ({"rotation_size": 16}, "rotation_size=16 is how many channels rotation='hadamard' mixes"),
    ],
    ids=str,
)
def test_formats_whose_options_contradict_each_other_say_what_goes_together(settings, message):
    with pytest.raises(ValidationError, match=message):
        Format(**settings)


@pytest.mark.parametrize("side", SIDES)
def test_rotations_that_do_not_divide_a_head_name_the_largest_that_does(side):
    rotated = Format(rotation="hadamard", rotation_size=32)
    formats = LayerFormat(**{"key": Format(), "value": Format(), side: rotated})
    formats.require_fitting(96, 96)
    with pytest.raises(ValueError, match=f"{side}: rotation_size=32 does not divide head_dim=80; use up to 16"):
        formats.require_fitting(80, 80)


def test_values_have_no_rope_stage():
    with pytest.raises(ValidationError, match="values carry no rotary position"):
        LayerFormat(key=Format(), value=Format(rope="pre"))


def test_custom_formats_have_no_byte_formula():
    with pytest.raises(ValueError, match="no byte formula"):
        Format(codes="custom").block_bytes("key", 64, 32, 2)


# ---- 8-bit floats ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
def test_all_8_bit_floats_decode_to_256th_parts_of_what_torch_reads(side):
    codes = (torch.arange(64)[:, None] * 7 + torch.arange(BLOCK) * 64) % 256
    codes = codes.T if side == "key" else codes
    packed = {"codes": pack(codes, 8)[None, None, None], "scales": torch.ones(1, 1, 1, BLOCK, 1, 1).half()}
    found = decode(packed, FLOAT8, side, 64, BLOCK)[0, 0]
    levels = codes.to(torch.uint8).view(torch.float8_e4m3fn).float() / 256
    assert len(codes.unique()) == 256
    assert_close(found if side == "key" else found.T, levels, rtol=0, atol=0, equal_nan=True)


def test_levels_of_8_bit_floats_are_float16_numbers_of_the_same_bits():
    codes = torch.arange(256).to(torch.uint8)
    numbers = codes[codes & 0x7F != 0x7F]
    halves = (numbers.short() & 0x80) << 8 | (numbers.short() & 0x7F) << 7
    assert torch.equal(from_float8(numbers, torch.float16), halves.view(torch.float16))
    assert from_float8(numbers, torch.float32).max() == FLOAT8_MAX
    assert torch.equal(to_float8(from_float8(numbers, torch.float32)), numbers)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("settings", [{}, {"group": 16}, {"scale": "channel"}], ids=["token", "group16", "channel"])
def test_8_bit_floats_keep_three_bits_of_every_number_and_the_largest(settings, side, head_dim):
    fmt, states = FLOAT8.model_copy(update=settings), random_states(head_dim)
    error = (decoded(states, fmt, side) - states.double()).abs()
    blocks = states.double().unflatten(2, (-1, BLOCK))
    vectors = blocks.transpose(-1, -2) if fmt.scale == "channel" else blocks.unflatten(-1, (fmt.groups(head_dim), -1))
    reach = vectors.abs().amax(-1, keepdim=True).expand_as(vectors)
    reach = (reach.transpose(-1, -2) if fmt.scale == "channel" else reach.flatten(-2)).reshape(states.shape)
    # half of the last of three bits, or of the finest step, and the rounding of the scale
    finest = reach * 2**-9 / 448 / 2
    assert (error <= torch.maximum(states.double().abs() * 2**-4, finest) * (1 + 2**-9)).all()
    largest = states.double().abs() == reach
    assert (error[largest] <= 2 * HALF * reach[largest]).all()
    assert (error / states.double().abs())[states.abs() > reach / 100].max() > 2**-5  # else too much is allowed


def test_8_bit_floats_beyond_a_static_scale_saturate():
    fmt = FLOAT8.model_copy(update={"scale": "static"})
    tables = Tables(scale=torch.full((2, 64), 2.0), zero=torch.zeros(2, 64))
    states = torch.tensor([3.5, -3.5, 3.6, 1e9, -1e9, 3.25, 0.0]).repeat(10)[:64].expand(*SHAPE, 64)
    found = decoded(states, fmt, "key", tables)[0, 0, 0, :7]
    assert found.tolist() == [3.5, -3.5, 3.5, 3.5, -3.5, 3.25, 0.0]


# ---- units of codebooks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("bits", [2, 4])
def test_what_is_decoded_by_its_norm_has_the_norm_of_what_was_encoded(bits, group, side, head_dim):
    fmt, states = Format(**{**NORM, "bits": bits}, group=group), random_states(head_dim)
    tables = Tables(codebook=lloyd_max(bits))
    back = decoded(states, fmt, side, tables)
    norms, expected = (x.unflatten(-1, (fmt.groups(head_dim), -1)).norm(dim=-1) for x in (back, states.double()))
    assert_close(norms, expected, rtol=1.01 * HALF, atol=0)
    # that it had not before
    plain = decoded(states, fmt.model_copy(update={"unit": "rms"}), side, tables).norm(dim=-1)
    assert (plain / states.double().norm(dim=-1) - 1).abs().mean() > 10 * HALF


@pytest.mark.parametrize("side", SIDES)
def test_units_are_root_mean_squares_and_change_no_code_of_the_norm(side):
    states, tables = random_states(64), Tables(codebook=lloyd_max(4))
    rms, norm = (
        encode(states, Format(**{**NORM, "unit": unit}), side, BLOCK, tables=tables) for unit in ("rms", "norm")
    )
    expected = states.double().square().mean(-1).sqrt()
    assert_close(rms["scales"].double().flatten(2), expected, rtol=1.01 * HALF, atol=0)
    assert torch.equal(rms["codes"], norm["codes"])


@pytest.mark.parametrize("side", SIDES)
def test_vectors_of_zeros_have_no_norm_to_restore(side):
    for levels in (torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 17)[:-1]):  # without a level of zero, and with it
        found = decoded(torch.zeros(*SHAPE, 64), Format(**NORM), side, Tables(codebook=levels))
        assert found.eq(0).all()


# ---- rotations in blocks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
def test_a_rotation_in_blocks_spreads_no_number_beyond_its_block(side):
    states = random_states(64)
    states[..., 16:32] *= 100
    states[..., 48:] = 0
    fmt = Format(bits=8, group=16, rotation="hadamard", rotation_size=16)
    back = decoded(states, fmt, side)
    assert back[..., 48:].eq(0).all()
    assert (back - states.double()).abs()[..., :16].max() < 0.05  # as if nothing were next to them
    whole = decoded(states, fmt.model_copy(update={"rotation_size": None}), side)
    assert whole[..., 48:].ne(0).any()


# ---- gain and offset -------------------------------------------------------------------------------------------------

NORMALISED = {"gain": torch.tensor(1.25), "offset": torch.tensor(-0.1)}


@pytest.mark.parametrize("side", SIDES)
@parametrize_formats(
    {
        "affine-token": Format(bits=2),
        "affine-group": Format(bits=3, group=16),
        "affine-channel": Format(bits=4, scale="channel"),
        "affine-symmetric": Format(bits=4, symmetric=True),
        "affine-rotated": Format(bits=2, rotation="hadamard"),
        "codebook-token": Format(codes="codebook"),
        "codebook-channel": Format(codes="codebook", scale="channel"),
        "codebook-symmetric": Format(codes="codebook", symmetric=True),
        "static": Format(scale="static"),
        "codebook-static": Format(codes="codebook", scale="static"),
    }
)
def test_gain_and_offset_move_what_is_decoded_and_not_the_codes(fmt, side):
    states = random_states(64)
    scale = {"scale": torch.rand(2, 64) + 1, "zero": torch.rand(2, 64)} if fmt.scale == "static" else {}
    plain = Tables(codebook=LEVELS, **scale)
    moved = Tables(codebook=LEVELS, **scale, **NORMALISED)
    packed = encode(states, fmt, side, BLOCK, tables=moved)
    expected = encode(states, fmt, side, BLOCK, tables=plain)
    assert packed.keys() == expected.keys()
    assert all(torch.equal(packed[name], expected[name]) for name in packed)
    # the same levels, moved beforehand: affine ones written as a codebook
    levels = LEVELS if fmt.codes == "codebook" else torch.arange(2.0**fmt.bits)
    by_hand = NORMALISED["gain"] * levels + NORMALISED["offset"]
    numbers = quantize_by_hand(packed, fmt, side, by_hand, plain)
    assert_close(decode(packed, fmt, side, 64, BLOCK, moved, torch.float64), numbers, rtol=0, atol=2e-4)


def quantize_by_hand(packed: dict[str, Tensor], fmt: Format, side: str, levels: Tensor, tables: Tables) -> Tensor:
    """What codes stand for if they name `levels`, in float64, rotation undone."""
    rows = unpack(packed["codes"], fmt.bits, 64 if side == "key" else BLOCK, by_nibble=fmt.codes == "codebook")
    found = levels.double()[rows.long()]
    found = found if side == "key" else found.transpose(-1, -2)
    if fmt.scale == "static":
        scale, zero = tables.scale[:, None, None], tables.zero[:, None, None]
    else:
        stored = packed["scales"].double()
        # [..., block, groups, numbers] per token, [..., head_dim, numbers] per channel
        stored = stored.repeat_interleave(64 // stored.shape[-2], -2) if fmt.scale == "token" else stored.unsqueeze(-3)
        scale = stored[..., 0]
        if fmt.symmetric:
            zero = -scale * (2**fmt.bits - 1) / 2 if fmt.codes == "affine" else torch.zeros(())
        else:
            zero = stored[..., 1]
    back = (found * scale + zero).flatten(2, 3)
    return hadamard_rotate(back) if fmt.rotation == "hadamard" else back


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("codes", ["affine", "codebook"])
def test_outliers_are_exact_with_gain_and_offset(side, codes):
    fmt = Format(codes=codes, bits=4, outliers=3)
    states = random_states(64)
    tables = Tables(codebook=LEVELS, **NORMALISED)
    packed = encode(states, fmt, side, BLOCK, tables=tables)
    error = rows_of((decode(packed, fmt, side, 64, BLOCK, tables) - states).abs(), side)
    slots = packed["outlier_index"].long()
    size = packed["outlier_value"].float().abs()
    assert (error.gather(-1, slots) <= HALF * size + 1e-5).all()
    rest = error.scatter(-1, slots, 0)
    assert (rest <= size.amin(-1, keepdim=True) * 1.001 + 1e-5).all()


# ---- sensitivity -----------------------------------------------------------------------------------------------------


def test_slots_of_keys_go_to_error_times_sensitivity():
    fmt = Format(bits=2, outliers=3)
    states = random_states(64)
    sensitivity = torch.rand(2, 64, generator=torch.Generator().manual_seed(3))
    plain = (decoded(states, fmt.model_copy(update={"outliers": 0}), "key") - states).abs()
    expected = (plain * sensitivity[:, None]).topk(3, dim=-1).indices
    packed = encode(states, fmt, "key", BLOCK, tables=Tables(sensitivity=sensitivity))
    found = packed["outlier_index"].flatten(2, 3).long()
    assert torch.equal(found.sort(-1).values, expected.sort(-1).values)


def test_slots_of_channels_nothing_depends_on_go_to_the_others():
    fmt = Format(bits=2, outliers=8)
    sensitivity = torch.zeros(2, 64)
    sensitivity[:, 20:28] = 1e-6
    packed = encode(random_states(64), fmt, "key", BLOCK, tables=Tables(sensitivity=sensitivity))
    assert torch.equal(packed["outlier_index"].sort(-1).values.unique(), torch.arange(20, 28, dtype=torch.int16))


def test_values_take_no_notice_of_sensitivity():
    fmt = Format(bits=2, outliers=3)
    states = random_states(64)
    with_it, without = (
        encode(states, fmt, "value", BLOCK, tables=tables)
        for tables in (Tables(sensitivity=torch.rand(2, 64)), NO_TABLES)
    )
    assert all(torch.equal(with_it[name], without[name]) for name in without)


# ---- trim ------------------------------------------------------------------------------------------------------------


def largest_first(vector: Tensor, trim: int) -> tuple[float, float]:
    """low and high of a vector without its `trim` smallest and largest numbers."""
    ordered = vector.sort().values
    return float(ordered[trim]), float(ordered[-1 - trim])


@pytest.mark.parametrize("trim", [1, 3])
@pytest.mark.parametrize(("side", "scale"), [("key", "token"), ("value", "channel")])
def test_trimmed_ranges_are_order_statistics_where_slots_and_scale_share_a_row(side, scale, trim):
    # as many slots in the row as numbers may be left out of its range
    fmt = Format(bits=4, scale=scale, trim=trim, outliers=2 * trim)
    states = random_states(64)
    scales = encode(states, fmt, side, BLOCK)["scales"].float().flatten(0, -2)
    vectors = rows_of(states, "key" if scale == "token" else "value").flatten(0, -2)
    for stored, vector in zip(scales[::37], vectors[::37], strict=True):
        low, high = largest_first(vector, trim)
        assert float(stored[1]) == pytest.approx(low, rel=HALF, abs=FINEST)
        assert float(stored[0]) == pytest.approx((high - low) / 15, rel=HALF, abs=FINEST)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("scale", ["token", "channel"])
@pytest.mark.parametrize("codes", ["affine", "codebook"])
def test_what_a_trimmed_range_leaves_out_has_a_slot_or_errs_less_than_all_that_have_one(codes, scale, side):
    fmt = Format(codes=codes, bits=4, scale=scale, trim=2, outliers=3)
    states = random_states(64)
    tables = Tables(codebook=LEVELS)
    packed = encode(states, fmt, side, BLOCK, tables=tables)
    error = (decode(packed, fmt, side, 64, BLOCK, tables) - states).abs()
    gap = float(LEVELS.diff().max() if codes == "codebook" else 1.0)
    scales = packed["scales"][..., 0].float()
    half_step = (scales.unsqueeze(-2) if scale == "channel" else scales).expand(*SHAPE[:2], 3, BLOCK, 64) * gap / 2
    saturated = rows_of(error, side) > 1.001 * rows_of(half_step.flatten(2, 3), side) + 1e-2
    least_corrected = packed["outlier_value"].float().abs().amin(-1, keepdim=True).expand_as(saturated)
    assert (rows_of(error, side) <= 1.001 * least_corrected)[saturated].all()
    assert saturated.float().mean() < 0.01


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("scale", ["token", "channel"])
def test_trimming_lowers_the_error_of_heavy_tails(scale, side):
    states = random_states(64) ** 3
    plain, trimmed = (
        (decoded(states, Format(bits=2, scale=scale, outliers=4, trim=trim), side) - states).square().mean()
        for trim in (0, 2)
    )
    assert trimmed < plain


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("scale", ["token", "channel"])
def test_ties_at_a_trimmed_range_stay_inside_it(scale, side):
    fmt = Format(bits=2, scale=scale, trim=2, outliers=4)
    states = random_states(64).round().clamp(-3, 3)  # every number many times
    error = (decoded(states, fmt, side) - states).abs()
    assert error.max() <= 0.5 * 6 / 3 + 0.01


def test_padding_is_no_outlier_of_a_trimmed_range(padding):
    fmt = Format(bits=2, scale="channel", trim=2, outliers=3)
    for side in SIDES:
        states = random_states(64)
        filled = states.masked_fill(~padding[:, None, :, None], 1e4)
        kept = padding[:, None, :, None].expand_as(states)
        expected, actual = (decoded(each, fmt, side, valid=padding) for each in (states, filled))
        assert torch.equal(actual[kept], expected[kept])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trim": 1}, "outliers >= 1"),
        ({"trim": 1, "outliers": 2, "scale": "static"}, "needs scale='token' or 'channel'"),
    ],
    ids=str,
)
def test_trims_without_slots_or_ranges_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        Format(**settings)


def test_trims_that_leave_nothing_are_refused():
    fmt = Format(trim=8, outliers=16, group=16)
    with pytest.raises(ValueError, match="key: trim=8 leaves nothing of the 16 numbers"):
        LayerFormat(key=fmt, value=Format()).require_fitting(64, 64)


# ---- a worked example of KVQuant -------------------------------------------------------------------------------------
# 4 channels, 2 bits; grids and codebooks from the calibration in tests/calibration/test_statistics.py. Levels decode
# from their grid, so two of four are where the example has them and two up to half a step away.


def on_grid(levels: Tensor) -> Tensor:
    """The nearest of 127 points from the first level to the last, in float64."""
    exact = levels.double()
    step = (exact[-1] - exact[0]) / 126
    return exact[0] + step * ((exact - exact[0]) / step).round()


KEY_LEVELS = torch.tensor([-0.827191, -0.190884, 0.255878, 0.855127])
KEY_GRID = {
    "scale": torch.tensor([[0.9140625, 1.609375, 1.3359375, 3.3125]]),
    "zero": torch.tensor([[-0.3515625, 0.265625, -2.4609375, 0.0]]),
}
KEY_TABLES = Tables(codebook=KEY_LEVELS, **KEY_GRID)
KEYS = torch.tensor([[0.5, -0.25, -2.25, -5.5], [1.0, 2.75, -3.375, -3.0], [-1.3, 0.9, 0.0, 3.0]])
KEY_CODES = [[3, 1, 2, 0], [3, 3, 0, 0], [0, 2, 3, 3]]
KEY_LUT_FITTED = torch.tensor(
    [
        [-1.107667, -0.526042, -0.117674, 0.430077],
        [-1.065636, -0.041579, 0.677429, 1.641845],
        [-3.566013, -2.715946, -2.119100, -1.318541],
        [-2.740071, -0.632302, 0.847597, 2.832608],
    ]
)
KEY_LUT = (KEY_GRID["scale"].T * on_grid(KEY_LEVELS) + KEY_GRID["zero"].T).float()
# channels beyond their range, and by how much they miss the level they saturate to
KEY_OUTLIERS = [{3: -2.759929}, {0: 0.569923, 1: 1.108155}, {0: -0.192333, 2: 1.318541}]


def example_keys(slots: int, tables: Tables = KEY_TABLES, keys: Tensor = KEYS) -> tuple[dict[str, Tensor], Tensor]:
    """The packed block that begins with `keys [n, 4]`, and what they decode to."""
    fmt = Format(codes="codebook", bits=2, scale="static", outliers=slots)
    states = torch.zeros(1, 1, BLOCK, 4)
    states[0, 0, : len(keys)] = keys
    packed = encode(states, fmt, "key", BLOCK, tables=tables)
    return packed, decode(packed, fmt, "key", 4, BLOCK, tables)[0, 0, : len(keys)]


def codes_of(packed: dict[str, Tensor], length: int) -> list[list[int]]:
    return unpack(packed["codes"], 2, length, by_nibble=True)[0, 0, 0].tolist()


def test_worked_example_levels_decode_from_the_nearest_point_of_their_grid():
    assert_close(KEY_LUT_FITTED, KEY_GRID["scale"].T * KEY_LEVELS + KEY_GRID["zero"].T, atol=2e-6, rtol=0)
    assert_close(VALUE_LUT_FITTED, 2.875 * VALUE_LEVELS + 0.875, atol=2e-6, rtol=0)
    half = KEY_GRID["scale"].T * (KEY_LEVELS[-1] - KEY_LEVELS[0]) / 252
    assert ((KEY_LUT - KEY_LUT_FITTED).abs() <= half + 1e-6).all()
    assert ((VALUE_LUT - VALUE_LUT_FITTED).abs() <= 2.875 * (VALUE_LEVELS[-1] - VALUE_LEVELS[0]) / 252 + 1e-6).all()


def test_worked_example_key_codes_and_levels():
    packed, back = example_keys(0)
    assert codes_of(packed, 4)[:3] == KEY_CODES
    assert_close(back, KEY_LUT.gather(1, torch.tensor(KEY_CODES).T).T, atol=1e-6, rtol=0)
    # every level of every channel comes back as itself
    packed, back = example_keys(0, keys=KEY_LUT.T)
    assert codes_of(packed, 4)[:4] == [[code] * 4 for code in range(4)]
    assert_close(back, KEY_LUT.T, atol=2e-6, rtol=0)


def test_worked_example_key_residuals_are_relative_to_the_level_that_decodes():
    packed, _ = example_keys(4)
    index, value = packed["outlier_index"][0, 0, 0], packed["outlier_value"][0, 0, 0].float()
    for token, outliers in enumerate(KEY_OUTLIERS):
        residual = dict(zip(index[token].tolist(), value[token].tolist(), strict=True))
        for channel, expected in outliers.items():
            assert residual[channel] == pytest.approx(expected, rel=HALF, abs=1e-6)


@pytest.mark.parametrize("token", [0, 1])
def test_worked_example_keys_with_a_slot_for_each_outlier(token):
    outliers = KEY_OUTLIERS[token]
    packed, back = example_keys(len(outliers))
    assert set(packed["outlier_index"][0, 0, 0, token].tolist()) == set(outliers)
    expected = KEY_LUT.gather(1, torch.tensor(KEY_CODES).T).T[token].clone()
    expected[list(outliers)] = KEYS[token, list(outliers)]
    # at -5.5 the residual is a float16: had it been taken from another level or the zero point, 0.6 would be lacking
    assert_close(back[token], expected, atol=2e-3, rtol=0)


def test_worked_example_slots_go_to_the_largest_errors_not_to_what_is_beyond_the_range():
    # token 2: channel 0 is barely beyond its range and loses 0.19, channel 1 is inside and loses 0.22
    packed, back = example_keys(2)
    assert set(packed["outlier_index"][0, 0, 0, 2].tolist()) == {1, 2}
    _, plain = example_keys(0)
    for token, outliers in enumerate(KEY_OUTLIERS):
        chosen = plain[token].clone()
        chosen[list(outliers)] = KEYS[token, list(outliers)]
        theirs = (chosen - KEYS[token]).square().sum()
        _, ours = example_keys(len(outliers))
        assert (ours[token] - KEYS[token]).square().sum() <= theirs + 1e-6
    assert ((back[2] - KEYS[2]).abs() < 0.2).all()


def test_worked_example_every_outlier_is_exact_where_there_are_slots_enough():
    _, back = example_keys(3)
    for token, outliers in enumerate(KEY_OUTLIERS):
        assert_close(back[token, list(outliers)], KEYS[token, list(outliers)], atol=2e-3, rtol=0)


def test_worked_example_keys_with_q_norm():
    tables = Tables(codebook=KEY_LEVELS, **KEY_GRID, gain=torch.tensor(1.049598), offset=torch.tensor(-0.014392))
    packed, back = example_keys(1, tables)
    assert codes_of(packed, 4)[:3] == KEY_CODES
    scale, zero = KEY_GRID["scale"][0], KEY_GRID["zero"][0]
    fitted = scale * (1.049598 * KEY_LEVELS[KEY_CODES[0]] - 0.014392) + zero
    assert_close(fitted[:3], torch.tensor([0.455689, -0.079977, -2.121373]), atol=2e-6, rtol=0)
    expected = scale * (1.049598 * on_grid(KEY_LEVELS)[KEY_CODES[0]] - 0.014392) + zero
    assert_close(back[0, :3], expected[:3].float(), atol=2e-6, rtol=0)
    assert_close(back[0, 3], torch.tensor(-5.5), atol=0, rtol=HALF)


VALUE_LEVELS = torch.tensor([-0.688206, -0.266443, 0.269555, 0.516770])
VALUES = torch.tensor([-2, 2, -0.75, -1.5, 3, 0.75, -1, 4, 2.25, -0.5, -3.5, 3.75, 0, -2.5, 5.25, 0.5])
VALUE_LUT_FITTED = torch.tensor([-1.103591, 0.108977, 1.649972, 2.360714])
VALUE_LUT = (2.875 * on_grid(VALUE_LEVELS) + 0.875).float()
VALUE_CODES = torch.tensor([0, 2, 0, 0, 3, 1, 0, 3, 3, 0, 0, 3, 1, 0, 3, 1])
VALUE_OUTLIERS = [7, 10, 13, 14]


def example_values(vector: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The packed block whose token `t` is `vector [16]` rolled by `t`, and what it decodes to, rolled back."""
    # every channel then holds every number twice: slots for the four outliers and no more
    fmt = Format(codes="codebook", bits=2, outliers=8, trim=2)
    states = torch.stack([vector.roll(t) for t in range(BLOCK)])[None, None]
    packed = encode(states, fmt, "value", BLOCK, tables=Tables(codebook=VALUE_LEVELS))
    back = decode(packed, fmt, "value", 16, BLOCK, Tables(codebook=VALUE_LEVELS))[0, 0]
    return packed, torch.stack([row.roll(-t) for t, row in enumerate(back)])


def test_worked_example_value_range_is_of_the_third_largest_and_smallest():
    packed, back = example_values(VALUES)
    # -2 to 3.75
    assert packed["scales"].flatten(0, -2).unique(dim=0).tolist() == [[2.875, 0.875]]
    codes = torch.tensor(codes_of(packed, BLOCK)).T
    codes = torch.stack([row.roll(-t) for t, row in enumerate(codes)])
    assert (codes == VALUE_CODES).all()
    inliers = [c for c in range(16) if c not in VALUE_OUTLIERS]
    expected = VALUE_LUT[VALUE_CODES[inliers]].expand(BLOCK, -1)
    assert_close(back[:, inliers], expected, atol=2e-6, rtol=0)


def test_worked_example_value_outliers_are_exact():
    packed, back = example_values(VALUES)
    assert_close(back[:, VALUE_OUTLIERS], VALUES[VALUE_OUTLIERS].expand(BLOCK, -1), atol=2e-3, rtol=0)
    residuals = packed["outlier_value"].float().unique()
    # from the levels they saturate to
    assert_close(residuals, torch.tensor([-2.396409, -1.396409, 1.639286, 2.889286]), atol=2e-3, rtol=0)


def test_worked_example_values_tied_with_the_range_are_no_gross_error():
    tied = VALUES.clone()
    tied[11] = 4.0  # as large as number 7, of which a comparison with the threshold would make 6.35
    _, back = example_values(tied)
    low, high = -2.0, 4.0
    levels = on_grid(VALUE_LEVELS) * (high - low) / 2 + (high + low) / 2
    nearest = (levels - tied[:, None]).abs().amin(-1)
    assert ((back - tied).abs() <= nearest + 2e-3).all()
    # slots for four numbers of each token: the largest errors; -2.5, the fifth with 1.435, keeps its level
    assert_close(back[:, [7, 10, 11, 14]], tied[[7, 10, 11, 14]].expand(BLOCK, -1), atol=2e-3, rtol=0)


@pytest.mark.parametrize(("bits", "factor", "first"), [(4, 7, 3), (3, 5, 2), (2, 3, 1)])
@pytest.mark.parametrize("side", SIDES)
def test_worked_example_codes_survive_packing(bits, factor, first, side):
    # KVQuant's kernels pack them as one stream of bits; ours in planes (kernels/packing.py), so words differ
    codes = (factor * torch.arange(BLOCK) + first) % 2**bits
    fmt = Format(bits=bits, scale="static")
    states = codes.expand(BLOCK, -1).float()[None, None]
    tables = Tables(scale=torch.ones(1, BLOCK), zero=torch.zeros(1, BLOCK))
    packed = encode(states, fmt, side, BLOCK, tables=tables)
    assert torch.equal(decode(packed, fmt, side, BLOCK, BLOCK, tables), states)
