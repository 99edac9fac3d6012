"""What packed bytes look like: plain data that the encoders, the store, the byte counts and every kernel read.

All schemes share one decode rule, per token and channel (design: `docs/architecture.md`)::

    x = scale * level(code) + zero  (+ outlier)      optionally in a rotated basis, optionally before RoPE

where `level(code)` is the code itself (`codes="affine"`), an entry of a codebook (`codes="codebook"`) or an 8-bit
float (`codes="float8"`).
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Side = Literal["key", "value"]
Bits = Literal[2, 3, 4, 8]
Width = Literal[0, 2, 3, 4, 8, 16]
"""Bits of a token whose width is its own: 0 is a token not kept, 16 one kept in a 16-bit float."""

DEFAULT_BLOCK = 128

MOST_TRIMMED = 64
"""Numbers at either end of a range that may be left to outlier slots."""


class Format(BaseModel):
    """How the keys or the values of one layer are packed.

    A packed *row* is one token of a key block (its `head_dim` channels) or one channel of a value block (its `block`
    tokens): keys are stored token-major, values channel-major, so that both feed matrix units without a transpose.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    codes: Literal["affine", "codebook", "float8", "exact", "custom"] = Field(
        default="affine",
        description="affine: level = code. codebook: level = table[code]. float8: level = the e4m3 number that the "
        "code is, times 2**-8, so that levels end at 1.75. exact: the model's own dtype. custom: the strategy's own "
        "encode and decode.",
    )
    bits: Bits = Field(default=4, description="Bits per code.")
    scale: Literal["token", "channel", "static"] = Field(
        default="token",
        description="token: one scale per token and group of channels. channel: one per channel and block of tokens. "
        "static: one per channel for all tokens, from the strategy's tables.",
    )
    group: int | None = Field(default=None, ge=1, description="Channels that share a token's scale; None means all.")
    symmetric: bool = Field(
        default=False, description="Scale only: the grid is centred on zero and stores no zero point."
    )
    grid: Literal["ends", "midpoint", "mean"] = Field(
        default="ends",
        description="Where 2**bits affine levels lie in an online range: from end to end; in the middle of equal "
        "cells, so that fewer bits are a shift of more; or as many equal steps around the mean.",
    )
    unit: Literal["range", "rms", "norm"] = Field(
        default="range",
        description="What the levels of an online codebook are multiples of: half the range of the numbers that share "
        "a scale; their root mean square; or that, corrected so that what is decoded has the norm of what was encoded.",
    )
    outliers: int = Field(
        default=0, ge=0, le=2 * MOST_TRIMMED, description="Exact corrections (index, value) per packed row."
    )
    trim: int = Field(
        default=0,
        ge=0,
        le=MOST_TRIMMED,
        description="Largest and smallest numbers, each, that an online range may leave to outlier slots.",
    )
    rotation: Literal["none", "hadamard"] = Field(default="none", description="Orthogonal basis change along head_dim.")
    rotation_size: int | None = Field(
        default=None, ge=2, description="Channels rotated together, a power of two; None: as many as head_dim allows."
    )
    rope: Literal["post", "pre"] = Field(default="post", description="Keys only: store them after or before RoPE.")

    @model_validator(mode="after")
    def _group_needs_token_scale(self) -> "Format":
        if self.group is not None and self.scale != "token":
            raise ValueError(f"group={self.group} needs scale='token', got scale={self.scale!r}; leave group unset")
        return self

    @model_validator(mode="after")
    def _cells_are_of_an_affine_online_grid(self) -> "Format":
        if self.grid != "ends" and (self.codes != "affine" or self.scale == "static" or self.symmetric):
            raise ValueError(
                f"grid={self.grid!r} places affine levels in an online range; it needs codes='affine', scale='token' "
                f"or 'channel' and symmetric=False"
            )
        if self.grid != "ends" and self.outliers != 2 * self.trim:
            raise ValueError(
                f"grid={self.grid!r} gives a slot to every number its range leaves out, and to no other; it needs "
                f"outliers = 2 * trim, got {self.outliers} and {self.trim}"
            )
        if self.grid != "ends" and self.trim and (self.scale != "token" or self.group is not None):
            raise ValueError(f"grid={self.grid!r} with outliers needs one scale per token: scale='token', no group")
        return self

    @model_validator(mode="after")
    def _trim_needs_a_range_to_cut_and_slots_to_keep(self) -> "Format":
        if self.trim and (self.scale == "static" or not self.outliers):
            raise ValueError(
                f"trim={self.trim} takes numbers out of an online range and gives them to outlier slots; it "
                f"needs scale='token' or 'channel' and outliers >= 1, got {self.scale!r} and {self.outliers}"
            )
        return self

    @model_validator(mode="after")
    def _floats_have_eight_bits_and_no_zero(self) -> "Format":
        if self.codes == "float8" and (self.bits != 8 or not self.symmetric or self.outliers):
            raise ValueError(
                "codes='float8' are bytes around zero; it needs bits=8, symmetric=True and no outliers, got "
                f"bits={self.bits}, symmetric={self.symmetric}, outliers={self.outliers}"
            )
        return self

    @model_validator(mode="after")
    def _units_are_of_a_symmetric_codebook_per_token(self) -> "Format":
        fits = self.codes == "codebook" and self.symmetric and self.scale == "token" and not self.outliers
        if self.unit != "range" and not fits:
            raise ValueError(
                f"unit={self.unit!r} scales a codebook around zero; it needs codes='codebook', symmetric=True, "
                "scale='token' and no outliers"
            )
        return self

    @model_validator(mode="after")
    def _size_is_of_a_rotation(self) -> "Format":
        size = self.rotation_size
        if size is not None and (self.rotation == "none" or size & (size - 1)):
            raise ValueError(
                f"rotation_size={size} is how many channels rotation='hadamard' mixes; it needs that rotation, and "
                "has to be a power of two"
            )
        return self

    @property
    def packed(self) -> bool:
        """Whether the shared encoder and kernels understand the bytes."""
        return self.codes in ("affine", "codebook", "float8")

    def basis(self, head_dim: int) -> int:
        """Channels that the rotation mixes, 1 if there is none: the largest power of two in head_dim, if no other."""
        if self.rotation == "none":
            return 1
        return self.rotation_size or head_dim & -head_dim

    def groups(self, head_dim: int) -> int:
        """Scales per token. Raises ValueError when the group does not divide `head_dim`."""
        group = self.group or head_dim
        if head_dim % group:
            fitting = [d for d in range(8, head_dim + 1) if head_dim % d == 0] or [head_dim]
            raise ValueError(f"a group of {group} channels does not divide head_dim={head_dim}; use one of {fitting}")
        return head_dim // group

    def block_bytes(self, side: Side, head_dim: int, block: int, itemsize: int) -> dict[str, int]:
        """Bytes of one block of `block` tokens of one head, by kind; `itemsize` is the model dtype's bytes.

        Raises ValueError for `custom` formats, whose bytes only their strategy knows.
        """
        if self.codes == "exact":
            return {"exact": block * head_dim * itemsize}
        if self.codes == "custom":
            raise ValueError("a custom format has no byte formula; count what is held")
        rows, length = (block, head_dim) if side == "key" else (head_dim, block)
        sizes = {"codes": rows * row_words(length, self.bits) * 4}
        numbers = 1 if self.symmetric else 2
        if self.scale == "token":
            sizes["scales"] = block * self.groups(head_dim) * numbers * 2
        elif self.scale == "channel":
            sizes["scales"] = head_dim * numbers * 2
        if self.outliers:
            sizes["outliers"] = rows * self.outliers * 4
        return sizes

    def bytes_per_token(self, side: Side, head_dim: int, block: int, itemsize: int) -> float:
        """Bytes per token and head, block-wise metadata spread over the block."""
        return sum(self.block_bytes(side, head_dim, block, itemsize).values()) / block


class LayerFormat(BaseModel):
    """The formats of one layer: keys and values are independent, but leave the exact tail together, block by block."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: Format
    value: Format
    block: Literal[32, 64, 128, 256] = Field(default=DEFAULT_BLOCK, description="Tokens packed at a time.")

    @model_validator(mode="after")
    def _rope_stage_is_a_key_option(self) -> "LayerFormat":
        if self.value.rope == "pre":
            raise ValueError("rope='pre' is for keys; values carry no rotary position")
        return self

    @model_validator(mode="after")
    def _slots_of_value_blocks_go_by_channel(self) -> "LayerFormat":
        if self.value.grid != "ends" and self.value.outliers:
            raise ValueError(
                f"value blocks have their outlier slots by channel, grid={self.value.grid!r} gives them out by token; "
                "use a MixedFormat, or values without outliers"
            )
        return self

    def require_fitting(self, head_dim: int, value_dim: int) -> None:
        """Raise ValueError, saying what would fit, if heads of these sizes cannot be packed so."""
        sides = (("key", self.key, head_dim, head_dim), ("value", self.value, value_dim, self.block))
        for name, fmt, dim, row in sides:
            if not fmt.packed:
                continue
            vector = self.block if fmt.scale == "channel" else dim
            if fmt.scale == "token":
                vector = dim // fmt.groups(dim)
            if 2 * fmt.trim >= vector:
                raise ValueError(f"{name}: trim={fmt.trim} leaves nothing of the {vector} numbers that share a scale")
            if fmt.outliers > row:
                raise ValueError(f"{name}: {fmt.outliers} outlier slots do not fit a row of {row}; use fewer")
            if fmt.rotation == "hadamard" and dim % 2:
                raise ValueError(f"{name}: rotation='hadamard' needs an even head_dim, got {dim}; use rotation='none'")
            if dim % fmt.basis(dim):
                raise ValueError(
                    f"{name}: rotation_size={fmt.rotation_size} does not divide head_dim={dim}; use up to {dim & -dim}"
                )

    def bytes_per_token(self, head_dim: int, value_dim: int, itemsize: int) -> float:
        """Bytes per token and kv head of keys and values together."""
        key = self.key.bytes_per_token("key", head_dim, self.block, itemsize)
        return key + self.value.bytes_per_token("value", value_dim, self.block, itemsize)


class MixedFormat(BaseModel):
    """The formats of one layer in which every token has a width of its own, which may change.

    A packed row is one token's key or value: of one kv head, or of all heads of the layer in one vector, which then
    share scale and outliers. Rows of 16 bits are floats; all others have affine codes with one scale per row.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: tuple[Format, ...] = Field(min_length=1, description="One format per width that keys may have, ascending.")
    value: tuple[Format, ...] = Field(min_length=1, description="The same for values.")
    heads: Literal["apart", "together"] = Field(
        default="apart", description="A row per kv head, or one row for all heads of a token."
    )
    drops: bool = Field(default=False, description="Whether tokens may get width 0, and are then not kept.")

    @model_validator(mode="after")
    def _rows_stand_for_themselves(self) -> "MixedFormat":
        for fmt in (*self.key, *self.value):
            whole = fmt.codes == "affine" and fmt.scale == "token" and fmt.group is None and fmt.rotation == "none"
            if fmt.rope == "pre" or fmt.symmetric or not (whole or fmt.codes == "exact"):
                raise ValueError(
                    "rows of mixed widths are exact, or affine with one scale and zero per token, unrotated and after "
                    f"RoPE; got {fmt!r}"
                )
        for name, formats in (("key", self.key), ("value", self.value)):
            widths = [row_bits(fmt) for fmt in formats]
            if widths != sorted(set(widths)):
                raise ValueError(f"{name}: widths must ascend, got {widths}")
        return self

    def require_fitting(self, head_dim: int, value_dim: int, kv_heads: int) -> None:
        """Raise ValueError, saying what would fit, if heads of these sizes cannot be packed so."""
        heads = 1 if self.heads == "apart" else kv_heads
        for name, formats, dim in (("key", self.key, head_dim), ("value", self.value, value_dim)):
            for fmt in formats:
                if fmt.outliers > dim * heads or 2 * fmt.trim >= dim * heads:
                    raise ValueError(
                        f"{name}: {fmt.outliers} outlier slots and a trim of {fmt.trim} do not fit a row of "
                        f"{dim * heads} numbers; use fewer"
                    )
                if fmt.outliers and dim * heads > 2**15:
                    raise ValueError(
                        f"{name}: 16 bits do not say where in a row of {dim * heads} numbers an outlier is; use "
                        "heads='apart', or no outliers"
                    )


def row_bits(fmt: Format) -> int:
    """The width that a row format serves."""
    return 16 if fmt.codes == "exact" else fmt.bits


def row_words(length: int, bits: int) -> int:
    """int32 words that hold `length` codes of `bits` bits; a row is padded to whole words."""
    unit = 32 if bits == 3 else 32 // bits
    return -(-length // unit) * unit * bits // 32
