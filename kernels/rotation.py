"""Orthogonal basis changes along head_dim that spread outlier channels over their neighbours."""

from functools import lru_cache

import torch
from torch import Tensor


def hadamard_rotate(states: Tensor) -> Tensor:
    """`states [..., head_dim]` in the Hadamard basis; its own inverse.

    A head_dim that is not a power of two is rotated in blocks of its largest power-of-two factor. Queries and keys
    rotated alike keep their dot products (QuaRot, https://arxiv.org/abs/2404.00456).
    """
    dim = states.shape[-1]
    block = dim & -dim
    matrix = _hadamard(block, states.dtype, states.device)
    return (states.unflatten(-1, (dim // block, block)) @ matrix).flatten(-2)


@lru_cache(maxsize=32)
def _hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # outside inference mode, so that a cached matrix can serve later calls under autograd
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while matrix.shape[0] < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
        return (matrix / size**0.5).to(device=device, dtype=dtype)
