"""From packed int32 words to float16 tiles that feed matrix units.

A code of `b` bits at bit `p` of a 16-bit half, `p + b <= 10`, *is* the float16 subnormal `code * 2**(p - 24)`. So one
`and` unpacks two codes, exactly, and what remains is a power of two per plane, which goes into the other operand.
8-bit floats become the float16 numbers that are their levels, by moving bits. Planes and words are those of
`kernels/packing.py`.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def power(exponent):
    """2 to a constant power."""
    return 2.0**exponent


@triton.constexpr_function
def shift(bits, plane):
    """Right shift that brings a plane of a half to where its codes are subnormals."""
    if bits == 2:
        return 0 if plane < 5 else 6
    if bits == 4:
        return 0 if plane < 2 else 8
    return 0 if plane < 1 else 8


@triton.constexpr_function
def position(bits, plane):
    """Lowest bit of a plane's codes after `shift`."""
    return plane * bits - shift(bits, plane)


@triton.constexpr_function
def _mask(bits, plane):
    half = ((1 << bits) - 1) << position(bits, plane)
    return half | half << 16


@triton.constexpr_function
def _and(mask):
    return f"and.b32 $0, $1, {mask};"


@triton.jit
def masked(words, MASK: tl.constexpr, ASM: tl.constexpr):
    """`words & MASK`. In assembly because LLVM would split it into 16-bit halves and join them again."""
    if ASM:
        return tl.inline_asm_elementwise(_and(MASK), "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return words & MASK


@triton.jit
def halves(words, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """int32 `[ROWS, WORDS]` as float16 `[ROWS, 2 * WORDS]`, bit for bit."""
    low = (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.reshape(tl.join(low, high), [ROWS, 2 * WORDS])


@triton.jit
def plane(words, BITS: tl.constexpr, PLANE: tl.constexpr, ASM: tl.constexpr):
    """Words whose halves are codes of one plane as subnormals at `position(BITS, PLANE)`."""
    return masked(words >> shift(BITS, PLANE), _mask(BITS, PLANE), ASM)


@triton.jit
def number_pair(pair):
    """Two float16 in an int32, the low half first, as float32."""
    low = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    high = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.constexpr_function
def _float_asm(plane):
    # every byte with its sign above it, then both where float16 has them; the bit between is the upper one's copy
    chosen = "0xB391" if plane else "0xA280"
    return f"{{ .reg .b32 wide; prmt.b32 wide, $1, 0, {chosen}; shl.b32 wide, wide, 7; and.b32 $0, wide, 0xBF80BF80; }}"


@triton.jit
def float_plane(words, PLANE: tl.constexpr, ASM: tl.constexpr):
    """Words whose halves are the levels of one plane of 8-bit floats: sign and the rest of a code, moved apart."""
    if ASM:
        return tl.inline_asm_elementwise(_float_asm(PLANE), "=&r,r", [words], dtype=tl.int32, is_pure=True, pack=1)
    else:
        codes = words >> (8 * PLANE)
        return ((codes & 0x00800080) << 8) | ((codes & 0x007F007F) << 7)


@triton.constexpr_function
def planes(bits):
    """Planes of a row: runs of consecutive codes that unpack together."""
    return 8 if bits == 3 else 16 // bits


@triton.constexpr_function
def planes_per_tile(words):
    """Planes per tile: two where one of `words` words is half as wide as a matrix unit needs."""
    return 2 if words == 4 else 1


@triton.constexpr_function
def padded_words(words):
    """Words of a tile: a power of two, and wide enough for a matrix unit."""
    return max(4 if words == 4 else 8, 1 << (words - 1).bit_length())


@triton.constexpr_function
def plane_position(bits, lut, index):
    """Where `unpacked` leaves the codes of a plane: `code * 2**(position - 24)` as float16."""
    return 0 if lut or bits == 3 else position(bits, index)


@triton.constexpr_function
def unit_exponent(floats):
    """By how many powers of two a level is more than what `unpacked` makes of it, positions apart."""
    return 0 if floats else 24


@triton.jit
def unpacked(
    words, high, table, ROWS: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr, LUT: tl.constexpr,
    ASM: tl.constexpr, MERGE: tl.constexpr = 1, FLOAT: tl.constexpr = False,
):  # fmt: skip
    """All planes of a row as float16 subnormals `[ROWS, 2 * WORDS]`: codes, or what `table` has for them.

    FLOAT: codes are 8-bit floats, and what comes are their levels.

    words: int32 `[ROWS, WORDS]`; of 3 bits the 2-bit row, with `high` the 1-bit row `[ROWS, WORDS // 2]`.
    table: with LUT, pointer to the bytes below 128 of `2**BITS` entries.
    MERGE: 2 gives tiles `[ROWS, 4 * WORDS]` of two planes each, where one is too narrow for a matrix unit: `tile_code`.
    """
    found = _plane_words(words, high, table, ROWS, WORDS, BITS, LUT, ASM, FLOAT)
    tiles = ()
    for index in tl.static_range(planes(BITS) // MERGE):
        if MERGE == 2:
            # whole words side by side, so that a register still holds neighbours of one plane
            both = tl.reshape(tl.join(found[2 * index], found[2 * index + 1]), [ROWS, 2 * WORDS])
            tiles = tiles + (halves(both, ROWS, 2 * WORDS),)
        else:
            tiles = tiles + (halves(found[index], ROWS, WORDS),)
    return tiles


@triton.jit
def tile_code(column, WORDS: tl.constexpr, MERGE: tl.constexpr):
    """Which code of a tile's planes, put one after the other, lies in a column of `unpacked`."""
    if MERGE == 2:
        return (column // 2) % 2 * (2 * WORDS) + column // 4 * 2 + column % 2
    else:
        return column


@triton.jit
def tile_power(column, BITS: tl.constexpr, LUT: tl.constexpr, TILE: tl.constexpr, MERGE: tl.constexpr):
    """2 to minus the positions of a tile's codes, by column or for all."""
    if MERGE == 2:
        even: tl.constexpr = power(-plane_position(BITS, LUT, 2 * TILE))
        odd: tl.constexpr = power(-plane_position(BITS, LUT, 2 * TILE + 1))
        return tl.where((column // 2) % 2 == 0, even, odd)
    else:
        return power(-plane_position(BITS, LUT, TILE))


@triton.jit
def _plane_words(
    words, high, table, ROWS: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr, LUT: tl.constexpr,
    ASM: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """int32 `[ROWS, WORDS]` by plane, two numbers in each."""
    if FLOAT:
        found = (float_plane(words, 0, ASM), float_plane(words, 1, ASM))
    elif BITS == 3:
        # an odd word's high bits lie two below those of the even word before it
        spread = tl.reshape(tl.join(high << 2, high), [ROWS, WORDS])
        found = _look_up3(words, spread, table, ROWS, WORDS, ASM)
    elif LUT:
        if BITS == 4:
            found = _look_up4(words, table, ROWS, WORDS, ASM)
        else:
            found = _look_up2(words, table, ROWS, WORDS, ASM)
    else:
        found = ()
        for index in tl.static_range(16 // BITS):
            found = found + (plane(words, BITS, index, ASM),)
    return found


@triton.jit
def _entries(table, INDEX: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Four entries of a table in every element. A tile that is broadcast, as a scalar would keep the compiler from
    unpacking in registers."""
    return tl.broadcast_to(tl.load(table + INDEX + tl.zeros([1, 1], tl.int32)), [ROWS, WORDS])


@triton.jit
def _entry(table, code):
    if table is None:
        return code
    return (tl.load(table + (code >> 2)) >> ((code & 3) * 8)) & 0xFF


@triton.jit
def _look_up4(words, table, ROWS: tl.constexpr, WORDS: tl.constexpr, ASM: tl.constexpr):
    """Four planes of entries, in the order by nibble: permuting bytes looks four codes up in eight entries at a time,
    and gives 0 for codes whose highest bit is set, because entries are below 128."""
    if ASM:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 flipped, upper, flipped_upper, first, second, low, high;
            xor.b32 flipped, $4, 0x88888888;
            shr.u32 upper, $4, 16;
            shr.u32 flipped_upper, flipped, 16;
            prmt.b32 first, $5, $6, $4;
            prmt.b32 second, $7, $8, flipped;
            or.b32 low, first, second;
            prmt.b32 first, $5, $6, upper;
            prmt.b32 second, $7, $8, flipped_upper;
            or.b32 high, first, second;
            and.b32 $0, low, 0x00FF00FF;
            prmt.b32 $1, low, 0, 0x4341;
            and.b32 $2, high, 0x00FF00FF;
            prmt.b32 $3, high, 0, 0x4341;
            }
            """,
            "=&r,=&r,=&r,=&r,r,r,r,r,r",
            [
                words,
                _entries(table, 0, ROWS, WORDS),
                _entries(table, 1, ROWS, WORDS),
                _entries(table, 2, ROWS, WORDS),
                _entries(table, 3, ROWS, WORDS),
            ],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        return (
            _pair4(words, table, 0),
            _pair4(words, table, 4),
            _pair4(words, table, 16),
            _pair4(words, table, 20),
        )


@triton.jit
def _pair4(words, table, BIT: tl.constexpr):
    low, high = (words >> BIT) & 15, (words >> (BIT + 8)) & 15
    return _entry(table, low) | _entry(table, high) << 16


@triton.jit
def _look_up2(words, table, ROWS: tl.constexpr, WORDS: tl.constexpr, ASM: tl.constexpr):
    """Eight planes of entries. The bytes of both halves come side by side first, so that a permutation's four codes
    are those of two planes."""
    if ASM:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 sorted, even, odd, upper, found;
            prmt.b32 sorted, $8, 0, 0x3120;
            and.b32 even, sorted, 0x33333333;
            shr.u32 odd, sorted, 2;
            and.b32 odd, odd, 0x33333333;
            prmt.b32 found, $9, 0, even;
            and.b32 $0, found, 0x00FF00FF;
            prmt.b32 $2, found, 0, 0x4341;
            shr.u32 upper, even, 16;
            prmt.b32 found, $9, 0, upper;
            and.b32 $4, found, 0x00FF00FF;
            prmt.b32 $6, found, 0, 0x4341;
            prmt.b32 found, $9, 0, odd;
            and.b32 $1, found, 0x00FF00FF;
            prmt.b32 $3, found, 0, 0x4341;
            shr.u32 upper, odd, 16;
            prmt.b32 found, $9, 0, upper;
            and.b32 $5, found, 0x00FF00FF;
            prmt.b32 $7, found, 0, 0x4341;
            }
            """,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r",
            [words, _entries(table, 0, ROWS, WORDS)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        return (
            _pair2(words, table, 0),
            _pair2(words, table, 2),
            _pair2(words, table, 4),
            _pair2(words, table, 6),
            _pair2(words, table, 8),
            _pair2(words, table, 10),
            _pair2(words, table, 12),
            _pair2(words, table, 14),
        )


@triton.jit
def _pair2(words, table, BIT: tl.constexpr):
    low, high = (words >> BIT) & 3, (words >> (BIT + 16)) & 3
    return _entry(table, low) | _entry(table, high) << 16


@triton.jit
def _look_up3(words, high, table, ROWS: tl.constexpr, WORDS: tl.constexpr, ASM: tl.constexpr):
    """Eight planes of entries, without a table of codes; a code's highest bit is in `high`, at bit 2 of its nibble, or
    at bit 3 for the upper four planes."""
    if ASM:
        if table is None:
            low_entries = tl.full([ROWS, WORDS], 0x03020100, tl.int32)
            high_entries = tl.full([ROWS, WORDS], 0x07060504, tl.int32)
        else:
            low_entries = _entries(table, 0, ROWS, WORDS)
            high_entries = _entries(table, 1, ROWS, WORDS)
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 code, top, upper, found;
            and.b32 code, $8, 0x33333333;
            and.b32 top, $9, 0x44444444;
            or.b32 code, code, top;
            shr.u32 upper, code, 16;
            prmt.b32 found, $10, $11, code;
            and.b32 $0, found, 0x00FF00FF;
            prmt.b32 $1, found, 0, 0x4341;
            prmt.b32 found, $10, $11, upper;
            and.b32 $2, found, 0x00FF00FF;
            prmt.b32 $3, found, 0, 0x4341;
            shr.u32 code, $8, 2;
            and.b32 code, code, 0x33333333;
            shr.u32 top, $9, 1;
            and.b32 top, top, 0x44444444;
            or.b32 code, code, top;
            shr.u32 upper, code, 16;
            prmt.b32 found, $10, $11, code;
            and.b32 $4, found, 0x00FF00FF;
            prmt.b32 $5, found, 0, 0x4341;
            prmt.b32 found, $10, $11, upper;
            and.b32 $6, found, 0x00FF00FF;
            prmt.b32 $7, found, 0, 0x4341;
            }
            """,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r",
            [words, high, low_entries, high_entries],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        return (
            _pair3(words, high, table, 0, 0),
            _pair3(words, high, table, 0, 4),
            _pair3(words, high, table, 0, 16),
            _pair3(words, high, table, 0, 20),
            _pair3(words, high, table, 1, 0),
            _pair3(words, high, table, 1, 4),
            _pair3(words, high, table, 1, 16),
            _pair3(words, high, table, 1, 20),
        )


@triton.jit
def _pair3(words, high, table, K: tl.constexpr, BIT: tl.constexpr):
    first = (words >> (BIT + 2 * K)) & 3 | ((high >> (BIT + 2 + K)) & 1) << 2
    second = (words >> (BIT + 8 + 2 * K)) & 3 | ((high >> (BIT + 10 + K)) & 1) << 2
    return _entry(table, first) | _entry(table, second) << 16
