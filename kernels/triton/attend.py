"""Fused attention over packed blocks: one pass over the codes, nothing dequantized in memory.

A program takes the blocks of one split for one kv head and a few rows (query heads of that kv head, query positions).
Operands are swapped, `S^T = K Q^T` and `O^T = V^T P^T`, so that packed keys and values, not queries, fill the long side
of the matrix units: see `words.py` for how codes get there without conversion. Scales stay outside the dot products.
"""

import triton
import triton.language as tl

from .query import (
    EXPONENT,
    LOG2E,
    capped,
    keep_query,
    overlap,
    query_tiles,
    row_columns,
    score_columns,
    tile_index,
    to_columns,
)
from .rope import decoded_keys, grid_pairs, turned_pairs
from .scales import largest_scale, load_held, scale_and_zero
from .words import (
    padded_words,
    plane_position,
    planes,
    planes_per_tile,
    power,
    tile_code,
    tile_power,
    unit_exponent,
    unpacked,
)


@triton.jit
def _by_plane(p, SPAN: tl.constexpr, PLANES: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """`p [SPAN * PLANES * WIDTH, COLUMNS]` of SPAN blocks as PLANES tiles `[SPAN * WIDTH, COLUMNS]`."""
    if PLANES == 2:
        a, b = tl.split(tl.permute(tl.reshape(p, [SPAN, 2, WIDTH, COLUMNS]), (0, 2, 3, 1)))
        parts = (a, b)
    if PLANES == 4:
        low, high = tl.split(tl.permute(tl.reshape(p, [SPAN, 2, 2, WIDTH, COLUMNS]), (0, 2, 3, 4, 1)))
        a, b = tl.split(tl.permute(low, (0, 2, 3, 1)))
        c, d = tl.split(tl.permute(high, (0, 2, 3, 1)))
        parts = (a, b, c, d)
    if PLANES == 8:
        low, high = tl.split(tl.permute(tl.reshape(p, [SPAN, 2, 2, 2, WIDTH, COLUMNS]), (0, 2, 3, 4, 5, 1)))
        first, second = tl.split(tl.permute(low, (0, 2, 3, 4, 1)))
        third, fourth = tl.split(tl.permute(high, (0, 2, 3, 4, 1)))
        a, b = tl.split(tl.permute(first, (0, 2, 3, 1)))
        c, d = tl.split(tl.permute(second, (0, 2, 3, 1)))
        e, f = tl.split(tl.permute(third, (0, 2, 3, 1)))
        g, h = tl.split(tl.permute(fourth, (0, 2, 3, 1)))
        parts = (a, b, c, d, e, f, g, h)
    tiles = ()
    for index in tl.static_range(PLANES):
        tiles = tiles + (tl.reshape(parts[index], [SPAN * WIDTH, COLUMNS]),)
    return tiles


# sizes that grow with the cache: compiling anew for each that divides by 16 would cost seconds while decoding
_UNSPECIALISED = [
    "rows", "queries", "blocks", "first", "slots", "key_capacity", "value_capacity", "stride_visible_batch",
    "stride_visible_query",
]  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALISED)
def attend_blocks(
    query,  # [batch * kv_heads, rows, HEAD_DIM]
    key_codes,  # int32 [batch * kv_heads, key_capacity, BLOCK, KEY_ROW]
    key_scales,  # (scale, zero) float16 as one int32, or scale alone: see KEY_SCALE and KEY_ZERO
    key_table,  # bytes of the levels' entries, for codebooks
    key_levels,  # float32 [2]: level = levels[0] * entry + levels[1]; None: level = entry
    key_grid,  # float32 [kv_heads, 2, HEAD_DIM]: scale and zero of static channels, of entries
    key_places,  # int16 [batch * kv_heads, key_capacity, BLOCK, KEY_OUTLIERS]
    key_excess,  # float16, the same shape
    value_codes,  # int32 [batch * kv_heads, value_capacity, VALUE_DIM, VALUE_ROW]
    value_scales,
    value_table,
    value_levels,
    value_grid,
    value_places,  # int16 [batch * kv_heads, value_capacity, VALUE_DIM, VALUE_OUTLIERS]
    value_excess,
    cos,  # [batch or 1, tokens, HEAD_DIM // 2] of keys before RoPE
    sin,
    visible,  # uint8 [batch or 1, queries or 1, tokens]; None: all are
    scratch,  # float32 [programs, HEAD_DIM + TILE, ROWS], for outliers
    mix,  # float32 [batch * kv_heads, slots, rows, VALUE_DIM]
    lse,  # float32 [batch * kv_heads, slots, rows], to base 2
    blocks_held,  # int32 [1], the blocks to read; None: `blocks`
    scaling,
    softcap,
    rows,
    queries,
    blocks,
    first,
    kv_heads,
    slots,
    key_capacity,
    value_capacity,
    stride_visible_batch,
    stride_visible_query,
    stride_angles_batch,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,  # blocks per step
    ROWS: tl.constexpr,  # rows per program
    EVEN: tl.constexpr,  # rows on every second column of the matrix unit: half the registers for scores
    DEFER: tl.constexpr,  # sum weights over tokens after the loop
    KEY_BITS: tl.constexpr,
    KEY_ROW: tl.constexpr,
    KEY_SCALE: tl.constexpr,  # "token", "channel" or "static"
    KEY_GROUPS: tl.constexpr,
    KEY_ZERO: tl.constexpr,
    KEY_LUT: tl.constexpr,
    KEY_FLOAT: tl.constexpr,
    KEY_OUTLIERS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_ROW: tl.constexpr,
    VALUE_SCALE: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    VALUE_ZERO: tl.constexpr,
    VALUE_LUT: tl.constexpr,
    VALUE_FLOAT: tl.constexpr,
    VALUE_OUTLIERS: tl.constexpr,
    PART: tl.constexpr,  # channels of the values that are mixed at a time
    BOUNDED: tl.constexpr,  # tokens before `first` or beyond the last block are hidden
    ASM: tl.constexpr,
):
    """Slot `split` of `mix` and `lse`: normalised sums of values and log-sum-exp of the scores of a split's blocks.

    Grid: (batch * kv_heads, splits, row tiles). A split without blocks writes zeros and -inf.
    """
    TILE: tl.constexpr = SPAN * BLOCK
    COLUMNS: tl.constexpr = 2 * ROWS if EVEN else ROWS
    pid = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    batch, head = pid // kv_heads, pid % kv_heads
    column = tl.arange(0, COLUMNS)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    column_row = tl.program_id(2) * ROWS + (column // 2 if EVEN else column)
    column_live = (column_row < rows) & (column % 2 == 0) if EVEN else column_row < rows
    token = tl.arange(0, TILE)

    if blocks_held is not None:
        blocks = tl.load(blocks_held)
    per_split = tl.cdiv(tl.cdiv(blocks, splits), SPAN) * SPAN
    start = split * per_split
    stop = tl.minimum(start + per_split, blocks)

    # ---- the query, plane by plane ----
    K_WORDS: tl.constexpr = KEY_ROW // 3 * 2 if KEY_BITS == 3 else KEY_ROW
    K_PADDED: tl.constexpr = padded_words(K_WORDS)
    MERGE: tl.constexpr = planes_per_tile(K_WORDS)
    K_TILES: tl.constexpr = planes(KEY_BITS) // MERGE
    K_WIDTH: tl.constexpr = 2 * MERGE * K_WORDS
    HALF: tl.constexpr = HEAD_DIM // 2
    lane = tl.arange(0, 2 * MERGE * K_PADDED)
    channel = tile_code(lane, K_WORDS, MERGE)
    tiles_q, sums, constant, peak = query_tiles(
        query + (pid * rows + column_row)[:, None] * HEAD_DIM, column_live, key_grid, head, cos is None,
        HEAD_DIM, KEY_BITS, K_WORDS, K_PADDED, MERGE, KEY_GROUPS if cos is None else 1, KEY_LUT, COLUMNS, ROWS, EVEN,
        scaling,
    )  # fmt: skip
    unit = peak * (scaling * LOG2E)
    if cos is None:
        unit = unit * power(unit_exponent(KEY_FLOAT) - EXPONENT)
    offset = 0.0
    if key_levels is not None:
        offset = tl.load(key_levels + 1)
        if cos is None:
            unit = unit * tl.load(key_levels)
    if scratch is not None:
        program = (pid * splits + split) * tl.num_programs(2) + tl.program_id(2)
        query_scratch = scratch + program * ((HEAD_DIM + TILE) * ROWS)
        weight_scratch = query_scratch + HEAD_DIM * ROWS
    if KEY_OUTLIERS > 0:
        keep_query(query + pid * rows * HEAD_DIM, query_scratch, row, rows, scaling, HEAD_DIM, ROWS)

    # ---- the values' side of it ----
    V_PLANES: tl.constexpr = planes(VALUE_BITS)
    V_WORDS: tl.constexpr = VALUE_ROW // 3 * 2 if VALUE_BITS == 3 else VALUE_ROW
    V_WIDTH: tl.constexpr = 2 * V_WORDS
    PARTS: tl.constexpr = VALUE_DIM // PART
    PARTS_PER_GROUP: tl.constexpr = PARTS // VALUE_GROUPS
    HAS_ZERO: tl.constexpr = VALUE_SCALE == "token" and (VALUE_ZERO or value_levels is not None)
    place = tl.zeros([TILE], tl.float32)
    for plane in tl.static_range(V_PLANES):
        here = (token % BLOCK) // V_WIDTH == plane
        place = tl.where(here, power(EXPONENT - plane_position(VALUE_BITS, VALUE_LUT, plane)), place)
    part_channel = tl.arange(0, PART)
    word = tl.arange(0, SPAN * V_WORDS)
    word_offset = (word // V_WORDS) * (VALUE_DIM * VALUE_ROW) + word % V_WORDS
    high_word = tl.arange(0, SPAN * V_WORDS // 2)
    high_offset = (high_word // (V_WORDS // 2)) * (VALUE_DIM * VALUE_ROW) + V_WORDS + high_word % (V_WORDS // 2)
    value_offset = 0.0
    if value_levels is not None:
        value_offset = tl.load(value_levels + 1)

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    if DEFER:
        total = tl.zeros([TILE, ROWS], tl.float32)
    else:
        total = tl.zeros([ROWS], tl.float32)
    zeros = ()
    if HAS_ZERO:
        for group in tl.static_range(VALUE_GROUPS):
            zeros = zeros + (tl.zeros_like(total),)
    mixed = ()
    corrections = ()
    for part in tl.static_range(PARTS):
        mixed = mixed + (tl.zeros([PART, COLUMNS], tl.float32),)
        if VALUE_OUTLIERS > 0:
            corrections = corrections + (tl.zeros([PART, ROWS], tl.float32),)

    IN_PAIRS: tl.constexpr = ASM and cos is not None and KEY_SCALE == "static" and not KEY_FLOAT
    if IN_PAIRS:
        ENTRIES: tl.constexpr = 127 if KEY_LUT else (1 << KEY_BITS) - 1
        steps, shifts, norm = grid_pairs(
            key_grid + head * (2 * HEAD_DIM), HEAD_DIM, KEY_BITS, KEY_LUT, ENTRIES, K_WORDS, K_PADDED, MERGE, TILE
        )
        unit = unit / norm

    key_words = tl.arange(0, K_PADDED)
    key_high = tl.arange(0, K_PADDED // 2)
    key_base = key_codes + pid * key_capacity * (BLOCK * KEY_ROW) + token[:, None] * KEY_ROW
    value_base = value_codes + pid * value_capacity * (VALUE_DIM * VALUE_ROW)
    key_scale_base = key_scales
    value_scale_base = value_scales
    if KEY_SCALE == "token":
        key_scale_base = key_scales + pid * key_capacity * (BLOCK * KEY_GROUPS)
    if KEY_SCALE == "channel":
        key_scale_base = key_scales + pid * key_capacity * HEAD_DIM
    if VALUE_SCALE == "token":
        value_scale_base = value_scales + pid * value_capacity * (BLOCK * VALUE_GROUPS)
    if VALUE_SCALE == "channel":
        value_scale_base = value_scales + pid * value_capacity * VALUE_DIM
    largest = 1.0
    if VALUE_SCALE == "token":
        # weights times scales have to fit float16, so scales are in units of the split's largest
        PER_BLOCK: tl.constexpr = BLOCK * VALUE_GROUPS
        largest = largest_scale(value_scale_base, start * PER_BLOCK, stop * PER_BLOCK, VALUE_ZERO)
        place = place * (1.0 / largest)
    if KEY_OUTLIERS > 0:
        key_slots = (pid * key_capacity * BLOCK + token) * KEY_OUTLIERS
    if VALUE_OUTLIERS > 0:
        value_slots = pid * value_capacity * VALUE_DIM + part_channel

    for block in range(start, stop, SPAN):
        live = token < (stop - block) * BLOCK
        if SPAN == 1:
            live = token >= 0

        # ---- scores [TILE, ROWS] ----
        KEY_FULL: tl.constexpr = SPAN == 1 and K_PADDED == K_WORDS
        key_pointer = key_base + block * (BLOCK * KEY_ROW)
        if KEY_FULL:
            words = tl.load(key_pointer + key_words[None, :])
        else:
            words = tl.load(
                key_pointer + key_words[None, :], mask=live[:, None] & (key_words < K_WORDS)[None, :], other=0
            )
        high = words
        if KEY_BITS == 3:
            if KEY_FULL:
                high = tl.load(key_pointer + K_WORDS + key_high[None, :])
            else:
                high = tl.load(
                    key_pointer + K_WORDS + key_high[None, :],
                    mask=live[:, None] & (key_high < K_WORDS // 2)[None, :],
                    other=0,
                )
        codes = unpacked(words, high, key_table, TILE, K_PADDED, KEY_BITS, KEY_LUT, ASM, MERGE, KEY_FLOAT)
        if cos is not None:
            # every channel is decoded and turned by its token's angle; the first half of them pairs with the second
            angles = batch * stride_angles_batch + (block * BLOCK + token)[:, None].to(tl.int64) * HALF
            held = None
            if not KEY_FULL:
                held = live[:, None] & (channel < K_WIDTH)[None, :]
            dots = tl.zeros([TILE, COLUMNS], tl.float32)
            for tile in tl.static_range(K_TILES // 2):
                at = tile * K_WIDTH + channel
                turn_cos = load_held(cos + angles + at[None, :], held)
                turn_sin = load_held(sin + angles + at[None, :], held)
                if IN_PAIRS:
                    low, high = turned_pairs(
                        codes[tile], codes[tile + K_TILES // 2], steps[tile], shifts[tile],
                        steps[tile + K_TILES // 2], shifts[tile + K_TILES // 2],
                        turn_cos.to(tl.float16), turn_sin.to(tl.float16),
                    )  # fmt: skip
                else:
                    low_half = decoded_keys(
                        codes[tile], at, tile, key_scale_base, key_levels, key_grid, head, block, token, held,
                        HEAD_DIM, BLOCK, KEY_BITS, KEY_SCALE, KEY_GROUPS, KEY_ZERO, KEY_LUT, lane, MERGE,
                        KEY_FLOAT,
                    )  # fmt: skip
                    high_half = decoded_keys(
                        codes[tile + K_TILES // 2], at + HALF, tile + K_TILES // 2, key_scale_base, key_levels,
                        key_grid, head, block, token, held,
                        HEAD_DIM, BLOCK, KEY_BITS, KEY_SCALE, KEY_GROUPS, KEY_ZERO, KEY_LUT, lane, MERGE,
                        KEY_FLOAT,
                    )  # fmt: skip
                    turn_cos, turn_sin = turn_cos.to(tl.float32), turn_sin.to(tl.float32)
                    low = (low_half * turn_cos - high_half * turn_sin).to(tl.float16)
                    high = (high_half * turn_cos + low_half * turn_sin).to(tl.float16)
                dots = tl.dot(low, tiles_q[tile].to(tl.float16), dots)
                dots = tl.dot(high, tiles_q[tile + K_TILES // 2].to(tl.float16), dots)
            scores = score_columns(dots, ROWS, EVEN) * unit
        elif KEY_SCALE == "channel":
            # every block of a step has scales of its own: its tokens are the rows that are kept of a product
            scores = tl.zeros([TILE, ROWS], tl.float32)
            for inner in range(SPAN):
                scale_pointer = key_scale_base + (block + inner) * HEAD_DIM
                highest = tl.zeros([2 * MERGE * K_PADDED], tl.float32)
                for tile in tl.static_range(K_TILES):
                    at = tile * K_WIDTH + channel
                    inside = (channel < K_WIDTH) & (at < HEAD_DIM)
                    if SPAN > 1:
                        inside = inside & (channel * 0 + block + inner < stop)
                    scale, zero = scale_and_zero(scale_pointer, at, KEY_ZERO, inside)
                    highest = tl.maximum(highest, scale)
                step = tl.maximum(tl.max(highest, 0), 1e-30)
                dots = tl.zeros([TILE, COLUMNS], tl.float32)
                bias = tl.zeros([COLUMNS], tl.float32)
                for tile in tl.static_range(K_TILES):
                    at = tile * K_WIDTH + channel
                    inside = (channel < K_WIDTH) & (at < HEAD_DIM)
                    if SPAN > 1:
                        inside = inside & (channel * 0 + block + inner < stop)
                    # rows of 3 bits may be padded by more than a tile
                    if overlap(0, tile, 1, K_WIDTH, HEAD_DIM):
                        scale, zero = scale_and_zero(scale_pointer, at, KEY_ZERO, inside)
                        q = tiles_q[tile]
                        if KEY_ZERO or key_levels is not None:
                            lifted = zero + scale * offset
                            lifted = lifted / (tile_power(lane, KEY_BITS, KEY_LUT, tile, MERGE) * power(EXPONENT))
                            bias += tl.sum(q * lifted[:, None], 0)
                        dots = tl.dot(codes[tile], (q * (scale / step)[:, None]).to(tl.float16), dots)
                whole = row_columns(bias, ROWS, EVEN) * (peak * (scaling * LOG2E))
                products = score_columns(dots, ROWS, EVEN) * (unit * step) + whole[None, :]
                scores = tl.where((token // BLOCK == inner)[:, None], products, scores)
        else:
            for group in tl.static_range(KEY_GROUPS):
                dots = tl.zeros([TILE, COLUMNS], tl.float32)
                for tile in tl.static_range(K_TILES):
                    if overlap(group, tile, KEY_GROUPS, K_WIDTH, HEAD_DIM):
                        q = tiles_q[tile_index(group, tile, KEY_GROUPS, K_WIDTH, HEAD_DIM, K_TILES)]
                        dots = tl.dot(codes[tile], q.to(tl.float16), dots)
                products = score_columns(dots, ROWS, EVEN)
                if KEY_SCALE == "token":
                    where = (block * BLOCK + token) * KEY_GROUPS + group
                    scale, zero = scale_and_zero(key_scale_base, where, KEY_ZERO, None if SPAN == 1 else live)
                    products = products * (scale * unit)[:, None]
                    if key_levels is not None:
                        zero = zero + scale * offset
                    if KEY_ZERO or key_levels is not None:
                        products += zero[:, None] * sums[group][None, :]
                else:
                    products = products * unit
                if group == 0:
                    scores = products
                else:
                    scores += products
            if key_grid is not None:
                scores += constant[None, :]
        if KEY_OUTLIERS > 0:
            row_lane = tl.arange(0, ROWS)
            for slot in tl.static_range(KEY_OUTLIERS):
                where = key_slots + block * (BLOCK * KEY_OUTLIERS) + slot
                at = tl.load(key_places + where, mask=live, other=0).to(tl.int32)
                excess = tl.load(key_excess + where, mask=live, other=0.0).to(tl.float32)
                found = tl.load(query_scratch + at[:, None] * ROWS + row_lane[None, :], cache_modifier=".ca")
                if cos is not None:
                    row_angles = batch * stride_angles_batch + (block * BLOCK + token).to(tl.int64) * HALF + at % HALF
                    turn_cos = tl.load(cos + row_angles, mask=live, other=0.0).to(tl.float32)
                    turn_sin = tl.load(sin + row_angles, mask=live, other=0.0).to(tl.float32)
                    turn_sin = tl.where(at < HALF, turn_sin, -turn_sin)
                    partner = (at + HALF) % HEAD_DIM
                    other = tl.load(query_scratch + partner[:, None] * ROWS + row_lane[None, :])
                    found = found * turn_cos[:, None] + other * turn_sin[:, None]
                scores += excess[:, None] * found
        if softcap is not None:
            scores = capped(scores, softcap)
        if BOUNDED:
            shown = live & (block * BLOCK + token >= first)
            scores = tl.where(shown[:, None], scores, float("-inf"))
        if visible is not None:
            seen_by = batch * stride_visible_batch + (row % queries)[None, :].to(tl.int64) * stride_visible_query
            seen = tl.load(
                visible + seen_by + (block * BLOCK + token)[:, None],
                mask=live[:, None] & (row < rows)[None, :],
                other=0,
            )
            scores = tl.where(seen != 0, scores, float("-inf"))

        # ---- softmax ----
        higher = tl.maximum(maximum, tl.max(scores, 0))
        against = higher
        if BOUNDED or visible is not None:
            against = tl.where(higher == float("-inf"), 0.0, higher)
        decay = tl.exp2(maximum - against)
        weights = tl.exp2(scores - against[None, :])
        maximum = higher
        summed = tl.sum(weights, 0)
        if DEFER:
            total = total * decay[None, :] + weights
        else:
            total = total * decay + summed

        # ---- values ----
        column_decay = to_columns(decay, ROWS, EVEN)
        scales = ()
        new_zeros = ()
        if VALUE_SCALE == "token":
            for group in tl.static_range(VALUE_GROUPS):
                where = (block * BLOCK + token) * VALUE_GROUPS + group
                scale, zero = scale_and_zero(value_scale_base, where, VALUE_ZERO, None if SPAN == 1 else live)
                scales = scales + (scale,)
                if value_levels is not None:
                    zero += scale * value_offset
                if HAS_ZERO:
                    lifted = weights * zero[:, None]
                    if DEFER:
                        new_zeros = new_zeros + (zeros[group] * decay[None, :] + lifted,)
                    else:
                        new_zeros = new_zeros + (zeros[group] * decay + tl.sum(lifted, 0),)
        if HAS_ZERO:
            zeros = new_zeros
        if VALUE_OUTLIERS > 0:
            row_lane = tl.arange(0, ROWS)
            tl.debug_barrier()
            tl.store(weight_scratch + token[:, None] * ROWS + row_lane[None, :], weights)
            tl.debug_barrier()
        new_mixed = ()
        new_corrections = ()
        for part in tl.static_range(PARTS):
            if part % PARTS_PER_GROUP == 0:
                if VALUE_SCALE == "token":
                    scaled = weights * (scales[part // PARTS_PER_GROUP] * place)[:, None]
                else:
                    scaled = weights * place[:, None]
                scaled = scaled.to(tl.float16)
                if EVEN:
                    scaled = tl.reshape(tl.join(scaled, tl.zeros_like(scaled)), [TILE, COLUMNS])
                by_plane = _by_plane(scaled, SPAN, V_PLANES, V_WIDTH, COLUMNS)
            value_pointer = value_base + block * (VALUE_DIM * VALUE_ROW)
            value_pointer += (part * PART + part_channel)[:, None] * VALUE_ROW
            if SPAN == 1:
                words = tl.load(value_pointer + word_offset[None, :])
            else:
                words = tl.load(
                    value_pointer + word_offset[None, :], mask=(word // V_WORDS < stop - block)[None, :], other=0
                )
            high = words
            if VALUE_BITS == 3:
                if SPAN == 1:
                    high = tl.load(value_pointer + high_offset[None, :])
                else:
                    in_range = high_word // (V_WORDS // 2) < stop - block
                    high = tl.load(value_pointer + high_offset[None, :], mask=in_range[None, :], other=0)
            codes = unpacked(words, high, value_table, PART, SPAN * V_WORDS, VALUE_BITS, VALUE_LUT, ASM, 1, VALUE_FLOAT)
            if VALUE_SCALE == "channel":
                # one block at a time: SPAN is 1
                fresh = tl.zeros([PART, COLUMNS], tl.float32)
                for plane in tl.static_range(V_PLANES):
                    fresh = tl.dot(codes[plane], by_plane[plane], fresh)
                scale, zero = scale_and_zero(
                    value_scale_base + block * VALUE_DIM, part * PART + part_channel, VALUE_ZERO, None
                )
                moved = (zero + scale * value_offset) * power(EXPONENT - unit_exponent(VALUE_FLOAT))
                if value_levels is not None:
                    scale = scale * tl.load(value_levels)
                fresh = fresh * scale[:, None] + moved[:, None] * to_columns(summed, ROWS, EVEN)[None, :]
                sum_of_part = mixed[part] * column_decay[None, :] + fresh
            else:
                sum_of_part = mixed[part] * column_decay[None, :]
                for plane in tl.static_range(V_PLANES):
                    sum_of_part = tl.dot(codes[plane], by_plane[plane], sum_of_part)
            new_mixed = new_mixed + (sum_of_part,)
            if VALUE_OUTLIERS > 0:
                correction = corrections[part] * decay[None, :]
                for inner in tl.static_range(SPAN):
                    for slot in tl.static_range(VALUE_OUTLIERS):
                        where = (value_slots + (block + inner) * VALUE_DIM + part * PART) * VALUE_OUTLIERS + slot
                        held = None
                        if SPAN > 1:
                            held = part_channel * 0 + block + inner < stop
                        at = load_held(value_places + where, held).to(tl.int32) + inner * BLOCK
                        excess = load_held(value_excess + where, held).to(tl.float32)
                        found = tl.load(weight_scratch + at[:, None] * ROWS + row_lane[None, :], cache_modifier=".cg")
                        correction += excess[:, None] * found
                new_corrections = new_corrections + (correction,)
        mixed = new_mixed
        if VALUE_OUTLIERS > 0:
            corrections = new_corrections

    # ---- what the split comes to ----
    if DEFER:
        total = tl.sum(total, 0)
    divisor = tl.where(total > 0, total, 1.0)
    out_row = (pid * slots + split) * rows + row
    row_live = row < rows
    for part in tl.static_range(PARTS):
        at = part * PART + part_channel
        out = score_columns(mixed[part], ROWS, EVEN) * power(unit_exponent(VALUE_FLOAT) - EXPONENT)
        if VALUE_SCALE == "token":
            out = out * largest
            if value_levels is not None:
                out = out * tl.load(value_levels)
            if HAS_ZERO:
                zero = zeros[part // PARTS_PER_GROUP]
                if DEFER:
                    zero = tl.sum(zero, 0)
                out += zero[None, :]
        if value_grid is not None:
            grid = value_grid + head * (2 * VALUE_DIM) + at
            out = out * tl.load(grid)[:, None] + tl.load(grid + VALUE_DIM)[:, None] * total[None, :]
        if VALUE_OUTLIERS > 0:
            out += corrections[part]
        tl.store(
            mix + out_row[None, :] * VALUE_DIM + at[:, None], out / divisor[None, :],
            mask=tl.broadcast_to(row_live[None, :], out.shape),
        )  # fmt: skip
    tl.store(lse + out_row, maximum + tl.log2(divisor), mask=row_live)
