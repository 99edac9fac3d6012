"""The levels are those that were published, and what is cached lies on them."""

import pytest
import torch
from cachequant.core import LayerSpec
from cachequant.kernels.quantize import decode

from cachequant_nf4 import NF4, normal_float

# QLoRA, https://arxiv.org/abs/2305.14314, appendix E: "the exact values of the NF4 data type"
PUBLISHED = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]

LAYER = LayerSpec(index=0, layers=1, kv_heads=2, head_dim=64, value_dim=64)
STATES = torch.randn(1, 2, 128, 64, generator=torch.Generator().manual_seed(0))


def tables():
    return NF4().tables(LAYER, "key", STATES, None)


def test_levels_are_the_published_ones():
    # float32 quantiles were published, these are float64 rounded once
    torch.testing.assert_close(normal_float(), torch.tensor(PUBLISHED), rtol=0, atol=1e-6)


def test_kernels_read_them_from_a_grid_of_127_points():
    stored = tables().codebook
    torch.testing.assert_close(stored, torch.tensor(PUBLISHED), rtol=0, atol=1 / 126)
    assert all(level in stored.tolist() for level in (-1, 0, 1))


@pytest.mark.parametrize("group_size", [None, 16])
def test_every_number_becomes_the_nearest_level_times_the_largest_of_its_group(group_size):
    strategy = NF4(group_size=group_size)
    formats = strategy.formats(LAYER)
    packed = strategy.encode(STATES, formats.key, "key", formats.block, None, tables())
    decoded = decode(packed, formats.key, "key", 64, formats.block, tables())

    levels = tables().codebook
    groups = STATES.unflatten(-1, (-1, group_size or 64))
    scale = groups.abs().amax(-1, keepdim=True).half().float()
    nearest = (groups[..., None] - scale[..., None] * levels).abs().argmin(-1)
    torch.testing.assert_close(decoded, (levels[nearest] * scale).flatten(-2), rtol=0, atol=1e-5)


def test_four_bits_and_a_scale_are_all_it_holds():
    formats = NF4().formats(LAYER)
    assert formats.bytes_per_token(head_dim=64, value_dim=64, itemsize=2) == 2 * (64 * 4 / 8 + 2)
