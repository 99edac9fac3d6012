"""What the strategies of other systems pack is what their papers and documents say, number by number."""

import pytest
import torch
from torch import Tensor

from cachequant import registry
from cachequant.core import Format, LayerFormat, LayerSpec, PackedCache, Strategy
from cachequant.core.calibration import lloyd_max
from cachequant.core.hf.tiny import tiny_model
from cachequant.kernels import quantize
from cachequant.strategies.fp8 import FP8
from cachequant.strategies.int8 import INT8
from cachequant.strategies.kivi import KIVI
from cachequant.strategies.rotated import Rotated
from cachequant.strategies.turboquant import TurboQuant

LAYER = LayerSpec(index=4, layers=9, kv_heads=2, head_dim=128, value_dim=128)

# J. Max, Quantizing for minimum distortion, 1960, table I: positive levels, and the mean squared error
MAX_1960 = {
    2: ([0.4528, 1.510], 0.1175),
    3: ([0.2451, 0.7560, 1.344, 2.152], 0.03454),
    4: ([0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], 0.009497),
}


def states(tokens: int = 256, head_dim: int = 128, seed: int = 0) -> Tensor:
    """Channels of different sizes, two of them far out, as keys have them: `[2, 2, tokens, head_dim]`."""
    sizes = torch.linspace(0.3, 2, head_dim)
    sizes[torch.tensor([5, head_dim // 2])] = 15
    return torch.randn(2, 2, tokens, head_dim, generator=torch.Generator().manual_seed(seed)) * sizes


def packed(strategy: Strategy, side: str, x: Tensor, first: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """What a strategy packs, and what that decodes to."""
    formats = strategy.formats(LAYER)
    assert isinstance(formats, LayerFormat)
    fmt: Format = getattr(formats, side)
    tables = strategy.tables(LAYER, side, x[:, :, : formats.block] if first is None else first, None)  # type: ignore[arg-type]
    encoded = strategy.encode(x, fmt, side, formats.block, None, tables)  # type: ignore[arg-type]
    return encoded, quantize.decode(encoded, fmt, side, x.shape[-1], formats.block, tables)  # type: ignore[arg-type]


def bits_per_number(strategy: Strategy, head_dim: int = 128) -> float:
    formats = strategy.formats(LAYER)
    assert isinstance(formats, LayerFormat)
    return formats.bytes_per_token(head_dim, head_dim, 2) * 8 / (2 * head_dim)


def half(x: Tensor) -> Tensor:
    return x.half().float()


# --- KIVI


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("group", [32, 64])
def test_kivi_rounds_keys_per_channel_and_values_per_token_as_its_equation_says(bits, group):
    x = states()
    strategy = KIVI(bits=bits, group_size=group)
    # keys: [batch, heads, groups of tokens, tokens, channels]; values: [..., tokens, groups of channels, channels]
    for side, grouped, axis in (
        ("key", x.unflatten(2, (-1, group)), 3),
        ("value", x.unflatten(3, (-1, group)), 4),
    ):
        zero = half(grouped.amin(axis, keepdim=True))
        scale = half((grouped.amax(axis, keepdim=True) - grouped.amin(axis, keepdim=True)) / (2**bits - 1))
        expected = ((grouped - zero) / scale).round().clamp(0, 2**bits - 1) * scale + zero
        _, decoded = packed(strategy, side, x)
        torch.testing.assert_close(decoded, expected.reshape(x.shape), rtol=1e-5, atol=1e-5)


def test_kivi_stores_a_float16_scale_and_zero_for_every_32_numbers():
    assert bits_per_number(KIVI()) == 2 + 32 / 32
    assert bits_per_number(KIVI(bits=4)) == 4 + 32 / 32
    assert bits_per_number(KIVI(group_size=128)) == 2 + 32 / 128


def test_kivi_keeps_the_newest_128_tokens_exact_and_what_a_group_is_short_of():
    model = tiny_model()
    ids = torch.randint(2, 97, (1, 300), generator=torch.Generator().manual_seed(0))
    for options, exact in (({}, range(128, 160)), ({"residual_length": 32}, range(32, 64))):
        cache = PackedCache(model, KIVI(), **options)
        with torch.no_grad():
            model(ids, past_key_values=cache)
        assert 300 - cache.packed_layers[0].packed_tokens in exact


@pytest.mark.parametrize(("dim", "group"), [(16, 16), (40, 8), (80, 16), (96, 32), (256, 32)])
def test_kivi_groups_heads_of_any_even_size(dim, group):
    layer = LayerSpec(index=0, layers=1, kv_heads=1, head_dim=64, value_dim=dim)
    formats = KIVI().formats(layer)
    formats.require_fitting(64, dim)
    assert formats.value.group == group and formats.value.groups(dim) == dim // group


def test_kivi_refuses_heads_without_groups():
    with pytest.raises(ValueError, match="heads of 63 have no groups"):
        KIVI().formats(LayerSpec(index=0, layers=1, kv_heads=1, head_dim=64, value_dim=63))


# --- rotated


def test_rotated_keys_are_int4_in_the_basis_of_hadamard_blocks():
    x = states()
    order_16 = torch.tensor([[1.0]])
    for _ in range(4):
        order_16 = torch.cat([torch.cat([order_16, order_16], 1), torch.cat([order_16, -order_16], 1)])
    turned = torch.block_diag(*[order_16 / 4] * 8)
    y = x @ turned
    zero = half(y.amin(-1, keepdim=True))
    scale = half((y.amax(-1, keepdim=True) - y.amin(-1, keepdim=True)) / 15)
    expected = (((y - zero) / scale).round().clamp(0, 15) * scale + zero) @ turned.T
    _, decoded = packed(Rotated(), "key", x)
    # a number on the border of two cells may go to either
    assert ((decoded - expected).abs() < 1e-4).float().mean() > 0.999
    assert bits_per_number(Rotated()) == 4 + 32 / 128


def test_rotation_spreads_outlier_channels():
    x = states()
    errors = {
        spec: (packed(registry.parse(spec), "key", x)[1] - x).square().mean()  # type: ignore[arg-type]
        for spec in ("uniform", "rotated:rotation_size=4", "rotated", "rotated:rotation_size=none")
    }
    assert errors["rotated:rotation_size=none"] < errors["rotated"] < errors["rotated:rotation_size=4"]
    assert errors["rotated"] < errors["uniform"] / 3


def test_values_are_rotated_only_where_that_is_asked_for():
    formats = [Rotated(rotate=rotate).formats(LAYER).value for rotate in ("key", "both")]
    assert [each.rotation for each in formats] == ["none", "hadamard"]


@pytest.mark.parametrize(("dim", "size", "mixed"), [(80, 16, 16), (80, 32, 16), (8, 16, 8), (96, None, 32)])
def test_heads_that_blocks_do_not_divide_are_rotated_in_the_largest_that_do(dim, size, mixed):
    layer = LayerSpec(index=0, layers=1, kv_heads=1, head_dim=dim, value_dim=dim)
    formats = Rotated(rotation_size=size).formats(layer)
    formats.require_fitting(dim, dim)
    assert formats.key.basis(dim) == mixed


def test_a_format_whose_blocks_do_not_divide_a_head_is_refused_with_what_fits():
    formats = Rotated(rotation_size=32).formats(LAYER)
    with pytest.raises(ValueError, match="rotation_size=32 does not divide head_dim=80; use up to 16"):
        formats.require_fitting(80, 80)


# --- TurboQuant


@pytest.mark.parametrize("bits", MAX_1960)
def test_lloyd_max_levels_are_those_of_the_normal_distribution(bits):
    levels, error = MAX_1960[bits]
    found = lloyd_max(bits)
    torch.testing.assert_close(found[2 ** (bits - 1) :], torch.tensor(levels), rtol=0, atol=1e-3)
    assert torch.equal(found, -found.flip(0))
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    nearest = found[(normal[:, None] - found).abs().argmin(1)]
    assert float((normal - nearest).square().mean()) == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_turboquant_keys_lose_what_lloyd_max_loses_whatever_their_channels_are(bits):
    x = states(tokens=1024)
    _, decoded = packed(TurboQuant(key_bits=bits, norm_correction=False, boundary_layers=0), "key", x)
    lost = (decoded - x).square().sum(-1) / x.square().sum(-1)
    # two channels hold most of a key, which is no normal distribution: a few percent are left of it
    assert float(lost.mean()) == pytest.approx(MAX_1960[bits][1], rel=0.2)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_norm_correction_gives_keys_back_their_length(bits):
    x = states()
    ratios = {}
    for corrected in (False, True):
        _, decoded = packed(TurboQuant(key_bits=bits, norm_correction=corrected), "key", x)
        ratios[corrected] = decoded.norm(dim=-1) / x.norm(dim=-1)
    # a float16 scale is right to one in 2048
    torch.testing.assert_close(ratios[True], torch.ones_like(ratios[True]), rtol=0, atol=6e-4)
    assert (ratios[False] - 1).abs().mean() > 10 * (ratios[True] - 1).abs().mean()


@pytest.mark.parametrize(
    ("name", "key_bytes", "value_bytes"),
    # vLLM's TurboQuantConfig: codes and a float16 norm of a key; codes, scale and zero of a value
    [
        ("turboquant_4bit_nc", 128 * 4 // 8 + 2, 128 * 4 // 8 + 4),
        ("turboquant_k3v4_nc", 128 * 3 // 8 + 2, 128 * 4 // 8 + 4),
        ("turboquant_3bit_nc", 128 * 3 // 8 + 2, 128 * 3 // 8 + 4),
        # theirs has no scale, for which we hold two bytes
        ("turboquant_k8v4", 128 + 2, 128 * 4 // 8 + 4),
    ],
)
def test_presets_of_turboquant_take_the_bytes_that_vllm_gives_them(name, key_bytes, value_bytes):
    formats = registry.parse(name).formats(LAYER)
    assert isinstance(formats, LayerFormat)
    assert formats.key.bytes_per_token("key", 128, formats.block, 2) == key_bytes
    assert formats.value.bytes_per_token("value", 128, formats.block, 2) == value_bytes


@pytest.mark.parametrize(
    ("boundary", "layers", "exact"),
    [(2, 9, {0, 1, 7, 8}), (0, 9, set()), (2, 4, {0, 1, 2, 3}), (2, 3, {0, 2}), (5, 2, {0, 1}), (1, 1, set())],
)
def test_boundary_layers_stay_exact_up_to_half_of_all_at_either_end(boundary, layers, exact):
    strategy = TurboQuant(boundary_layers=boundary)
    specs = [LayerSpec(index=i, layers=layers, kv_heads=2, head_dim=64, value_dim=64) for i in range(layers)]
    assert {each.index for each in specs if strategy.formats(each) is None} == exact


# --- 8 bits


def test_fp8_is_torch_s_e4m3_of_a_token_scaled_to_448():
    x = states()
    scale = half(x.abs().amax(-1, keepdim=True) / 1.75)
    expected = (x / scale * 256).clamp(-448, 448).to(torch.float8_e4m3fn).float() / 256 * scale
    for side in ("key", "value"):
        encoded, decoded = packed(FP8(), side, x)
        torch.testing.assert_close(decoded, expected, rtol=1e-6, atol=1e-6)
        assert encoded.keys() == {"codes", "scales"}
    assert bits_per_number(FP8()) == 8 + 16 / 128


@pytest.mark.parametrize("scale", ["head", "tensor"])
def test_fp8_scales_that_tokens_share_come_from_the_first_block_and_saturate_beyond_their_headroom(scale):
    x = states()
    x[:, 1] *= 4
    strategy = FP8(scale=scale, headroom=2)
    first = x[:, :, :128]
    encoded, decoded = packed(strategy, "key", x, first)
    assert encoded.keys() == {"codes"} and bits_per_number(strategy) == 8
    assert ((decoded - x).abs() <= x.abs() / 16 + 1e-2).all()
    largest = first.abs().amax((0, 2, 3)) if scale == "head" else first.abs().amax().expand(2)
    tables = strategy.tables(LAYER, "key", first, None)
    torch.testing.assert_close(tables.scale, (largest * 2 / 1.75)[:, None].expand(-1, 128))
    _, decoded = packed(strategy, "key", x * 100, first)
    torch.testing.assert_close(decoded.abs().amax((0, 2, 3)), 2 * largest)


def test_fp8_scales_are_not_those_of_padding():
    x = states(tokens=128)
    valid = torch.ones(2, 128, dtype=torch.bool)
    valid[:, :5] = False
    loud = torch.where(valid[:, None, :, None], x, torch.full_like(x, 1e4))
    for scale in ("head", "tensor"):
        strategy = FP8(scale=scale)
        assert torch.equal(
            strategy.tables(LAYER, "key", loud, valid).scale,
            strategy.tables(LAYER, "key", torch.where(valid[:, None, :, None], x, 0), None).scale,
        )


@pytest.mark.parametrize("scale", ["head", "tensor"])
def test_fp8_scales_of_a_first_block_that_says_nothing_do_not_ruin_what_follows(scale):
    x = states(tokens=256)
    strategy = FP8(scale=scale)
    fmt = strategy.formats(LAYER).key
    first = x[:, :, :128]
    nothing = torch.zeros(2, 128, dtype=torch.bool)
    poisoned = torch.where(nothing[:, None, :, None] | (torch.arange(128) > 4)[None, None, :, None], first, torch.nan)
    seen = (torch.arange(128) > 4).expand(2, -1)
    for block, valid, wrong in (
        (first, nothing, 0.05),  # padding and sinks alone
        (poisoned, seen, 0.05),  # padding that is not a number
        (torch.zeros_like(first), None, 0.05),
    ):
        tables = strategy.tables(LAYER, "key", block, valid)
        packed_x = strategy.encode(x, fmt, "key", 128, None, tables)
        decoded = quantize.decode(packed_x, fmt, "key", 128, 128, tables)
        assert (decoded - x).norm() < wrong * x.norm()


@pytest.mark.parametrize("size", [1e-6, 1e6])
@pytest.mark.parametrize("spec", ["turboquant:boundary_layers=0", "turboquant:norm_correction=false,boundary_layers=0"])
def test_norms_beyond_float16_saturate_and_those_of_nothing_stay_finite(spec, size):
    x = states(tokens=128) * size
    x[:, :, :3] = 0
    _, decoded = packed(registry.parse(spec), "key", x)  # type: ignore[arg-type]
    assert decoded.isfinite().all()
    assert (decoded[:, :, :3] == 0).all()


def test_int8_has_256_levels_around_zero_of_every_token():
    x = states()
    scale = half(2 * x.abs().amax(-1, keepdim=True) / 255)
    expected = ((x / scale + 127.5).round().clamp(0, 255) - 127.5) * scale
    _, decoded = packed(INT8(), "value", x)
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-4)
    assert bits_per_number(INT8()) == 8 + 16 / 128
