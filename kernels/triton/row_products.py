"""Products of pooled rows with queries and weights.

A plane of a row is a run of consecutive codes (`kernels/packing.py`). Kernels read rows in *segments*, the part of one
plane that lies in some consecutive words and in one head; 16-bit rows are one plane of floats. A segment is one operand
of a matrix product in float16, the other are queries or weights, which are divided by their largest first: nothing
over- or underflows, whatever the size of numbers, scales and weights. Bfloat16 rows, and what they are multiplied with,
are exact in tf32.

Results do not depend on the order of programs: they write float32 sums of their own, and what they add to in place are
integers.
"""

import triton
import triton.language as tl

from .words import halves, number_pair, plane, position, power

# query planes carry 2**(GAIN - position): small numbers stay normal, large ones finite
GAIN = tl.constexpr(8)


@triton.jit(do_not_specialize=["s_owner", "s_head", "s_line", "lines"])
def round_queries(
    query, s_owner, s_head, s_line, rounded, numbers, lines,
    DIM: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Queries over their largest number, in float16, in columns; that number; and the sum of the rounded query.

    Columns of zeros make up for lines that are missing.
    """
    line = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    owner = tl.program_id(2).to(tl.int64)
    row = (owner * tl.num_programs(1) + head) * tl.num_programs(0) + line
    channel = tl.arange(0, WIDTH)
    start = query + owner * s_owner + head * s_head + line * s_line
    q = tl.load(start + channel, mask=channel < tl.where(line < lines, DIM, 0), other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(q), 0)
    largest = tl.where(largest == 0, 1.0, largest)
    half = (q / largest).to(tl.float16)
    at = rounded + (row // COLUMNS * DIM + channel) * COLUMNS + row % COLUMNS
    tl.store(at, half, mask=channel < DIM)
    tl.store(numbers + row, largest)
    all_rows = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * tl.num_programs(0)
    tl.store(numbers + all_rows + row, tl.sum(half.to(tl.float32), 0) * largest)


@triton.jit(do_not_specialize=["lines", "n_tokens"])
def score_rows(
    rounded, numbers, codes, scales, index, value, tokens, starts, out, lines, n_tokens,
    HEADS: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, PLANES: tl.constexpr,
    RUN: tl.constexpr, LENGTH: tl.constexpr, PADDED: tl.constexpr, SLOTS: tl.constexpr, TILE: tl.constexpr,
    COLUMNS: tl.constexpr, ASM: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Scores of `TILE` rows and `COLUMNS` lines, of every `GROUPS`-th head."""
    group = tl.program_id(1) % GROUPS
    tiles = tl.num_programs(1) // GROUPS
    tile_of_lines = tl.program_id(1) // GROUPS
    column = tl.arange(0, COLUMNS)
    line = tile_of_lines * COLUMNS + column
    owner = tl.program_id(2).to(tl.int64)
    row = tl.load(starts + owner) + tl.program_id(0) * TILE + tl.arange(0, TILE)
    token = tl.load(tokens + row, mask=row < tl.load(starts + owner + 1), other=-1)
    held = token >= 0
    row = row.to(tl.int64)
    if BITS < 16:
        scale, zero = number_pair(tl.load(scales + row, mask=held, other=0))
    channel = tl.arange(0, PADDED)
    # segments of a plane, and of a head
    CHUNKS: tl.constexpr = RUN // LENGTH
    PARTS: tl.constexpr = PLANES * CHUNKS if HEADS == 1 else DIM // LENGTH
    if CHUNKS == GROUPS:
        low, high = _words(codes, row, held, group, BITS, WORDS, LENGTH, PADDED)
    if SLOTS:
        beside = _outlier_scores(
            rounded, owner, tile_of_lines, tiles, group, index, value, row, held,
            SLOTS, HEADS, DIM, GROUPS, TILE, COLUMNS,
        )  # fmt: skip
    for i in tl.static_range(HEADS // GROUPS):
        head = i * GROUPS + group
        at = (owner * HEADS + head) * tiles + tile_of_lines
        products = tl.zeros([TILE, COLUMNS], tl.float32)
        for s in tl.static_range(i * GROUPS * PARTS, i * GROUPS * PARTS + PARTS):
            chunk = s % CHUNKS + group * PARTS
            if CHUNKS != GROUPS:
                low, high = _words(codes, row, held, chunk, BITS, WORDS, LENGTH, PADDED)
            place = s // CHUNKS * RUN + chunk * LENGTH - head * DIM + channel
            real = (channel < LENGTH) & (place < DIM)
            q = tl.load(rounded + (at * DIM + place[:, None]) * COLUMNS + column[None, :], mask=real[:, None], other=0)
            rows = _operand(low, high, BITS, s // CHUNKS, TILE, PADDED, ASM)
            products = _dot(rows, q * _gain(BITS, s // CHUNKS), products)
        largest = tl.load(numbers + at * COLUMNS + column)
        if BITS == 16:
            result = products * largest[None, :]
        else:
            result = products * (scale * power(24 - GAIN))[:, None]
            if SLOTS:
                result += beside[i]
            all_lines = tl.num_programs(2).to(tl.int64) * HEADS * tiles * COLUMNS
            total = tl.load(numbers + all_lines + at * COLUMNS + column)
            result = result * largest[None, :] + zero[:, None] * total[None, :]
        tl.store(
            out + ((owner * HEADS + head) * lines + line)[None, :] * n_tokens + token[:, None],
            result,
            mask=held[:, None] & (line < lines)[None, :],
        )


@triton.jit(do_not_specialize=["s_owner", "s_head", "s_line", "lines", "copies", "gain"])
def mix_rows(
    weights, s_owner, s_head, s_line, codes, scales, index, value, tokens, starts, sums, fixed, inverse, gain,
    copies, lines,
    HEADS: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, PLANES: tl.constexpr,
    RUN: tl.constexpr, LENGTH: tl.constexpr, PADDED: tl.constexpr, SLOTS: tl.constexpr, TILE: tl.constexpr,
    COLUMNS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Partial sums of every so many-th tile of rows: one chunk of each plane, `COLUMNS` lines.

    Outliers are added up in `fixed`, as integers, whose sum does not depend on their order.
    """
    CHUNKS: tl.constexpr = RUN // LENGTH
    chunk = tl.program_id(0) % CHUNKS
    tile_of_lines = tl.program_id(0) // CHUNKS
    column = tl.arange(0, COLUMNS)
    line = tile_of_lines * COLUMNS + column
    asked = (line < lines)[None, :]
    owner = tl.program_id(2).to(tl.int64)
    at_line = weights + owner * s_owner + line.to(tl.int64) * s_line
    first = tl.load(starts + owner) + tl.program_id(1) * TILE
    last = tl.load(starts + owner + 1)
    products = ()
    shifts = ()
    for j in tl.static_range(PLANES):
        products = products + (tl.zeros([PADDED, COLUMNS], tl.float32),)
        shifts = shifts + (tl.zeros([COLUMNS], tl.float32),)
    for start in range(first, last, tl.num_programs(1) * TILE):
        row = start + tl.arange(0, TILE)
        token = tl.load(tokens + row, mask=row < last, other=-1)
        held = token >= 0
        row = row.to(tl.int64)
        low, high = _words(codes, row, held, chunk, BITS, WORDS, LENGTH, PADDED)
        if BITS < 16:
            scale, zero = number_pair(tl.load(scales + row, mask=held, other=0))
        more_products = ()
        more_shifts = ()
        for j in tl.static_range(PLANES):
            if j == 0 or HEADS > 1:
                head = tl.minimum((j * RUN + chunk * LENGTH) // DIM, HEADS - 1).to(tl.int64)
                w = tl.load(
                    at_line[None, :] + head * s_head + token[:, None], mask=held[:, None] & asked, other=0.0
                ).to(tl.float32)
                if BITS == 16:
                    shift = tl.zeros([COLUMNS], tl.float32)
                else:
                    shift = tl.sum(w * zero[:, None], 0)
                    w *= scale[:, None]
                largest = tl.max(tl.abs(w), 0)
                largest = tl.where(largest == 0, 1.0, largest)
                w = (w / largest[None, :]).to(tl.float16)
            columns_of_rows = tl.trans(_operand(low, high, BITS, j, TILE, PADDED, ASM))
            product = _dot(columns_of_rows, w, tl.zeros([PADDED, COLUMNS], tl.float32))
            more_products = more_products + (products[j] + product * (largest * _unit(BITS, j))[None, :],)
            more_shifts = more_shifts + (shifts[j] + shift,)
        products = more_products
        shifts = more_shifts
        if SLOTS:
            copy = tl.program_id(1) % copies * tl.num_programs(2) + owner
            _add_outliers(
                fixed, copy, tile_of_lines, tl.num_programs(0) // CHUNKS, inverse, gain, at_line, s_head,
                index, value, row, token, held, owner, line, lines, chunk, CHUNKS, SLOTS, HEADS, DIM, COLUMNS,
            )  # fmt: skip
    channel = tl.arange(0, PADDED)
    split = tl.program_id(1).to(tl.int64) * tl.num_programs(2) + owner
    for j in tl.static_range(PLANES):
        start_of_segment = j * RUN + chunk * LENGTH
        head = tl.minimum(start_of_segment // DIM, HEADS - 1)
        place = start_of_segment - head * DIM + channel
        real = (channel < LENGTH) & (place < DIM)
        tl.store(
            sums + ((split * HEADS + head) * lines + line)[None, :] * DIM + place[:, None],
            products[j] + shifts[j][None, :],
            mask=real[:, None] & asked,
        )


@triton.jit
def _words(
    codes, row, held, chunk,
    BITS: tl.constexpr, WORDS: tl.constexpr, LENGTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """What rows `[N]` hold of a chunk: words, for 3 bits those of 2 and those of 1 bit, or for 16 floats, twice."""
    if BITS == 16:
        number = tl.arange(0, PADDED)
        low = tl.load(
            codes + row[:, None] * WORDS + (chunk * LENGTH + number)[None, :],
            mask=held[:, None] & (number < LENGTH)[None, :],
            other=0.0,
        )
        if low.dtype == tl.bfloat16:
            low = low.to(tl.float32)
        return low, low
    else:
        number = tl.arange(0, PADDED // 2)
        real = held[:, None] & (number < LENGTH // 2)[None, :]
        word = chunk * (LENGTH // 2) + number
        low = tl.load(codes + row[:, None] * WORDS + word[None, :], mask=real, other=0)
        high = low
        if BITS == 3:
            # one word of 1-bit codes for two words of 2-bit codes
            high = tl.load(codes + row[:, None] * WORDS + (WORDS // 3 * 2 + word // 2)[None, :], mask=real, other=0)
            high = high >> (word % 2 * 2)[None, :]
        return low, high


@triton.jit
def _operand(
    low, high, BITS: tl.constexpr, PLANE: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr, ASM: tl.constexpr
):
    """The segment in one plane of what `_words` read, `[ROWS, PADDED]`."""
    if BITS == 16:
        return low
    elif BITS == 3:
        # bytes of four codes, two of them of this plane
        shift: tl.constexpr = PLANE % 2 * 4
        k: tl.constexpr = PLANE // 4
        four = ((low >> (shift + 2 * k)) & 0x03030303) | (((high >> (shift + k)) & 0x01010101) << 2)
        two = four >> (PLANE // 2 % 2 * 16)
        return halves((two & 0xFF) | ((two & 0xFF00) << 8), ROWS, PADDED // 2)
    else:
        return halves(plane(low, BITS, PLANE, ASM), ROWS, PADDED // 2)


@triton.jit
def _outlier_scores(
    rounded, owner, tile_of_lines, tiles, group, index, value, row, held,
    SLOTS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """What outliers of rows `[ROWS]` add to products with rounded queries, `[ROWS, COLUMNS]` for every head."""
    column = tl.arange(0, COLUMNS)
    sums = ()
    for i in tl.static_range(HEADS // GROUPS):
        sums = sums + (tl.zeros([ROWS, COLUMNS], tl.float32),)
    for slot in range(SLOTS):
        place = tl.load(index + row * SLOTS + slot, mask=held, other=0).to(tl.int32)
        number = tl.load(value + row * SLOTS + slot, mask=held, other=0.0).to(tl.float32)
        head = place // DIM
        at = (((owner * HEADS + head) * tiles + tile_of_lines) * DIM + place % DIM) * COLUMNS
        product = tl.load(rounded + at[:, None] + column[None, :]).to(tl.float32) * number[:, None]
        more = ()
        for i in tl.static_range(HEADS // GROUPS):
            more = more + (sums[i] + tl.where((head == i * GROUPS + group)[:, None], product, 0.0),)
        sums = more
    return sums


@triton.jit
def _add_outliers(
    fixed, copy, tile_of_lines, tiles, inverse, gain, at_line, s_head,
    index, value, row, token, held, owner, line, lines, first,
    STEP: tl.constexpr, SLOTS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add weighted outliers of every so many-th slot to the integers `fixed`, in units of a line's largest weight."""
    column = tl.arange(0, COLUMNS)
    seen = held[:, None] & (line < lines)[None, :]
    for slot in range(first, SLOTS, STEP):
        place = tl.load(index + row * SLOTS + slot, mask=held, other=0).to(tl.int32)
        number = tl.load(value + row * SLOTS + slot, mask=held, other=0.0).to(tl.float32) * gain
        head = (place // DIM if HEADS > 1 else place * 0).to(tl.int64)
        w = tl.load(at_line[None, :] + (head * s_head + token)[:, None], mask=seen, other=0.0).to(tl.float32)
        w *= tl.load(inverse + (owner * HEADS + head)[:, None] * lines + line[None, :], mask=seen, other=0.0)
        at = (((copy * HEADS + head) * tiles + tile_of_lines) * DIM + place % DIM) * COLUMNS
        addend = (w * number[:, None]).to(tl.int64)
        tl.atomic_add(fixed + at[:, None] + column[None, :], addend, mask=seen, sem="relaxed")


@triton.jit
def _dot(rows, other, sums):
    """`rows @ other + sums`; float32 rows are bfloat16 ones, which tf32 holds exactly."""
    return tl.dot(rows, other.to(rows.dtype), sums, input_precision="tf32")


@triton.constexpr_function
def _position(bits, plane):
    return 0 if bits == 3 else position(bits, plane)


@triton.constexpr_function
def _gain(bits, plane):
    return 1.0 if bits == 16 else 2.0 ** (GAIN - _position(bits, plane))


@triton.constexpr_function
def _unit(bits, plane):
    return 1.0 if bits == 16 else 2.0 ** (24 - _position(bits, plane))
