"""Codebooks lie on the grid that kernels look bytes up on."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from cachequant.core.calibration.kmeans import normal_float, weighted_kmeans
from cachequant.core.calibration.statistics import bin_centres
from cachequant.kernels.format import Format
from cachequant.kernels.quantize import LAST_STEP, Tables, decode, encode

BITS = [2, 3, 4]


def ascending(bits: int, seed: int) -> Tensor:
    """Levels of any size and offset."""
    generator = torch.Generator().manual_seed(seed)
    size, offset = 10 ** (8 * torch.rand(2, generator=generator) - 4)
    return (torch.randn(2**bits, generator=generator) * size + offset * (seed % 3 - 1)).sort().values


@pytest.mark.parametrize("bits", BITS)
def test_levels_move_to_the_nearest_of_127_points(bits):
    for seed in range(200):
        given = ascending(bits, seed)
        levels, exact = Tables(codebook=given).codebook, given.double()
        points = torch.linspace(exact[0], exact[-1], 127, dtype=torch.float64)
        nearest = (points - exact[:, None]).abs().amin(-1)
        rounding = float(given.abs().max()) * 2**-21
        assert_close((levels.double() - exact).abs(), nearest, rtol=0, atol=rounding)
        assert nearest.max() <= (points[1] - points[0]) / 2 + rounding


@pytest.mark.parametrize("bits", BITS)
def test_the_ends_stay_and_what_is_on_the_grid_stays_bitwise(bits):
    for seed in range(500):
        given = ascending(bits, seed)
        tables = Tables(codebook=given)
        assert torch.equal(tables.codebook[[0, -1]], given[[0, -1]])
        assert (tables.codebook.diff() >= 0).all()
        assert torch.equal(Tables(codebook=tables.codebook).codebook, tables.codebook)
        again = replace(tables, gain=torch.ones(())).to(torch.device("cpu"))
        assert torch.equal(again.codebook, tables.codebook)


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_codebooks_stay_symmetric_bitwise(bits):
    for seed in range(500):
        upper = ascending(bits - 1, seed).abs().sort().values
        levels = Tables(codebook=torch.cat([-upper.flip(0), upper])).codebook
        assert torch.equal(levels, -levels.flip(0))


@pytest.mark.parametrize("bits", BITS)
def test_the_zero_of_normal_float_stays_exact(bits):
    given = normal_float(bits)
    (zero,) = (given == 0).nonzero().flatten().tolist()
    for size in (1.0, 0.3, 1e-4, 7e5):
        tables = Tables(codebook=given * size)
        assert (tables.codebook == 0).nonzero().flatten().tolist() == [zero]
        # the middle of the range
        assert tables.steps().index[zero] == LAST_STEP / 2


@pytest.mark.parametrize("bits", BITS)
def test_the_middle_of_any_range_is_a_point(bits):
    for seed in range(200):
        given = ascending(bits, seed)
        given[1] = (given[0] + given[-1]) / 2
        levels = Tables(codebook=given.sort().values).codebook
        assert given[1] in levels


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("bits", BITS)
def test_zeros_come_back_as_zeros_from_normal_float(side, bits):
    fmt, tables = Format(codes="codebook", bits=bits, symmetric=True), Tables(codebook=normal_float(bits))
    states = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    zeros = torch.rand(states.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    states[zeros] = 0
    back = decode(encode(states, fmt, side, 32, tables=tables), fmt, side, 64, 32, tables)
    assert (back[zeros] == 0).all()


@pytest.mark.parametrize("bits", BITS)
def test_steps_give_the_levels_back(bits):
    for seed in range(200):
        tables = Tables(codebook=ascending(bits, seed))
        steps = tables.steps()
        index, step, first = steps.index, steps.step, steps.first
        assert index.dtype == torch.int32 and index[0] == 0 and index[-1] == LAST_STEP == 126
        assert (index.diff() >= 0).all()
        assert step.dtype == first.dtype == torch.float32 and step.ndim == first.ndim == 0
        # a kernel may fuse, or multiply first
        rounding = float(tables.codebook.abs().max()) * 2**-21
        assert_close(first + step * index, tables.codebook, rtol=0, atol=rounding)
        fused = (first.double() + step.double() * index).float()
        assert_close(fused, tables.codebook, rtol=0, atol=rounding)


def test_tables_are_equal_only_to_themselves():
    codebook = ascending(4, 1)
    # of several levels, whose comparison would have no truth value
    one, other = Tables(codebook=codebook), Tables(codebook=codebook)
    assert one == one and one != other and len({one, other, one}) == 2


def test_equal_levels_are_a_grid_without_steps():
    tables = Tables(codebook=torch.full((8,), 0.3))
    assert torch.equal(tables.codebook, torch.full((8,), 0.3))
    assert tables.steps().index.tolist() == [0] * 8 and tables.steps().step == 0


def test_levels_closer_than_a_step_merge():
    tables = Tables(codebook=torch.tensor([0.0, 10.1, 10.2, 126.0]))
    assert tables.codebook.tolist() == [0, 10, 10, 126]


def test_codebooks_of_8_bits_stay_as_they_are():
    levels = torch.randn(256).sort().values
    tables = Tables(codebook=levels)
    assert tables.codebook is levels
    with pytest.raises(ValueError, match="2, 3 or 4 bits"):
        tables.steps()


def test_without_a_codebook_there_are_no_steps():
    with pytest.raises(ValueError, match="2, 3 or 4 bits"):
        Tables().steps()


def test_codebooks_are_built_in_inference_mode_and_used_outside():
    given = ascending(4, 1)
    with torch.inference_mode():
        inside = Tables(codebook=given.clone())
    assert torch.equal(inside.codebook, Tables(codebook=given).codebook)
    assert torch.equal(Tables(codebook=inside.codebook).codebook, inside.codebook)
    assert inside.steps().index.max() == LAST_STEP


def test_building_tables_never_waits_for_the_device():
    # a meta tensor has no numbers to wait for
    tables = Tables(codebook=torch.empty(16, device="meta"))
    assert tables.codebook.shape == (16,) and tables.steps().index.dtype == torch.int32


@pytest.mark.parametrize("bits, cost", [(2, 0.001), (3, 0.005), (4, 0.03)])
@pytest.mark.parametrize("name", ["normal", "laplace", "uniform"])
def test_the_grid_costs_fitted_codebooks_little(name, bits, cost):
    centres = bin_centres()
    density = {
        "normal": (-(3 * centres).square() / 2).exp(),
        "laplace": (-6 * centres.abs()).exp(),
        "uniform": torch.ones_like(centres),
    }[name]

    def error(levels: Tensor) -> float:
        return float(((centres[:, None] - levels).square().amin(-1) * density).sum())

    fit = weighted_kmeans(centres, density, 2**bits)
    assert error(Tables(codebook=fit).codebook) <= (1 + cost) * error(fit)


@pytest.mark.parametrize("bits", BITS)
def test_normal_float_keeps_its_levels_apart(bits):
    assert (Tables(codebook=normal_float(bits)).codebook.diff() > 0.05).all()
