"""Pools of packed rows: tokens of one side of one layer, each in the pool of its width.

An *owner* is what tokens are told apart by: a batch row, or a head of one. A pool lays the rows of its width out owner
by owner, oldest first, in blocks of `ROWS` that belong to one owner each. So `widths` alone says where every token
lies, and a pool holds at most `ROWS - 1` empty rows per owner, however often tokens move. They move all at once, in
`rebuilt`; in between nothing is written.
"""

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from ..kernels import backend
from ..kernels.format import Format, row_bits
from ..kernels.rows import (
    Run,
    decode_rows,
    encode_rows,
    recode_rows,
    row_ends,
    row_mix,
    row_scores,
    run_mix,
    run_scores,
    runs_served,
)

ROWS = 32

# numbers that are unpacked or encoded at a time
CHUNK_NUMBERS = 1 << 20

# queries or weights per head from which on decoding rows costs less than the small products of pools
MANY_LINES = 128

Exact = Callable[[Tensor, Tensor], Tensor]
"""Owners and tokens, both `[n]`, to the exact states `[n, numbers]`."""


class RowPools:
    """The rows of one side of one layer.

    formats: ascending widths, as in `MixedFormat`. A row has `heads * dim` numbers.
    """

    def __init__(self, formats: tuple[Format, ...], owners: int, heads: int, dim: int, like: Tensor) -> None:
        self.formats = {row_bits(fmt): fmt for fmt in formats}
        self.heads, self.dim = heads, dim
        self.dtype = like.dtype
        self.widths = torch.empty(owners, 0, dtype=torch.uint8, device=like.device)
        """`[owners, tokens]`; 0: dropped."""
        self._pools: dict[int, _Pool] = {}

    @property
    def tokens(self) -> int:
        """Tokens per owner, dropped ones included."""
        return self.widths.shape[1]

    @property
    def numbers(self) -> int:
        """Per row."""
        return self.heads * self.dim

    # ---- reading ---------------------------------------------------------------------------------------------------

    def scores(self, query: Tensor) -> Tensor:
        """Dot products `[owners, heads, R, tokens]` with `query [owners, heads, R, dim]`; -inf where dropped."""
        runs = self._runs(query)
        if runs is not None:
            return run_scores(query, runs, self.tokens).to(query.dtype)
        if query.shape[2] >= MANY_LINES:
            scores = query.new_empty(*query.shape[:3], self.tokens)
            for tokens, states in self._decoded(query.dtype):
                scores[..., tokens] = query @ self._apart(states).transpose(-1, -2)
            return scores.masked_fill_((self.widths == 0)[:, None, None], -torch.inf)
        heads, lines = query.shape[1:3]
        parts = []
        for fmt, pool in self._filled():
            for owner, rows in pool.chunks(self._rows_at_a_time(lines)):
                # [heads, R, places]: what shares a line lies together, so that tokens are picked by columns
                parts.append(row_scores(query[owner], rows, fmt).permute(1, 2, 0, 3).flatten(2))
        parts.append(query.new_full((heads, lines, 1), -torch.inf))
        placed = torch.cat(parts, dim=2).flatten(0, 1).index_select(1, self._slots().flatten())
        return placed.view(heads, lines, *self.widths.shape).permute(2, 0, 1, 3)

    def mix(self, weights: Tensor) -> Tensor:
        """Sums of rows `[owners, heads, R, dim]`, weighted by `weights [owners, heads, R, tokens]`."""
        runs = self._runs(weights)
        if runs is not None:
            return run_mix(weights, runs, self.dim).to(weights.dtype)
        if weights.shape[2] >= MANY_LINES:
            mixed = weights.new_zeros(*weights.shape[:3], self.dim)
            for tokens, states in self._decoded(weights.dtype):
                mixed += weights[..., tokens] @ self._apart(states)
            return mixed
        heads, lines = weights.shape[1:3]
        placed = weights.new_zeros(heads * lines, self._capacity() + 1)
        slots = self._slots().flatten().expand(len(placed), -1)
        placed.scatter_(1, slots, weights.permute(1, 2, 0, 3).reshape(slots.shape))
        mixed = weights.new_zeros(*weights.shape[:3], self.dim)
        start = 0
        for fmt, pool in self._filled():
            for owner, rows in pool.chunks(self._rows_at_a_time(lines)):
                stop = start + owner.numel() * next(iter(rows.values())).shape[1]
                mine = placed[:, start:stop].view(heads, lines, owner.numel(), -1).permute(2, 0, 1, 3)
                mixed.index_add_(0, owner, row_mix(mine, rows, fmt, self.dim))
                start = stop
        return mixed

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The states `[owners, tokens, heads * dim]`; zeros where dropped."""
        states = torch.empty(*self.widths.shape, self.numbers, dtype=dtype, device=self.widths.device)
        for tokens, piece in self._decoded(dtype):
            states[:, tokens] = piece
        return states

    def ends(self, trim: int) -> tuple[Tensor, Tensor]:
        """Ends of the ranges, `[owners, tokens]` float32; 0 where dropped."""
        low = torch.zeros(self.widths.shape, device=self.widths.device)
        high = torch.zeros_like(low)
        for width, pool in self._pools.items():
            here = self.widths == width
            rows = pool.take(pool.places(here)[here], ("scales", "exact"))
            low[here], high[here] = row_ends(rows, self.formats[width], trim)
        return low, high

    # ---- changing --------------------------------------------------------------------------------------------------

    def rebuilt(self, widths: Tensor, fresh: Tensor, exact: Exact | None) -> "RowPools":
        """The pools after a decision; these stay as they are until they are let go.

        widths: `[owners, n]`, of the tokens held and of as many new ones as `fresh [owners, n - tokens, numbers]` has.
        exact: where to read what becomes wider; without it, `widths` must not exceed what they were.
        """
        new = RowPools(tuple(self.formats.values()), len(widths), self.heads, self.dim, fresh)
        new.widths = widths
        held, old = self.tokens, self.widths
        sources = {width: pool.places(old == width) for width, pool in self._pools.items()}
        for width, fmt in self.formats.items():
            wanted = widths == width
            if not wanted.any():
                continue
            pool = _Pool(wanted, encode_rows(fresh.new_zeros(1, self.numbers), fmt))
            places = pool.places(wanted)
            for before in (0, *self._pools):
                moving = wanted[:, :held] & (old == before)
                if not moving.any():
                    continue
                for owner, token in _pieces(moving, self.numbers):
                    if before >= width:
                        rows = self._pools[before].take(sources[before][owner, token])
                        if before > width:
                            rows = recode_rows(rows, self.formats[before], fmt, self.numbers)
                    else:
                        assert exact is not None  # as asked above
                        rows = encode_rows(exact(owner, token), fmt)
                    pool.put(places[owner, token], rows)
            for owner, token in _pieces(wanted[:, held:], self.numbers):
                pool.put(places[owner, held + token], encode_rows(fresh[owner, token], fmt))
            new._pools[width] = pool
        return new

    def truncated(self, tokens: int) -> "RowPools":
        """Pools of the first `tokens` tokens."""
        return self._chosen(self.widths[:, :tokens], None)

    def selected(self, owners: Tensor) -> "RowPools":
        """Pools whose owner `i` is the owner `owners[i]` of these."""
        return self._chosen(self.widths[owners], owners)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _chosen(self, widths: Tensor, owners: Tensor | None) -> "RowPools":
        chosen = RowPools(tuple(self.formats.values()), len(widths), self.heads, self.dim, self._like())
        chosen.widths = widths.clone()
        for width, old in self._pools.items():
            here = widths == width
            if not here.any():
                continue
            places = old.places(self.widths == width)
            places = places[:, : widths.shape[1]] if owners is None else places[owners]
            pool = _Pool(here, old.take(places[here][:1]))
            pool.put(pool.places(here)[here], old.take(places[here]))
            chosen._pools[width] = pool
        return chosen

    # ---- bytes and files -------------------------------------------------------------------------------------------

    def used_bytes(self) -> dict[str, int]:
        """Bytes by kind of the rows that hold a token, and of what says where they are."""
        sizes = {"widths": self.widths.untyped_storage().nbytes()}
        for width, pool in self._pools.items():
            sizes["widths"] += sum(tensor.untyped_storage().nbytes() for tensor in pool.places_held())
            count = int((self.widths == width).sum())
            for name, tensor in pool.rows.items():
                sizes[name] = sizes.get(name, 0) + count * tensor[0, 0].numel() * tensor.element_size()
        return sizes

    def held_bytes(self) -> int:
        """Bytes of the storages, empty rows included."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors())

    def tensors(self) -> list[Tensor]:
        """All tensors held."""
        pools = [tensor for pool in self._pools.values() for tensor in (*pool.places_held(), *pool.rows.values())]
        return [self.widths, *pools]

    def state(self) -> dict[str, Tensor]:
        """What a file needs, by name."""
        named = {"widths": self.widths}
        for width, pool in self._pools.items():
            named.update({f"{width}.{name}": tensor for name, tensor in pool.rows.items()})
        return named

    def restored(self, named: dict[str, Tensor]) -> "RowPools":
        """Pools of these formats with what `state` gave."""
        pools = RowPools(tuple(self.formats.values()), len(named["widths"]), self.heads, self.dim, self._like())
        pools.widths = named["widths"]
        for width in self.formats:
            rows = {n.partition(".")[2]: t for n, t in named.items() if n.partition(".")[0] == str(width)}
            if rows:
                pools._pools[width] = _Pool(pools.widths == width, rows=rows)
        return pools

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _filled(self) -> Iterator[tuple[Format, "_Pool"]]:
        return ((self.formats[width], pool) for width, pool in self._pools.items())

    def _runs(self, lines: Tensor) -> list[Run] | None:
        """The pools as kernels read them; None where none serves such queries or weights."""
        if not runs_served(lines, self.formats.values(), self.dim):
            return None
        runs = [pool.run(fmt) for fmt, pool in self._filled()]
        found = [run for run in runs if run is not None]
        # an index is missing where no kernel served when a pool was made
        return found if len(found) == len(runs) else None

    def _capacity(self) -> int:
        return sum(pool.capacity for pool in self._pools.values())

    def _slots(self) -> Tensor:
        """Where each token's row lies in the pools put one after the other, `[owners, tokens]`; dropped: beyond."""
        slots = torch.full(self.widths.shape, self._capacity(), device=self.widths.device)
        start = 0
        for width, pool in self._pools.items():
            here = self.widths == width
            slots = torch.where(here, pool.places(here) + start, slots)
            start += pool.capacity
        return slots

    def _decoded(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """The states `[owners, n, heads * dim]` of some tokens at a time, zeros where dropped."""
        owners, count = self.widths.shape
        slots = self._slots()
        step = max(1, CHUNK_NUMBERS // max(1, owners * self.numbers))
        for start in range(0, count, step):
            tokens = slice(start, min(start + step, count))
            widths = self.widths[:, tokens]
            states = torch.zeros(*widths.shape, self.numbers, dtype=dtype, device=widths.device)
            first = 0
            for width, pool in self._pools.items():
                here = widths == width
                rows = pool.take(slots[:, tokens][here] - first)
                states[here] = decode_rows(rows, self.formats[width], self.numbers, dtype)
                first += pool.capacity
            yield tokens, states

    def _apart(self, states: Tensor) -> Tensor:
        """States `[owners, n, heads * dim]` by head, `[owners, heads, n, dim]`."""
        return states.unflatten(-1, (self.heads, self.dim)).transpose(1, 2)

    def _rows_at_a_time(self, lines: int) -> int:
        return max(ROWS, CHUNK_NUMBERS // max(self.numbers, lines * self.heads))

    def _like(self) -> Tensor:
        return torch.empty(0, dtype=self.dtype, device=self.widths.device)


class _Pool:
    """Rows of one width, `[blocks, ROWS, ...]` by name.

    here: bool `[owners, tokens]`, which tokens lie in it. like: some rows `[n, ...]`, for shapes and dtypes.
    """

    def __init__(
        self, here: Tensor, like: dict[str, Tensor] | None = None, rows: dict[str, Tensor] | None = None
    ) -> None:
        blocks = -(-here.sum(1) // ROWS)
        counts = blocks.tolist()
        self._owners = len(counts)
        self._most = max(counts, default=0) * ROWS
        owners = torch.arange(self._owners, device=here.device)
        self.owner = owners.repeat_interleave(blocks, output_size=sum(counts))
        self._index = self._indexed(here, blocks) if backend.triton_problem(here.device) is None else None
        self.rows = rows or {
            name: tensor.new_zeros(len(self.owner), ROWS, *tensor.shape[1:]) for name, tensor in (like or {}).items()
        }
        self._peak = 0.0
        if rows:
            self._note_peak(rows)

    @property
    def capacity(self) -> int:
        """Rows, empty ones included."""
        return self.owner.shape[0] * ROWS

    def _indexed(self, here: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """`Run.starts` and `Run.tokens`."""
        starts = torch.nn.functional.pad(blocks.cumsum(0), (1, 0)) * ROWS
        tokens = torch.full((self.capacity,), -1, dtype=torch.int32, device=here.device)
        tokens[self.places(here)[here]] = here.nonzero()[:, 1].int()
        return starts.int(), tokens

    def run(self, fmt: Format) -> Run | None:
        """All rows as kernels read them; None without the index they need."""
        if self._index is None:
            return None
        rows = {name: tensor.flatten(0, 1) for name, tensor in self.rows.items()}
        return Run(fmt, rows, *self._index, self._most, self._peak)

    def _note_peak(self, rows: dict[str, Tensor]) -> None:
        """Kept where kernels may ask: they must not wait for the device."""
        if self._index is not None and rows.get("outlier_value", self.owner[:0]).numel():
            self._peak = max(self._peak, float(rows["outlier_value"].abs().max()))

    def places_held(self) -> list[Tensor]:
        """What says where rows are."""
        return [self.owner, *(self._index or ())]

    def places(self, here: Tensor) -> Tensor:
        """Which row of the pool a token lies in, `[owners, tokens]`, where `here`; elsewhere anything."""
        rank = here.cumsum(1)
        if self._owners == 1:
            return rank - 1
        blocks = -(-rank[:, -1:] // ROWS)
        return rank - 1 + (blocks.cumsum(0) - blocks) * ROWS

    def take(self, places: Tensor, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """The rows `[n, ...]` at `places [n]`, or of these names alone."""
        return {
            name: tensor.flatten(0, 1)[places] for name, tensor in self.rows.items() if names is None or name in names
        }

    def put(self, places: Tensor, rows: dict[str, Tensor]) -> None:
        """Write rows `[n, ...]` at `places [n]`."""
        self._note_peak(rows)
        for name, tensor in rows.items():
            self.rows[name].flatten(0, 1)[places] = tensor

    def chunks(self, count: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Owners `[blocks]` and rows `[blocks, n, ...]`, about `count` rows at a time, in order."""
        if self._owners == 1:
            # all rows of a chunk as one block
            for start in range(0, self.capacity, count):
                piece = {name: tensor.flatten(0, 1)[None, start : start + count] for name, tensor in self.rows.items()}
                yield self.owner[:1], piece
            return
        step = max(1, count // ROWS)
        for start in range(0, self.owner.shape[0], step):
            stop = start + step
            yield self.owner[start:stop], {name: tensor[start:stop] for name, tensor in self.rows.items()}


def _pieces(mask: Tensor, numbers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Owner and token of what `mask` marks, owner by owner, as many at a time as bound the float copies of rows."""
    owner, token = mask.nonzero(as_tuple=True)
    step = max(1, 4 * CHUNK_NUMBERS // numbers)
    for start in range(0, len(owner), step):
        yield owner[start : start + step], token[start : start + step]
