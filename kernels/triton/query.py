"""The query as an operand: tile by tile of the keys, rows in the columns of the matrix unit."""

import triton
import triton.language as tl

from .words import planes, power, tile_code, tile_power

# tiles of queries and of weights carry 2 to this, less the position of their codes, so that none is a subnormal
EXPONENT = tl.constexpr(8)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.constexpr_function
def overlap(group, plane, groups, width, head_dim):
    """Whether a group of channels and a plane of `width` channels have any in common."""
    size = head_dim // groups
    low, high = max(group * size, plane * width), min((group + 1) * size, (plane + 1) * width)
    return low < high


@triton.constexpr_function
def tile_index(group, tile, groups, width, head_dim, count):
    """How many pairs of a group and one of `count` tiles that have channels in common come before this one."""
    before = [(g, p) for g in range(groups) for p in range(count) if (g, p) < (group, tile)]
    return sum(overlap(g, p, groups, width, head_dim) for g, p in before)


@triton.jit
def capped(scores, softcap):
    """Scores to base 2, bounded to `(-softcap, softcap)` to base e."""
    unit = softcap * LOG2E
    # tanh, of exp2
    return unit * (1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.0 * LOG2E / unit))))


@triton.jit
def score_columns(x, ROWS: tl.constexpr, EVEN: tl.constexpr):
    """Of `x [tokens, columns]` those that hold rows: `[tokens, ROWS]`."""
    if EVEN:
        x, _ = tl.split(tl.reshape(x, [x.shape[0], ROWS, 2]))
    return x


@triton.jit
def row_columns(x, ROWS: tl.constexpr, EVEN: tl.constexpr):
    """The same of `x [columns]`."""
    if EVEN:
        x, _ = tl.split(tl.reshape(x, [ROWS, 2]))
    return x


@triton.jit
def to_columns(x, ROWS: tl.constexpr, EVEN: tl.constexpr):
    """The inverse of `row_columns`, the columns between rows alike."""
    if EVEN:
        x = tl.reshape(tl.join(x, x), [2 * ROWS])
    return x


@triton.jit
def query_tiles(
    query_rows, live, grid, head, FOLDED: tl.constexpr, HEAD_DIM: tl.constexpr, BITS: tl.constexpr,
    WORDS: tl.constexpr, PADDED: tl.constexpr, MERGE: tl.constexpr, GROUPS: tl.constexpr, LUT: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr, scaling,
):  # fmt: skip
    """The query by group and tile of the keys, each `[2 * MERGE * PADDED, COLUMNS]`, in units of its largest number.

    FOLDED: static scales and the planes' powers of two are in the tiles, static zeros in `constant`.

    Returns the tiles, by row the sum over each group, `constant`, and the unit.
    """
    GROUP: tl.constexpr = HEAD_DIM // GROUPS
    WIDTH: tl.constexpr = 2 * MERGE * WORDS
    TILES: tl.constexpr = planes(BITS) // MERGE
    lane = tl.arange(0, 2 * MERGE * PADDED)
    channel = tile_code(lane, WORDS, MERGE)
    raw = ()
    peak = tl.zeros([COLUMNS], tl.float32)
    constant = tl.zeros([COLUMNS], tl.float32)
    for tile in tl.static_range(TILES):
        at = tile * WIDTH + channel
        inside = (channel < WIDTH) & (at < HEAD_DIM)
        q = tl.load(query_rows + at[None, :], mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if grid is not None and FOLDED:
            pointer = grid + head * (2 * HEAD_DIM) + at
            constant += tl.sum(q * tl.load(pointer + HEAD_DIM, mask=inside, other=0.0)[None, :], 1)
            q = q * tl.load(pointer, mask=inside, other=0.0)[None, :]
        peak = tl.maximum(peak, tl.max(tl.abs(q), 1))
        raw = raw + (q,)
    largest = tl.max(peak, 0)
    # an infinite row is lost, but not the others of its program
    largest = tl.where((largest > 0) & (largest < float("inf")), largest, 1.0)
    sums = ()
    tiles = ()
    for group in tl.static_range(GROUPS):
        total = tl.zeros([COLUMNS], tl.float32)
        for tile in tl.static_range(TILES):
            if overlap(group, tile, GROUPS, WIDTH, HEAD_DIM):
                at = tile * WIDTH + channel
                mine = (at >= group * GROUP) & (at < (group + 1) * GROUP)
                q = tl.where(mine[None, :], raw[tile], 0.0)
                total += tl.sum(q, 1)
                if FOLDED:
                    q = q * (tile_power(lane, BITS, LUT, tile, MERGE) * power(EXPONENT))
                tiles = tiles + (tl.trans(q * (1.0 / largest)),)
        sums = sums + (row_columns(total * (scaling * LOG2E), ROWS, EVEN),)
    return tiles, sums, row_columns(constant * (scaling * LOG2E), ROWS, EVEN), largest


@triton.jit
def keep_query(query, scratch, row, rows, scaling, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr):
    """The query scaled, `[HEAD_DIM, ROWS]`, where it can be read by channel."""
    for channel in range(HEAD_DIM):
        q = tl.load(query + row * HEAD_DIM + channel, mask=row < rows, other=0.0).to(tl.float32)
        tl.store(scratch + channel * ROWS + tl.arange(0, ROWS), q * (scaling * LOG2E))
    tl.debug_barrier()
