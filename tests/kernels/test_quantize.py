"""What encoding keeps of the states, for every format: error bounds, exactness, independence and bytes."""

from itertools import product

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from cachequant.kernels.format import Format, LayerFormat
from cachequant.kernels.quantize import NO_TABLES, Tables, decode, encode

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

# two heads, three blocks, an odd batch
SHAPE = (3, 2, 3 * BLOCK)

LEVELS = torch.tensor([-1.0, -0.7, -0.45, -0.3, -0.2, -0.1, -0.03, 0.0, 0.05, 0.13, 0.2, 0.31, 0.4, 0.6, 0.8, 1.0])


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
    from cachequant.kernels.rotation import hadamard_rotate

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


def test_values_have_no_rope_stage():
    with pytest.raises(ValidationError, match="values carry no rotary position"):
        LayerFormat(key=Format(), value=Format(rope="pre"))


def test_custom_formats_have_no_byte_formula():
    with pytest.raises(ValueError, match="no byte formula"):
        Format(codes="custom").block_bytes("key", 64, 32, 2)
