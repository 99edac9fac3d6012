"""Orthogonal basis changes along head_dim that spread outlier channels over their neighbours."""

from functools import lru_cache

import torch
from torch import Tensor


def hadamard_rotate(states: Tensor, basis: int | None = None) -> Tensor:
    """`states [..., head_dim]` in the Hadamard basis of every run of `basis` channels; its own inverse.

    basis: a power of two that divides head_dim (`Format.basis`); 1 changes nothing. None: the largest there is.

    Queries and keys rotated alike keep their dot products (QuaRot, https://arxiv.org/abs/2404.00456).
    """
    if basis is None:
        basis = states.shape[-1] & -states.shape[-1]
    if basis == 1:
        return states
    matrix = _hadamard(basis, states.dtype, states.device)
    return (states.unflatten(-1, (-1, basis)) @ matrix).flatten(-2)


@lru_cache(maxsize=32)
def _hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # outside inference mode, so that a cached matrix can serve later calls under autograd
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while matrix.shape[0] < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
        return (matrix / size**0.5).to(device=device, dtype=dtype)
