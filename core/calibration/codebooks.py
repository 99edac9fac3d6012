"""Tables for decoding, from statistics: codebooks, and the correction of Q-Norm."""

from dataclasses import replace
from typing import Literal

import torch

from ...kernels.format import Format, Side
from ...kernels.quantize import Tables
from .kmeans import normal_float, weighted_kmeans
from .statistics import Statistics, Weights, bin_centres, q_norm

Datatype = Literal["nuq", "nf", "int"]


def fitted_tables(statistics: Statistics, fmt: Format, side: Side, datatype: Datatype, weights: Weights) -> Tables:
    """The tables of a format: static grid, levels of its codebook, sensitivities of keys, as far as it has them.

    nuq: the codebook with the smallest weighted error on the density (KVQuant, equation 1), the global optimum.
    nf: NormalFloat, fitted to nothing. int: equal steps, without a codebook.
    """
    grid = statistics.grid(fmt)
    if side == "key" and fmt.outliers:
        grid = replace(grid, sensitivity=statistics.sensitivity)
    if datatype == "int":
        return grid
    if datatype == "nf":
        return replace(grid, codebook=normal_float(fmt.bits))
    mass = statistics.mass(weights)
    if not mass.sum() > 0:
        # nothing was sensitive, or all channels were dead: every number alike
        mass = statistics.mass("equal")
    if not mass.sum() > 0:
        return replace(grid, codebook=normal_float(fmt.bits))
    return replace(grid, codebook=weighted_kmeans(bin_centres(), mass, 2**fmt.bits))


def normalised_tables(statistics: Statistics, fmt: Format, tables: Tables) -> Tables:
    """`tables` with Q-Norm: what is decoded then has the mean and deviation that the calibration text had."""
    mass = statistics.mass("equal")
    if not mass.sum() > 0:
        return tables
    half = (2**fmt.bits - 1) / 2
    levels = torch.arange(2**fmt.bits) / half - 1 if tables.codebook is None else tables.codebook
    gain, offset = q_norm(bin_centres(), mass, levels)
    if tables.codebook is None:
        # levels are codes here: half * (u + 1) for a normalised number u
        offset = half * (1 - gain + offset)
    return replace(tables, gain=_scalar(gain), offset=_scalar(offset))


def _scalar(number: float) -> torch.Tensor:
    return torch.tensor(number, dtype=torch.float32)
