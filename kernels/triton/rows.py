"""Scores and mixes of pooled rows, each with one launch per width: from tensors to launches."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from math import frexp, gcd
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..backend import interpreted
from ..format import row_bits, row_words
from ..rows import Run
from .row_products import mix_rows, round_queries, score_rows

# rows that a program reads at a time
TILE = 64
# tiles of rows that are worth a partial sum
TILES_PER_SUM = 4
# programs that fill the largest devices
PROGRAMS = 1024
# dot products are unrolled
MOST_SEGMENTS = 128
# numbers of a segment that one operand takes
WIDEST = 128
# float32 sums a program keeps in registers
SUMS = 8192
# what smaller weights are taken for where outliers are added up
TINY = 1e-30
# sums of outliers, so that programs seldom add to the same one
COPIES = 16


class Segments(NamedTuple):
    """How rows are cut."""

    planes: int
    run: int
    """Codes of a plane."""
    length: int
    """Codes of a segment."""
    padded: int
    """Those of the operand, a power of two."""
    groups: int
    """Programs that share the heads of a row so that none reads a word it has no use for."""

    @property
    def in_row(self) -> int:
        return self.planes * self.run // self.length


@cache
def segments(bits: int, heads: int, dim: int, widest: int = WIDEST) -> Segments:
    """How rows of `heads * dim` numbers are cut into segments of at most `widest`, where possible."""
    planes = 16 // (2 if bits == 3 else bits)
    run = heads * dim if bits == 16 else row_words(heads * dim, bits) * 32 // bits // planes
    whole = run == heads // planes * dim
    length = run if heads == 1 else gcd(dim, run)
    while length > max(16, widest) and length % 4 == 0:
        length //= 2
    return Segments(planes, run, length, max(16, triton.next_power_of_2(length)), heads // planes if whole else 1)


@cache
def unserved(bits: int, heads: int, dim: int) -> str | None:
    """What keeps rows of `heads * dim` numbers from these kernels; None if nothing does."""
    cut = segments(bits, heads, dim)
    if cut.length % 2 or (heads > 1 and cut.length < 8) or cut.padded > WIDEST or cut.in_row > MOST_SEGMENTS:
        return f"head_dim={dim}, heads in a row: {heads}, bits: {bits}"
    return None


def scores(query: Tensor, runs: Sequence[Run], tokens: int) -> Tensor:
    """Dot products float32 `[owners, heads, R, tokens]` with `query [owners, heads, R, dim]`; -inf where no row is."""
    owners, heads, lines, dim = query.shape
    device = query.device
    out = torch.full((owners, heads, lines, tokens), -torch.inf, device=device)
    if not out.numel() or not runs:
        return out
    # what outliers add is kept for every head
    columns = _columns(lines, 16 if heads > 1 and any(run.fmt.outliers for run in runs) else 64)
    tiles = -(-lines // columns)
    rounded = torch.empty(owners, heads, tiles, dim, columns, dtype=torch.float16, device=device)
    numbers = torch.empty(2, owners, heads, tiles, columns, device=device)
    query = query if query.stride(-1) == 1 else query.contiguous()
    with _on(device):
        launch: Any = round_queries[(tiles * columns, heads, owners)]
        launch(
            query,
            *query.stride()[:3],
            rounded,
            numbers,
            lines,
            DIM=dim,
            WIDTH=triton.next_power_of_2(dim),
            COLUMNS=columns,
            num_warps=1,
            enable_fp_fusion=True,
        )
        for run in runs:
            cut = segments(row_bits(run.fmt), heads, dim)
            launch = score_rows[(-(-run.most // TILE), cut.groups * tiles, owners)]
            launch(
                rounded,
                numbers,
                *_pointers(run),
                out,
                lines,
                tokens,
                **_constants(run, heads, dim, cut, columns),
                TILE=TILE,
                GROUPS=cut.groups,
                num_warps=8 if heads // cut.groups * columns > 64 else 4,
            )
    return out


def mix(weights: Tensor, runs: Sequence[Run], dim: int) -> Tensor:
    """Sums of rows float32 `[owners, heads, R, dim]`, weighted by `weights [owners, heads, R, tokens]`."""
    owners, heads, lines, tokens = weights.shape
    device = weights.device
    if not runs or not weights.numel():
        return torch.zeros(owners, heads, lines, dim, device=device)
    weights = weights if weights.stride(-1) == 1 else weights.contiguous()
    columns = _columns(lines, 64)
    tiles = -(-lines // columns)
    cuts = [_cut_for_sums(row_bits(run.fmt), heads, dim, columns) for run in runs]
    splits = [_splits(run.most, owners * tiles * (cut.run // cut.length)) for run, cut in zip(runs, cuts, strict=True)]
    sums = torch.empty(sum(splits), owners, heads, lines, dim, device=device)
    # unread where there are no outliers
    fixed, largest, inverse, unit, copies = sums, sums, sums, 1.0, 1
    slots = any(run.fmt.outliers for run in runs)
    if slots:
        copies = max(1, min(COPIES, PROGRAMS // (owners * tiles)))
        fixed = torch.zeros(copies, owners, heads, tiles, dim, columns, dtype=torch.int64, device=device)
        largest = torch.linalg.vector_norm(weights, torch.inf, -1, dtype=torch.float32).clamp_(min=TINY)
        inverse = largest.reciprocal()
        # so that as many of the largest as there are tokens do not overflow
        unit = 2.0 ** (frexp(max(run.peak for run in runs))[1] + tokens.bit_length() - 62)
    start = 0
    with _on(device):
        for run, cut, count in zip(runs, cuts, splits, strict=True):
            warps = _warps(cut, heads, columns)
            launch: Any = mix_rows[(cut.run // cut.length * tiles, count, owners)]
            launch(
                weights,
                *weights.stride()[:3],
                *_pointers(run),
                sums[start : start + count],
                fixed,
                inverse,
                1 / unit,
                copies,
                lines,
                **_constants(run, heads, dim, cut, columns),
                TILE=_tile(run.fmt.outliers, heads, columns, warps),
                num_warps=warps,
            )
            start += count
    mixed = sums.sum(0)
    if slots:
        outliers = fixed.sum(0).float().transpose(-1, -2).flatten(2, 3)[:, :, :lines]
        mixed.addcmul_(outliers, largest[..., None], value=unit)
    return mixed


def _splits(rows: int, programs: int) -> int:
    """Partial sums of an owner's rows, where as many programs share them already."""
    return max(1, min(-(-rows // (TILE * TILES_PER_SUM)), -(-PROGRAMS // programs)))


def _cut_for_sums(bits: int, heads: int, dim: int, columns: int) -> Segments:
    # for 3 bits two words are kept for every sum
    sums = SUMS // 2 if bits == 3 else SUMS
    return segments(bits, heads, dim, min(WIDEST, sums // (segments(bits, heads, dim).planes * columns)))


def _columns(lines: int, most: int) -> int:
    """Lines that a program has at a time."""
    return 8 if lines <= 8 else 16 if lines <= 16 else most


def _warps(cut: Segments, heads: int, columns: int) -> int:
    """So many that none repeats another's work, and that sums, and weights of several heads, fit their registers."""
    return 4 if heads > 1 else min(4, max(1, cut.padded // 16, cut.planes * cut.padded * columns // 2048))


def _tile(slots: int, heads: int, columns: int, warps: int) -> int:
    """Rows at a time, so that what is kept of each, and where its outliers go, fits the registers."""
    return TILE // 2 if slots and (heads > 1 or columns > 16 or warps == 1) else TILE


def _pointers(run: Run) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = run.rows
    codes = rows["exact"] if "exact" in rows else rows["codes"]
    # unread where a format has none
    scales = rows["scales"].view(torch.int32) if "scales" in rows else run.starts
    index = rows.get("outlier_index", run.starts)
    value = rows.get("outlier_value", run.starts)
    return codes, scales, index, value, run.tokens, run.starts


def _constants(run: Run, heads: int, dim: int, cut: Segments, columns: int) -> dict[str, Any]:
    bits = row_bits(run.fmt)
    return {
        "HEADS": heads,
        "DIM": dim,
        "BITS": bits,
        "WORDS": heads * dim if bits == 16 else row_words(heads * dim, bits),
        "PLANES": cut.planes,
        "RUN": cut.run,
        "LENGTH": cut.length,
        "PADDED": cut.padded,
        "SLOTS": run.fmt.outliers if bits < 16 else 0,
        "COLUMNS": columns,
        "ASM": not interpreted() and torch.version.hip is None,
        "enable_fp_fusion": True,
    }


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
