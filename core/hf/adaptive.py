"""A layer whose tokens have widths of their own: pools of packed rows, and exact tail."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.attention import Partial, softmax_weights, with_sink
from ...kernels.format import Format, Side
from ...kernels.rows import state_ends
from ..adaptive import AdaptiveStrategy, Evidence
from ..history import AttentionHistory
from ..host import HostCopy
from ..pools import RowPools
from ..protocol import LayerSpec
from ..store import compact
from .handles import LazyStates
from .layer import ROWS, SIDES, PackedLayer, under
from .masks import key_validity
from .precision import full_precision
from .segments import Scoring, fold

# scores that are held at a time, over batch, heads, queries and keys
SCORE_NUMBERS = 1 << 24

# newest queries, before the first decision, that a strategy may measure
MEASURED_QUERIES = 4096

SIXTEEN_BITS = Format(codes="exact")


class Council:
    """The layers of one cache, for strategies that decide for all of them together."""

    def __init__(self) -> None:
        self.layers: list[AdaptiveLayer] = []

    def decide(self, layer: "AdaptiveLayer", overdue: bool) -> None:
        """Called by a layer in which enough tokens wait; overdue: since the last forward."""
        if not layer.strategy.together:
            layer.apply(layer.strategy.widths(layer.spec, layer.evidence()))
        elif overdue or layer is [each for each in self.layers if each.packs][-1]:
            layers = [each for each in self.layers if each.due]
            merged = layer.strategy.merge([each.evidence() for each in layers])
            widths = layer.strategy.widths(layer.spec, merged)
            for each in layers:
                each.apply(widths)


class AdaptiveLayer(PackedLayer):
    """Whenever the tail holds `residual_length` tokens and `interval` more, widths are decided, after attention.

    The older tokens of the tail then enter the pools, and those that are there already may change their pool. The
    first `sink_tokens` real tokens of each row have 16 bits, whatever the strategy says; padding is not kept.
    """

    strategy: AdaptiveStrategy

    def __init__(self, council: Council, *arguments: Any) -> None:
        self.packs = True
        """Whether the strategy packs this layer; set by the cache, which asks before the first token arrives."""
        self._council = council
        council.layers.append(self)
        super().__init__(*arguments)

    def _clear(self) -> None:
        super()._clear()
        self.pools: dict[Side, RowPools] = {}
        self.history = AttentionHistory(self.strategy.attention_window)
        self.host = HostCopy() if self.strategy.host_copy else None
        self.measured: dict[str, Tensor] = {}
        """What the strategy measured on the prompt, each `[batch, heads]`."""
        self._measuring = True
        """Whether some row has yet to be measured: none of its real tokens was packed."""
        self._real: Tensor | None = None
        """Which tokens are no padding, `[batch, tokens]`: as told when they were packed, since then by the latest mask
        that tells; None: all are real."""
        self._queries: Tensor | None = None
        """What it noticed of queries and has yet to measure, `[batch, kv_heads, per kv head, queries]`."""

    # ---- length ----------------------------------------------------------------------------------------------------

    @property
    def packed_tokens(self) -> int:
        """Tokens that widths were decided for, dropped ones included."""
        return self.pools["key"].tokens if self.is_initialized else 0

    @property
    def due(self) -> bool:
        """Whether enough tokens wait to be packed."""
        if not self.is_initialized or self.formats is None:
            return False
        return self.tails["key"].length - self.options.residual_length >= self.strategy.interval

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens, each as wide as it is."""
        removed = self.get_seq_length() - length
        super().truncate(length)
        if removed <= 0:
            return
        self.history.truncate(length)
        self._real = None if self._real is None else self._real[:, :length].clone()
        self._queries = None if self._queries is None else compact(self._queries[..., :-removed])
        if not self.packed_tokens:
            self.measured, self._measuring = {}, True

    def _cut_packed(self, length: int) -> None:
        self.pools = {side: pools.truncated(length) for side, pools in self.pools.items()}
        for tail in self.tails.values():
            tail.truncate(0)
        if self.host is not None:
            self.host.truncate(length)

    # ---- what attention reads --------------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store `[batch, kv_heads, tokens, dim]` and return lazy handles to all tokens; raises as `PackedLayer`."""
        if self.due:
            # another attention function read the last forward: nothing is known of attention
            with full_precision(key_states.device):
                self._council.decide(self, overdue=True)
        return super().update(key_states, value_states, *args, **kwargs)

    def attend(self, query: Tensor, key: LazyStates, value: LazyStates, scoring: Scoring) -> Tensor:
        """Output `[batch, query_heads, queries, value_dim]` for a query that is already rotated."""
        self._keep(query, key, scoring)
        outputs = []
        for tile in self._tiles(query, key, scoring, 0):
            self._notice(tile)
            packed = tile.weights[..., : key.start]
            # tokens packed since the handle was issued are read exact
            packed = torch.nn.functional.pad(packed, (0, self.packed_tokens - key.start))
            mix = self._apart(self.pools["value"].mix(self._owned(packed)))
            exact = value.exact[:, :, : tile.weights.shape[-1] - key.start]
            mix = mix + tile.weights[..., key.start :] @ exact.to(mix.dtype)
            # a learned sink is in the total already
            sums, rest = Partial(mix, tile.maximum, tile.total), scoring._replace(s_aux=None)
            outputs.append(rest.finish(sums, self.kv_heads, query[:, :, tile.start : tile.stop]))
        return torch.cat(outputs, dim=2)

    def observe(self, query: Tensor, key: LazyStates, scoring: Scoring) -> None:
        """Attention of the queries that the strategy wants to know about."""
        self._keep(query, key, scoring)
        for tile in self._tiles(query, key, scoring, query.shape[2] - self._noticed(query.shape[2])):
            self._notice(tile)

    def settle(self) -> None:
        """Decide, if it is time to."""
        if self.due:
            self._council.decide(self, overdue=False)

    def dequantize(self, side: Side, packed: int) -> Tensor:
        """The first `packed` tokens of one side dense, for other attention functions; raises if some were dropped."""
        dropped = self.pools[side].widths.view(len(self._batch()), -1, self.packed_tokens)[..., :packed] == 0
        if (dropped & self._realness()[:, None, :packed]).any():
            raise RuntimeError(
                f"layer {self.index} has dropped tokens, and its {side}s are read by something else than the attention "
                "implementation 'cachequant', which alone leaves them out. Attach the model again or, with latent "
                "attention, use a strategy that drops none"
            )
        return self.dense(side, packed)

    def dense(self, side: Side, packed: int) -> Tensor:
        """The first `packed` tokens `[batch, kv_heads, packed, dim]` in the model's dtype, zeros where dropped."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        rows = self.pools[side].dense(wide)[:, :packed]
        if self._heads == 1:
            return rows.unflatten(0, (-1, self.kv_heads)).to(self.dtype)
        return rows.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2).to(self.dtype)

    # ---- deciding --------------------------------------------------------------------------------------------------

    def evidence(self) -> Evidence:
        """What is known of the tokens in the pools and of those that leave the tail."""
        with torch.inference_mode(False), torch.no_grad():
            leaving = self._leaving()
            batch, tokens = len(self._batch()), self.packed_tokens + leaving["key"].shape[2]
            real = self._realness()
            attention = self.history.read(real.shape[1])
            if self._measuring:
                self._measure(leaving, real)
            low, high = {}, {}
            for side in SIDES:
                trim = max(fmt.trim for fmt in getattr(self.formats, side))
                ends = zip(self.pools[side].ends(trim), state_ends(self._rows(leaving[side]), trim), strict=True)
                low[side], high[side] = (torch.cat(pair, dim=1).unflatten(0, (batch, -1)) for pair in ends)
            return Evidence(
                tokens=tokens,
                seen=real.sum(-1),
                newer=real.shape[1] - tokens,
                real=real[:, :tokens],
                attention=None if attention is None else attention[..., :tokens],
                low=low,
                high=high,
                widths={side: pools.widths.unflatten(0, (batch, -1)).clone() for side, pools in self.pools.items()},
                measured=self.measured,
            )

    def apply(self, widths: dict[Side, Tensor]) -> None:
        """Pack what leaves the tail, and what changes its width, as the strategy decided."""
        with torch.inference_mode(False), torch.no_grad():
            leaving = self._leaving()
            real = self._realness()
            tokens = self.packed_tokens + leaving["key"].shape[2]
            settled = self._settled(widths, real[:, :tokens])
            exact = self.host if self.host is not None and not self.host.lost else None
            # everything is packed before anything is changed: what raises loses nothing
            pools = {}
            for side in SIDES:
                read = None if exact is None else partial(self._exact, side)
                pools[side] = self.pools[side].rebuilt(settled[side], self._rows(leaving[side]), read)
            rest = {side: tail.read()[:, :, leaving[side].shape[2] :] for side, tail in self.tails.items()}
            if self.host is not None:
                self.host.append(leaving)
            self.pools = pools
            for side, tail in self.tails.items():
                tail.replace(rest[side])
            self._measuring = not real[:, :tokens].any(-1).all()
            self._queries = self._queries if self._measuring else None
            self.history.forget(max(0, (self.strategy.attention_window or 0) - self.strategy.interval))

    def _settled(self, widths: dict[Side, Tensor], real: Tensor) -> dict[Side, Tensor]:
        """`widths` as the pools take them, uint8 `[owners, n]`: nothing widens without a copy, sides drop alike."""
        settled = self._checked(widths, real)
        held = self.packed_tokens
        if held and (self.host is None or self.host.lost):
            for side, pools in self.pools.items():
                old = pools.widths.unflatten(0, (real.shape[0], -1))
                settled[side][..., :held] = torch.minimum(settled[side][..., :held], old)
        sinks = self._sinks(real)
        gone = ((settled["key"] == 0) | (settled["value"] == 0)) & ~sinks[:, None] | ~real[:, None]
        for decided in settled.values():
            decided.masked_fill_(sinks[:, None], 16).masked_fill_(gone, 0)
        return {side: decided.flatten(0, 1) for side, decided in settled.items()}

    def _checked(self, widths: dict[Side, Tensor], real: Tensor) -> dict[Side, Tensor]:
        """A copy of `widths`, uint8 `[batch, owners of a row, n]`; raises ValueError for what the formats lack."""
        checked: dict[Side, Tensor] = {}
        allowed = {side: [*self.pools[side].formats, *([0] if self.formats.drops else [])] for side in SIDES}
        owners = self.kv_heads if self._heads == 1 else 1
        if not isinstance(widths, dict) or widths.keys() != set(SIDES):
            given = list(widths) if isinstance(widths, dict) else type(widths).__name__
            raise ValueError(f"{self.strategy.name!r} gave widths as {given}, expected a dict of 'key' and 'value'")
        for side in SIDES:
            given = widths[side].to(self.device)  # where all layers decide together, they may be on several
            shape = (real.shape[0], given.shape[1] if given.ndim == 3 else -1, real.shape[1])
            if given.dtype != torch.uint8 or given.shape != shape or shape[1] not in (1, owners):
                raise ValueError(
                    f"{self.strategy.name!r} gave {side} widths of {given.dtype} {tuple(given.shape)}, expected uint8 "
                    f"{(real.shape[0], owners, real.shape[1])}"
                )
            if not torch.isin(given, given.new_tensor(allowed[side])).all():
                raise ValueError(
                    f"{self.strategy.name!r} gave {side} widths {given.unique().tolist()}, its formats have "
                    f"{allowed[side]}"
                )
            checked[side] = given.expand(-1, owners, -1).clone()
        return checked

    def _sinks(self, real: Tensor) -> Tensor:
        """Which tokens `[batch, n]` are the first real ones of their row."""
        return real & (real.cumsum(-1) <= self.options.sink_tokens)

    def _measure(self, leaving: dict[Side, Tensor], real: Tensor) -> None:
        """Let the strategy measure the rows of which no real token is packed yet."""
        held = self.packed_tokens
        new = self.strategy.measure(self.spec, self._queries, leaving, real[:, held : held + leaving["key"].shape[2]])
        begun = real[:, :held].any(-1, keepdim=True)
        self.measured = {
            name: torch.where(begun, self.measured.get(name, number), number) for name, number in new.items()
        }

    def _leaving(self) -> dict[Side, Tensor]:
        count = self.tails["key"].length - self.options.residual_length
        return {side: self.tails[side].read()[:, :, :count] for side in SIDES}

    def _realness(self) -> Tensor:
        """Which tokens are real, bool `[batch, tokens]`."""
        if self._real is not None:
            return self._real
        return torch.ones(len(self._batch()), self.get_seq_length(), dtype=torch.bool, device=self.device)

    # ---- looking ---------------------------------------------------------------------------------------------------

    def _tiles(self, query: Tensor, key: LazyStates, scoring: Scoring, first: int) -> Iterator["_Tile"]:
        """Attention weights of the queries from `first` on, some at a time."""
        queries, keys = query.shape[2], key.shape[2]
        exact_key = key.rotated_exact()
        step = max(1, SCORE_NUMBERS // (query.shape[0] * query.shape[1] * keys))
        for start in range(first, queries, step):
            stop = min(start + step, queries)
            view = scoring._replace(visibility=scoring.visibility.tile(start, stop))
            visible = view.visibility.keys
            lines = fold(query[:, :, start:stop], self.kv_heads, scoring.scaling)
            scores = view.visibility.hide(
                view.scores(lines, exact_key[:, :, : visible - key.start], stop - start), key.start
            )
            if key.start:
                scores = torch.cat([self._packed_scores(lines, key.start, view, stop - start), scores], dim=-1)
            weights, maximum, total = softmax_weights(scores.flatten(2, 3))
            sink = view.sink(self.kv_heads, stop - start)
            if sink is not None:
                # `weights` stands in for the mix: it is scaled alike
                weights, maximum, total = with_sink(Partial(weights, maximum, total), sink)
            yield _Tile(start, stop, queries, keys, weights, maximum, total)

    def _packed_scores(self, lines: Tensor, packed: int, scoring: Scoring, queries: int) -> Tensor:
        pools = self.pools["key"]
        scores = self._apart(pools.scores(self._owned(lines)))[..., :packed]
        scores = scoring.visibility.hide(scoring.cap(scores.unflatten(2, (-1, queries))), 0)
        if scoring.softcap is None:
            return scores
        # which the cap has made finite
        dropped = pools.widths.unflatten(0, (len(lines), -1))[:, :, None, None, :packed] == 0
        return scores.masked_fill(dropped, -torch.inf)

    def _noticed(self, queries: int) -> int:
        """How many of the newest of `queries` queries the next decision is to know."""
        window = self.strategy.attention_window
        if window is None or not window or self.formats is None:
            return queries if window is None and self.formats is not None else 0
        ahead = self.strategy.interval + self.options.residual_length - self.tails["key"].length
        return max(0, min(queries, window - max(0, ahead)))

    def _notice(self, tile: "_Tile") -> None:
        """Show the strategy what it is to know of a tile's queries, if anything."""
        first = max(tile.start, tile.queries - self._noticed(tile.queries))
        if first >= tile.stop:
            return
        shape = (-1, tile.stop - tile.start)
        seen = tile.keys - tile.queries + tile.stop
        share = (tile.weights / tile.total.masked_fill(tile.total == 0, 1)).unflatten(2, shape)
        share = share[..., first - tile.start :, :seen].detach()
        if self._real is not None:
            real = self._real[:, seen - share.shape[3] : seen]
            share = share * real[:, None, None, :, None]
        with torch.inference_mode(False), torch.no_grad():
            self.history.add(self.strategy.notice(share), seen)

    def _keep(self, query: Tensor, key: LazyStates, scoring: Scoring) -> None:
        """Keep what the strategy notices of queries until it measures them; NaN where they are padding."""
        if not self._measuring or self.formats is None:
            return
        keys = key.shape[2]
        with torch.inference_mode(False), torch.no_grad():
            query = query.detach()[:, :, -MEASURED_QUERIES:]
            rows = fold(query, self.kv_heads, scoring.scaling).unflatten(2, (-1, query.shape[2]))
            noticed = self.strategy.notice_query(self.spec, rows)
            if noticed is None:
                return
            if self._real is not None:
                padding = ~self._real[:, keys - rows.shape[3] : keys]
                noticed = noticed.masked_fill(padding[:, None, None], torch.nan)
            if self._queries is not None:
                noticed = torch.cat([self._queries, noticed], dim=3)
            self._queries = compact(noticed[..., -MEASURED_QUERIES:])

    # ---- bytes and files -------------------------------------------------------------------------------------------

    def used_bytes(self) -> dict[str, int]:
        """Bytes by kind; with the spare capacity they are what is held."""
        if not self.is_initialized:
            return {}
        sizes: dict[str, int] = {}
        spare = 0
        for side, pools in self.pools.items():
            used = pools.used_bytes()
            spare += pools.held_bytes() - sum(used.values())
            for name, size in used.items():
                row = name if name == "widths" else f"{side} {ROWS.get(name, name)}"
                sizes[row] = sizes.get(row, 0) + size
        beside = super().used_bytes()
        sizes["attention history"] = self.history.held_bytes()
        sizes["widths"] = sizes.get("widths", 0) + _nbytes(self._beside())
        return {**sizes, "tail": beside["tail"], "spare": beside["spare"] + spare}

    def tensors(self) -> list[Tensor]:
        """All that is held where the model computes."""
        rows = [] if self.history.rows is None else [self.history.rows]
        pooled = [tensor for pools in self.pools.values() for tensor in pools.tensors()]
        return [*super().tensors(), *pooled, *rows, *self._beside()]

    def _beside(self) -> list[Tensor]:
        return [
            *self.measured.values(),
            *(tensor for tensor in (self._real, self._queries) if tensor is not None),
        ]

    def host_bytes(self) -> dict[str, int]:
        """Bytes of the exact copies."""
        return {} if self.host is None else {"host copy": self.host.held_bytes()}

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a file needs to restore this layer: plain values, and tensors by name."""
        values, tensors = super().state()
        if not values:
            return values, tensors
        for side in SIDES:
            tensors.update({f"pools.{side}.{name}": tensor for name, tensor in self.pools[side].state().items()})
        tensors.update({f"measured.{name}": tensor for name, tensor in self.measured.items()})
        beside = {"real": self._real, "queries": self._queries, "history": self.history.rows}
        tensors.update({name: tensor for name, tensor in beside.items() if tensor is not None})
        values.update(queries=self.history.queries, measuring=self._measuring)
        if self.host is not None:
            tensors.update({f"host.{side}": states for side, states in self.host.state().items()})
            values["host"] = {name: getattr(self.host, name) for name in ("lost", "to_host", "from_host")}
        return values, tensors

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`, on the device of `tensors`. Raises ValueError when the formats are not the same."""
        super().restore(values, tensors)
        if not values:
            return
        for side in SIDES:
            self.pools[side] = self.pools[side].restored(under(f"pools.{side}.", tensors))
        self.measured = under("measured.", tensors)
        self._measuring = values["measuring"]
        self._real, self._queries = tensors.get("real"), tensors.get("queries")
        self.history.rows, self.history.queries = tensors.get("history"), values["queries"]
        if self.host is not None:
            copies: dict[Side, Tensor] = {side: tensors[f"host.{side}"] for side in SIDES if f"host.{side}" in tensors}
            self.host.restore(copies, values["host"])

    # ---- inside ----------------------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Ask the strategy for this layer's formats, given the shapes that really arrive."""
        super().lazy_initialization(key_states, value_states)
        owners = len(key_states) * (self.kv_heads if self._heads == 1 else 1)
        arrived: dict[Side, Tensor] = {"key": key_states, "value": value_states}
        for side, states in arrived.items():
            formats = () if self.formats is None else self._with_room_for_sinks(getattr(self.formats, side))
            self.pools[side] = RowPools(formats, owners, self._heads, states.shape[3], states)

    def _ask_formats(self, spec: LayerSpec) -> None:
        formats = self.strategy.formats(spec)
        if formats is not None:
            formats.require_fitting(spec.head_dim, spec.value_dim, spec.kv_heads)
        self.formats = formats
        self._heads = spec.kv_heads if formats is not None and formats.heads == "together" else 1
        """Heads that a row holds."""

    def _with_room_for_sinks(self, formats: tuple[Format, ...]) -> tuple[Format, ...]:
        exact = formats[-1].codes == "exact" or not self.options.sink_tokens
        return formats if exact else (*formats, SIXTEEN_BITS)

    def _store(self, key_states: Tensor, value_states: Tensor) -> dict[Side, Tensor]:
        states = super()._store(key_states, value_states)
        self._real = self._told(self.get_seq_length() - key_states.shape[2])
        return states

    def _told(self, before: int) -> Tensor | None:
        """Which tokens are real, now that there are more than `before`."""
        told = key_validity(self._mask)
        if told is None and self._real is None:
            return None
        # a mask that hides is not always one that tells
        known = before if told is None and self._mask is not None else self.packed_tokens
        shape = (len(self._batch()), self.get_seq_length())
        real = torch.ones(shape, dtype=torch.bool, device=self.device) if told is None else told.expand(shape).clone()
        real[:, :known] = True if self._real is None else self._real[:, :known]
        return real

    def _map_packed(self, change: Callable[[Tensor], Tensor]) -> None:
        batch = next(iter(self.pools.values())).widths.shape[0] // (self.kv_heads if self._heads == 1 else 1)
        rows = change(torch.arange(batch, device=self.device))
        heads = torch.arange(self.kv_heads if self._heads == 1 else 1, device=self.device)
        owners = (rows[:, None] * len(heads) + heads).flatten()
        self.pools = {side: pools.selected(owners) for side, pools in self.pools.items()}
        self.history.map(change)
        self.measured = {name: compact(change(tensor)) for name, tensor in self.measured.items()}
        self._real = None if self._real is None else change(self._real).clone()
        self._queries = None if self._queries is None else compact(change(self._queries))
        if self.host is not None:
            self.host.reorder(rows)

    def _exact(self, side: Side, owner: Tensor, token: Tensor) -> Tensor:
        assert self.host is not None
        if self._heads == 1:
            return self.host.read(side, owner // self.kv_heads, owner % self.kv_heads, token)
        return self.host.read(side, owner, None, token).flatten(1)

    def _batch(self) -> Tensor:
        return self.tails["key"].read()

    def _rows(self, states: Tensor) -> Tensor:
        """`[batch, kv_heads, n, dim]` as rows `[owners, n, numbers]`."""
        return states.flatten(0, 1) if self._heads == 1 else states.transpose(1, 2).flatten(2)

    def _owned(self, lines: Tensor) -> Tensor:
        """`[batch, kv_heads, ...]` as `[owners, heads of a row, ...]`."""
        return lines.flatten(0, 1).unsqueeze(1) if self._heads == 1 else lines

    def _apart(self, owned: Tensor) -> Tensor:
        """The inverse of `_owned`."""
        return owned.squeeze(1).unflatten(0, (-1, self.kv_heads)) if self._heads == 1 else owned


def _nbytes(tensors: list[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


class _Tile(NamedTuple):
    """Attention of the queries `[start, stop)` of a forward.

    weights: `[batch, kv_heads, R, keys that any of them may see]`, to be divided by `total [..., 1]`.
    """

    start: int
    stop: int
    queries: int
    """Of the forward."""
    keys: int
    """Of the forward."""
    weights: Tensor
    maximum: Tensor
    total: Tensor
