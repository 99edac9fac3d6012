"""QAQ: for every token as many bits as attention needs, decided anew while decoding.

Dong et al., https://arxiv.org/abs/2403.04643. Values get bits by the attention they received, keys by the norm of
queries, both by their own range. `docs/strategies/qaq.md` says when to use which field, and where this differs.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..core import AdaptiveStrategy, Bits, Evidence, Format, LayerSpec, MixedFormat, Side, Width, round_up
from ..core.calibration import CalibratedStrategy, Calibration, Recipe
from ..kernels.format import MOST_TRIMMED
from ..registry.hookspecs import hookimpl

Profile = Literal["paper", "repository"]

PACKED_WIDTHS: tuple[Bits, ...] = (2, 3, 4, 8)
QUERY_QUANTILE = 0.9
"""The bound on keys is to hold for nine queries of ten, as in the paper."""
REPOSITORY_QUERY_NORM = 300.0
"""Of every model in the published code; here also where no query was seen, which is careful."""


class QAQ(AdaptiveStrategy, CalibratedStrategy):
    """Bits per token from a target error: values by their attention, keys by the norm of queries."""

    name: ClassVar[str] = "qaq"
    variants: ClassVar[tuple[dict[str, Any], ...]] = (
        {"sigma_key": 0.0005},
        {},
        {"sigma_key": 0.008},
        {"host_copy": False},
    )
    searchable: ClassVar[Mapping[str, Sequence[Any]]] = {
        "sigma_key": (0.0005, 0.001, 0.002, 0.004, 0.008),
        "sigma_value": (0.05, 0.1, 0.2, 0.4),
        "alpha": (0.0, 0.005, 0.01, 0.02),
        "window": (5, 16, 64),
        "granularity": ("layer", "head", "token"),
        "min_bits": (0, 2),
        "host_copy": (True, False),
    }

    alpha: float = Field(default=0.01, ge=0, le=0.25, description="Share of numbers kept exact, half at either end.")
    window: int = Field(default=5, ge=1, le=512, description="Newest queries whose largest score counts.")
    sigma_key: float = Field(
        default=0.002, gt=0, description="Allowed standard deviation of an attention score, a probability."
    )
    sigma_value: float = Field(
        default=0.1,
        gt=0,
        description="Allowed standard deviation of an attention output, as a share of the values' root mean square; "
        "of the output itself in the repository profile.",
    )
    min_bits: Width = Field(default=2, description="Fewest bits of a token; 0: tokens that need none are dropped.")
    max_bits: Width = Field(default=8, description="Most bits of a token; 16 keeps it in a 16-bit float.")
    granularity: Literal["head", "layer", "token"] = Field(
        default="layer",
        description="What shares the bits of a token: nothing; all heads of a layer, whose numbers then share a scale "
        "too; all heads of all layers.",
    )
    shared_bits: bool = Field(default=False, description="Keys and values of a token get the wider of their widths.")
    interval: int = Field(default=128, ge=1, description="Tokens between two decisions about bits.")
    hysteresis: float = Field(default=0.25, ge=0, le=4, description="Bits beyond a width before a token changes it.")
    host_copy: bool = Field(default=True, description="Exact copies in host memory; without them bits only fall.")
    query_norm: float | None = Field(
        default=None,
        gt=0,
        description="Squared norm of scaled queries. None: the calibration's, else the prompt's 90th percentile "
        "(repository profile: 300).",
    )
    profile: Profile = Field(default="paper", description="Where the two differ: bits and grids; see the docs.")

    @model_validator(mode="after")
    def _bits_are_a_range(self) -> "QAQ":
        if self.max_bits == 0 or self.min_bits > self.max_bits:
            raise ValueError(
                f"min_bits={self.min_bits} and max_bits={self.max_bits} are no range; use 0, 2, 3, 4, 8 or 16 with "
                "min_bits <= max_bits and max_bits >= 2"
            )
        return self

    @model_validator(mode="after")
    def _sigmas_are_deviations(self) -> "QAQ":
        if self.profile == "repository":
            return self  # its authors used 1 to 30, where the clamps decide
        if self.sigma_key > 0.5:
            raise ValueError(
                f"sigma_key={self.sigma_key}: an attention score is a probability, whose standard deviation is at most "
                "0.5; use something like 0.002. Only profile='repository' takes more, as its authors did"
            )
        if self.sigma_value > 1:
            raise ValueError(
                f"sigma_value={self.sigma_value}: a share of the values' root mean square; beyond 1 nothing would be "
                "left of the output; use something like 0.1. Only profile='repository' takes more"
            )
        return self

    # ---- what the cache and calibrations ask -----------------------------------------------------------------------

    def needs_statistics(self) -> bool:
        """Without a calibration, query norms are the prompt's own."""
        return False

    def recipe(self) -> Recipe:
        """Query norms, unless they are given."""
        given = self.query_norm is not None or self.profile == "repository"
        return Recipe() if given else Recipe(query_quantile=QUERY_QUANTILE)

    @property
    def attention_window(self) -> int:
        """As configured."""
        return self.window

    @property
    def together(self) -> bool:
        """Bits per token are of all layers."""
        return self.granularity == "token"

    def formats(self, layer: LayerSpec) -> MixedFormat:
        """All widths of the range, for every layer alike."""
        heads = 1 if self.granularity == "head" else layer.kv_heads
        return MixedFormat(
            key=self._rows(heads * layer.head_dim),
            value=self._rows(heads * layer.value_dim),
            heads="apart" if self.granularity == "head" else "together",
            drops=self.min_bits == 0,
        )

    def notice_query(self, layer: LayerSpec, query: Tensor) -> Tensor | None:
        """Squared norms, unless they are known."""
        return query.square().sum(-1) if self._known_norm(layer) is None else None

    def measure(
        self, layer: LayerSpec, queries: Tensor | None, states: dict[Side, Tensor], real: Tensor
    ) -> dict[str, Tensor]:
        """Query norms and the values' root mean square, `[batch, heads]`."""
        value = states["value"].float()
        numbers = real.sum(-1).clamp(min=1) * layer.value_dim
        square = value.square().sum(-1).where(real[:, None], 0).sum(-1) / numbers[:, None]
        known = self._known_norm(layer)
        if known is None and queries is not None:
            norm = queries.flatten(2).nanquantile(QUERY_QUANTILE, dim=-1).nan_to_num(nan=REPOSITORY_QUERY_NORM)
        else:
            given = torch.as_tensor(REPOSITORY_QUERY_NORM if known is None else known, dtype=torch.float32)
            norm = given.to(square.device).expand_as(square)
        if self.granularity != "head":
            square, norm = square.mean(1, keepdim=True), norm.amax(1, keepdim=True)
        return {"query_norm": norm, "value_size": square.sqrt()}

    def merge(self, evidence: Sequence[Evidence]) -> Evidence:
        """The widest range, the most attention, the largest queries and the smallest values of all layers."""
        first = evidence[0]
        seen = [each.attention.amax(1, keepdim=True) for each in evidence if each.attention is not None]
        return Evidence(
            tokens=first.tokens,
            seen=first.seen,
            newer=first.newer,
            real=first.real,
            attention=_over([pad_rows(rows, self.window) for rows in seen], torch.amax) if seen else None,
            low={side: _over([each.low[side] for each in evidence], torch.amin) for side in first.low},
            high={side: _over([each.high[side] for each in evidence], torch.amax) for side in first.high},
            widths=first.widths,
            measured={
                "query_norm": _over([each.measured["query_norm"] for each in evidence], torch.amax),
                "value_size": _over([each.measured["value_size"] for each in evidence], torch.amin),
            },
        )

    def widths(self, layer: LayerSpec, evidence: Evidence) -> dict[Side, Tensor]:
        """Bits by the paper's equations, rounded up to a width that there is."""
        span = {side: evidence.high[side] - evidence.low[side] for side in evidence.low}
        seen = evidence.seen[:, None, None]
        score = largest_score(evidence.attention, span["value"])
        norm, size = (evidence.measured[name][..., None] for name in ("query_norm", "value_size"))
        sigma = self.sigma_value * size if self.profile == "paper" else torch.full_like(size, self.sigma_value)
        wanted: dict[Side, Tensor] = {
            "key": bits_for(span["key"], key_deviation(self.sigma_key, norm, seen), self.profile),
            "value": bits_for(span["value"], value_deviation(sigma, score, seen), self.profile),
        }
        if self.shared_bits:
            widest = torch.maximum(wanted["key"], wanted["value"])
            wanted = {"key": widest, "value": widest}
        return {side: self._steadied(bits, evidence.widths.get(side), evidence.newer) for side, bits in wanted.items()}

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _widths(self) -> list[int]:
        return [width for width in (0, *PACKED_WIDTHS, 16) if self.min_bits <= width <= self.max_bits]

    def _rows(self, numbers: int) -> tuple[Format, ...]:
        trim = math.ceil(self.alpha / 2 * numbers - 1e-9)
        if trim > MOST_TRIMMED:
            most = math.floor(2e5 * MOST_TRIMMED / numbers) / 1e5
            raise ValueError(
                f"alpha={self.alpha} keeps {trim} numbers exact at either end of a row of {numbers}, more than there "
                f"are slots for ({MOST_TRIMMED}); use alpha <= {most:g}"
                + ("" if self.granularity == "head" else " or granularity='head'")
            )
        grid = "midpoint" if self.profile == "paper" else "mean"
        widths = self._widths()
        packed = [
            Format(bits=bits, grid=grid, trim=trim, outliers=2 * trim) for bits in PACKED_WIDTHS if bits in widths
        ]
        return (*packed, *([Format(codes="exact")] if 16 in widths else []))

    def _known_norm(self, layer: LayerSpec) -> Tensor | float | None:
        """A number, `[kv_heads]`, or None where the prompt has to tell."""
        if self.query_norm is not None:
            return self.query_norm
        if self.profile == "repository":
            return REPOSITORY_QUERY_NORM
        if not isinstance(self.calibration, Calibration):
            return None
        norm = self.calibration.of(layer.index, "key").query_norm
        if norm is None:
            raise ValueError("the calibration holds no query norms; calibrate again, for this strategy")
        return norm

    def _steadied(self, bits: Tensor, present: Tensor | None, newer: int) -> Tensor:
        """Widths for wanted bits: tokens that have one keep it within the hysteresis; the newest get the most."""
        ladder = self._widths()
        widths = round_up(bits, ladder)
        if present is not None and present.shape[-1]:
            held = bits[..., : present.shape[-1]]
            least, most = round_up(held - self.hysteresis, ladder), round_up(held + self.hysteresis, ladder)
            widths[..., : present.shape[-1]] = torch.minimum(torch.maximum(present, least), most)
        newest = max(0, self.window - 1 - newer)
        if newest:
            widths[..., -newest:] = self.max_bits
        return widths


# ---- the equations -------------------------------------------------------------------------------------------------


def key_deviation(sigma: float, query_norm: Tensor, tokens: Tensor) -> Tensor:
    """Standard deviation that keys may have, so that a score's is at most `sigma`: the paper's bound on keys.

    query_norm: squared norm of scaled queries: the paper leaves `1 / sqrt(head_dim)` out, here it is part of them.
    tokens: how many there are. One alone has score 1 whatever its key: any deviation will do.
    """
    # none: the row is padding
    tokens = tokens.double().clamp(min=1)
    factor = tokens**3 / (tokens - 1)
    return (torch.log1p(factor * sigma**2) / query_norm.double()).sqrt().float()


def value_deviation(sigma: Tensor | float, score: Tensor, tokens: Tensor) -> Tensor:
    """Standard deviation that values with attention `score` may have, so that the output's is at most `sigma`."""
    return sigma / (tokens.float().sqrt() * score)


def bits_for(span: Tensor, deviation: Tensor, profile: Profile) -> Tensor:
    """Bits, a real number, at which a range of `span` in equal cells deviates by `deviation`; -inf where any do.

    An error that is uniform in a cell deviates by the cell's width over `2 sqrt(3)`. The repository takes cells twice
    as wide, and adds one to their number: about a bit fewer, and never less than none.
    """
    cells = span.double() / (2 * math.sqrt(3) * deviation.double())
    # 0 / 0: what has no range, or no attention, needs no bits
    cells = cells.nan_to_num(nan=0.0)
    return torch.log2(cells if profile == "paper" else cells / 2 + 1).float()


def largest_score(attention: Tensor | None, like: Tensor) -> Tensor:
    """The largest score that each token got in the window, `[batch, heads, n]` as `like`; unseen, 1 is assumed."""
    if attention is None:
        return torch.ones_like(like)
    largest = attention.amax(2)
    return largest.amax(1, keepdim=True) if like.shape[1] == 1 else largest


def pad_rows(attention: Tensor, rows: int) -> Tensor:
    """`attention [batch, heads, n, tokens]` with `rows` rows; scores of 0 change no maximum."""
    return torch.nn.functional.pad(attention, (0, 0, 0, rows - attention.shape[2]))


def _over(tensors: Sequence[Tensor], reduce: Any) -> Tensor:
    """One head from the heads of all layers."""
    return reduce(torch.cat([each.to(tensors[0].device) for each in tensors], dim=1), dim=1, keepdim=True)


@hookimpl
def cachequant_strategies() -> list[type[AdaptiveStrategy]]:
    """Offer `qaq`."""
    return [QAQ]
