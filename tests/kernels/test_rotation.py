"""The Hadamard rotation is orthonormal, its own inverse, and spreads a spike evenly."""

import pytest
import torch

from cachequant.kernels.format import Format
from cachequant.kernels.rotation import hadamard_rotate

# head_dim: the power of two that is rotated together
BLOCKS = {1: 1, 8: 8, 63: 1, 64: 64, 80: 16, 96: 32, 100: 4, 128: 128, 256: 256}


def matrix(dim: int) -> torch.Tensor:
    return hadamard_rotate(torch.eye(dim, dtype=torch.float64))


@pytest.mark.parametrize("dim", BLOCKS)
def test_rotation_is_orthonormal(dim):
    torch.testing.assert_close(matrix(dim) @ matrix(dim).T, torch.eye(dim, dtype=torch.float64))


@pytest.mark.parametrize("dim", BLOCKS)
def test_rotating_twice_gives_the_states_back(dim):
    states = torch.randn(2, 3, 5, dim, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(hadamard_rotate(hadamard_rotate(states)), states)


@pytest.mark.parametrize("dim", BLOCKS)
def test_a_spike_is_spread_evenly_over_its_block(dim):
    block = BLOCKS[dim]
    spread = matrix(dim).abs()
    expected = torch.block_diag(*[torch.full((block, block), block**-0.5)] * (dim // block)).double()
    torch.testing.assert_close(spread, expected)


@pytest.mark.parametrize(("dim", "size"), [(64, 16), (80, 4), (96, 32), (128, 128), (100, 1)])
def test_a_size_rotates_runs_of_so_many_channels_each_alike(dim, size):
    whole = hadamard_rotate(torch.eye(size, dtype=torch.float64), size)
    found = hadamard_rotate(torch.eye(dim, dtype=torch.float64), size)
    torch.testing.assert_close(found, torch.block_diag(*[whole] * (dim // size)))


@pytest.mark.parametrize("dim", BLOCKS)
def test_formats_rotate_as_many_channels_as_they_say_or_as_the_head_allows(dim):
    assert Format().basis(dim) == 1
    assert Format(rotation="hadamard").basis(dim) == BLOCKS[dim]
    assert Format(rotation="hadamard", rotation_size=2).basis(dim) == 2


@pytest.mark.parametrize("dim", BLOCKS)
def test_dot_products_survive(dim):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(7, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(hadamard_rotate(query) @ hadamard_rotate(key).T, query @ key.T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtype_is_kept(dtype):
    assert hadamard_rotate(torch.ones(3, 64, dtype=dtype)).dtype == dtype


def test_matrix_made_in_inference_mode_serves_autograd():
    with torch.inference_mode():
        hadamard_rotate(torch.ones(1, 512))
    states = torch.ones(1, 512, requires_grad=True)
    hadamard_rotate(states).sum().backward()
    assert states.grad is not None
