"""The fast CPU path agrees with the reference in float64 for all it serves, and says what it does not serve."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cachequant.kernels import backend, cpu
from cachequant.kernels.attention import finish, packed_partial, packed_scores
from cachequant.kernels.format import Format
from cachequant.kernels.packing import pack
from cachequant.kernels.quantize import Tables, decode, encode

BLOCK = 32
BATCH, HEADS, BLOCKS = 2, 3, 5
HEAD_DIMS = [20, 64, 80]  # rows of 20 codes end within a word
ROWS = [1, 6, 20]

FLOAT8 = Format(bits=8, codes="float8", symmetric=True)
FORMATS = {
    **{f"{bits}bit-token": Format(bits=bits) for bits in (2, 3, 4, 8)},
    **{f"{bits}bit-channel": Format(bits=bits, scale="channel") for bits in (2, 3, 4, 8)},
    **{f"{bits}bit-groups": Format(bits=bits, group=10) for bits in (2, 3, 4, 8)},
    **{f"{bits}bit-codebook": Format(bits=bits, codes="codebook") for bits in (2, 3, 4, 8)},
    "static": Format(scale="static"),
    "symmetric": Format(symmetric=True),
    "symmetric-channel": Format(bits=8, scale="channel", symmetric=True),
    "midpoint": Format(grid="midpoint"),
    "codebook-groups": Format(codes="codebook", group=10),
    "codebook-channel": Format(codes="codebook", scale="channel"),
    "codebook-static": Format(codes="codebook", scale="static"),
    "outliers": Format(bits=2, outliers=3),
    "outliers-channel": Format(bits=3, scale="channel", outliers=3),
    "outliers-static": Format(codes="codebook", scale="static", outliers=1),
    "outliers-groups": Format(bits=2, group=10, outliers=2),
    "rotated": Format(rotation="hadamard"),
    "rotated-blocks": Format(rotation="hadamard", rotation_size=4),
    "float8": FLOAT8,
    "float8-groups": FLOAT8.model_copy(update={"group": 10}),
    "float8-channel": FLOAT8.model_copy(update={"scale": "channel"}),
    "float8-static": FLOAT8.model_copy(update={"scale": "static"}),
    "norm": Format(codes="codebook", symmetric=True, unit="norm"),
}
AFFINE_PER_TOKEN = ["2bit-token", "4bit-token", "8bit-token", "2bit-groups", "4bit-groups", "8bit-groups", "symmetric"]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    # uninitialised floats are NaN, integers are extreme
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch) -> None:
    # parts of the heads, and a part of the blocks that does not divide them
    monkeypatch.setattr(cpu, "TILE", 2 * BLOCK * 80)
    monkeypatch.setattr(cpu, "INT8_TILE", 2 * BLOCK * 80)


@pytest.fixture
def fresh_trial() -> Iterator[None]:
    cpu.int8_products_work.cache_clear()
    yield
    cpu.int8_products_work.cache_clear()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tables(fmt: Format, head_dim: int) -> Tables:
    levels = torch.linspace(-1, 1, 2**fmt.bits) ** 3
    scale, zero = random(HEADS, head_dim, seed=7).abs() / 4 + 0.1, random(HEADS, head_dim, seed=8) - 2
    return Tables(levels, scale, zero, gain=torch.tensor(1.1), offset=torch.tensor(-0.2))


def packed(fmt: Format, side: str, head_dim: int) -> dict[str, Tensor]:
    """Blocks in a buffer with room before and after them."""
    states = random(BATCH, HEADS, (BLOCKS + 2) * BLOCK, head_dim, seed=1)
    blocks = encode(states, fmt, side, BLOCK, tables=tables(fmt, head_dim))
    return {name: tensor[:, :, 1:-1] for name, tensor in blocks.items()}


def fitting(fmt: Format, head_dim: int) -> Format:
    return fmt if fmt.group is None or head_dim % fmt.group == 0 else fmt.model_copy(update={"group": 8})


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def mixes(fmt: Format, head_dim: int, rows: int, rounded: bool) -> tuple[Tensor, Tensor]:
    """Attention output over packed values, fast and by the reference in float64."""
    blocks, fitted = packed(fmt, "value", head_dim), tables(fmt, head_dim)
    scores = random(BATCH, HEADS, rows, BLOCKS * BLOCK) * 3
    scores[:, :, :, 7:40] = -torch.inf
    found = cpu.packed_partial(scores, blocks, fmt, head_dim, BLOCK, fitted, rounded)
    return finish(found), finish(packed_partial(scores.double(), blocks, fmt, head_dim, BLOCK, fitted))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_scores_agree_with_the_reference(fmt, head_dim, rows):
    fmt = fitting(fmt, head_dim)
    query, fitted = random(BATCH, HEADS, rows, head_dim) / head_dim**0.5, tables(fmt, head_dim)
    blocks = packed(fmt, "key", head_dim)
    found = cpu.packed_scores(query, blocks, fmt, BLOCK, fitted)
    assert found.dtype == torch.float32 and found.shape == (BATCH, HEADS, rows, BLOCKS * BLOCK)
    assert distance(found, packed_scores(query.double(), blocks, fmt, BLOCK, fitted)) < 2e-6


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_values_are_mixed_as_by_the_reference(fmt, head_dim, rows):
    found, expected = mixes(fitting(fmt, head_dim), head_dim, rows, rounded=False)
    assert found.dtype == torch.float32
    assert distance(found, expected) < 1e-5


def test_all_8_bit_floats_are_what_torch_reads():
    codes = torch.arange(256)[:, None] * 7 + torch.arange(20)
    codes = (codes % 256).to(torch.uint8)
    levels = codes.view(torch.float8_e4m3fn).float() * 2**-8
    blocks = {"codes": pack(codes, 8)[None, None, None], "scales": torch.ones(1, 1, 1, 256, 1, 1).half()}
    # a query of one channel reads that channel
    found = cpu.packed_scores(torch.eye(20)[None, None], blocks, FLOAT8, 256)[0, 0].T
    numbers = ~levels.isnan()
    assert torch.equal(found[numbers], levels[numbers])
    # no encoder makes the two others
    assert (~numbers).sum() == 2 * 20 and (found[~numbers].abs() == 1.875).all()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", AFFINE_PER_TOKEN)
def test_int8_products_err_by_a_few_bfloat16_roundings(monkeypatch, name, head_dim):
    monkeypatch.setattr(cpu, "int8_products_work", lambda: True)
    calls = counted(monkeypatch)
    found, expected = mixes(fitting(FORMATS[name], head_dim), head_dim, 4, rounded=True)
    assert calls
    assert 1e-5 < distance(found, expected) < 2**-7


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("strength", [1.0, 4.0], ids=["flat", "peaked"])
def test_bfloat16_attention_errs_no_more_than_sdpa_on_the_dequantized_cache(bits, strength):
    fmt, dim, block = Format(bits=bits), 64, 128
    key, value = (random(1, 2, 16 * block, dim, seed=seed) for seed in (1, 2))
    query = (random(1, 2, 4, dim) * strength).bfloat16()
    keys, values = (encode(states, fmt, side, block) for states, side in ((key, "key"), (value, "value")))
    dense_key, dense_value = (
        decode(blocks, fmt, side, dim, block, dtype=torch.float64)
        for blocks, side in ((keys, "key"), (values, "value"))
    )
    expected = torch.softmax(query.double() @ dense_key.transpose(-1, -2) * dim**-0.5, -1) @ dense_value
    scores = cpu.packed_scores(query.float() * dim**-0.5, keys, fmt, block)
    found = finish(cpu.packed_partial(scores, values, fmt, dim, block, rounded=True)).bfloat16()
    sdpa = torch.nn.functional.scaled_dot_product_attention(query, dense_key.bfloat16(), dense_value.bfloat16())
    assert distance(found, expected) < 1.25 * distance(sdpa, expected)


def counted(monkeypatch) -> list[int]:
    calls: list[int] = []
    multiply = cpu._int8_products

    def counting(*arguments: Tensor) -> Tensor:
        calls.append(1)
        return multiply(*arguments)

    monkeypatch.setattr(cpu, "_int8_products", counting)
    return calls


def missing(*arguments: Tensor) -> Tensor:
    raise AttributeError("no such operator")


def refusing(*arguments: Tensor) -> Tensor:
    raise RuntimeError("not implemented for this machine")


def unscaled(weights: Tensor, codes: Tensor, unit: Tensor) -> Tensor:
    return weights @ codes.bfloat16().T * 2


def unsigned(weights: Tensor, codes: Tensor, unit: Tensor) -> Tensor:
    return weights @ codes.view(torch.uint8).bfloat16().T


@pytest.mark.parametrize("broken", [missing, refusing, unscaled, unsigned])
def test_broken_int8_products_are_noticed_and_not_used(monkeypatch, fresh_trial, broken):
    monkeypatch.setattr(cpu, "_int8_products", broken)
    assert not cpu.int8_products_work()
    found, expected = mixes(Format(), 64, 4, rounded=True)
    assert distance(found, expected) < 1e-5


@pytest.mark.parametrize(("capability", "used"), [("DEFAULT", False), ("AVX2", True)])
def test_int8_products_are_used_where_they_are_written_for_the_machine(monkeypatch, fresh_trial, capability, used):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(
        cpu, "_int8_products", lambda weights, codes, unit: (weights.float() @ codes.float().T).bfloat16()
    )
    assert cpu.int8_products_work() == used


@pytest.mark.parametrize("name", ["4bit-token", "4bit-codebook", "3bit-token"])
def test_other_defaults_of_torch_change_nothing(name):
    fmt = FORMATS[name]
    blocks, fitted = packed(fmt, "value", 64), tables(fmt, 64)
    scores = random(BATCH, HEADS, 4, BLOCKS * BLOCK)
    call = (scores, blocks, fmt, 64, BLOCK, fitted, True)
    expected = cpu.packed_partial(*call).mix
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = cpu.packed_partial(*call).mix
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("name", "rows"),
    [("3bit-token", 4), ("4bit-channel", 4), ("static", 4), ("4bit-codebook", 4), ("float8", 4), ("4bit-token", 20)],
)
def test_int8_products_are_not_asked_for_what_they_do_badly(monkeypatch, name, rows):
    monkeypatch.setattr(cpu, "int8_products_work", lambda: True)
    calls = counted(monkeypatch)
    found, expected = mixes(FORMATS[name], 64, rows, rounded=True)
    assert not calls and distance(found, expected) < 1e-5


def test_only_float32_rows_without_gradients_are_served():
    rows, fmt = random(1, 2, 4, 64), Format()
    assert cpu.serves(rows, fmt, "key")
    assert not cpu.serves(rows.double(), fmt, "key")
    assert not cpu.serves(rows.clone().requires_grad_(), fmt, "key")
    with torch.no_grad():
        assert cpu.serves(rows.clone().requires_grad_(), fmt, "key")


def test_reference_only_means_the_reference():
    with backend.reference_only():
        assert not cpu.serves(random(1, 2, 4, 64), Format(), "value")


@pytest.mark.parametrize("codes", ["exact", "custom", "codebook"])
def test_formats_without_codes_or_without_their_levels_are_not_served(codes):
    assert not cpu.serves(random(1, 2, 4, 64), Format(codes=codes), "value")


@pytest.mark.parametrize("side", ["key", "value"])
def test_many_rows_take_outliers_and_groups_of_keys_elsewhere(side):
    few, many = random(1, 2, 4, 64), random(1, 2, 400, 64)
    for fmt, served in ((Format(), True), (Format(outliers=2), False), (Format(group=16), side == "value")):
        assert cpu.serves(few, fmt, side)
        assert cpu.serves(many, fmt, side) == served
