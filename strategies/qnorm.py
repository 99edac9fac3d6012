"""Q-Norm, from the early versions of KVQuant (https://arxiv.org/abs/2401.18079), for any strategy.

Few levels shrink what they encode: decoded numbers vary less than the original ones. Q-Norm decodes with levels moved
and stretched so that mean and deviation are those of a calibration text. Encoding stays as it was, and it costs two
numbers per layer and side. It is neither QK-norm, a layer of some models, nor QAQ's norm of queries.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator
from torch import Tensor

from .. import registry
from ..core import CacheQuantizer, Format, LayerFormat, LayerSpec, MixedFormat, Side, Strategy, Tables
from ..core.calibration import CalibratedStrategy, Recipe, Statistics, normalised_tables
from ..registry.hookspecs import hookimpl


def _parsed(base: Any) -> Any:
    return registry.parse(base) if isinstance(base, str) else base


Base = Annotated[Strategy, BeforeValidator(_parsed), PlainSerializer(registry.spec)]


class QNorm(CalibratedStrategy):
    """Another strategy, decoding with the mean and deviation of the calibration text."""

    name: ClassVar[str] = "qnorm"
    variants: ClassVar[tuple[dict[str, Any], ...]] = (
        {"base": "uniform:bits=2"},
        {"base": "kvquant", "bits": 2},
    )
    searchable: ClassVar[Mapping[str, Sequence[Any]]] = {
        "base": (
            "uniform",
            "uniform:rotation=hadamard",
            "uniform:key_scale=channel,key_rope=pre",
            "kvquant",
            "kvquant:outliers=0.0",
        ),
        "bits": (2, 3, 4),
    }

    base: Base = Field(default="kvquant", validate_default=True, description="The strategy, or its spec.")
    bits: Literal[2, 3, 4, 8] | None = Field(default=None, description="Bits of the base; None: as the base has them.")

    @model_validator(mode="before")
    @classmethod
    def _settle_the_base(cls, given: dict[str, Any]) -> dict[str, Any]:
        """`bits` become the base's, and its calibration becomes ours."""
        given = {"base": "kvquant", **given}
        base = _parsed(given["base"])
        if not isinstance(base, Strategy):
            raise ValueError(f"base={base!r} is no strategy; give a spec such as 'uniform:bits=2', or a strategy")
        settings = {name: getattr(base, name) for name in type(base).model_fields}
        if given.get("bits") is not None:
            if "bits" not in settings:
                raise ValueError(f"bits={given['bits']}: the base {base.name!r} has no bits; leave them unset")
            settings["bits"] = given["bits"]
        if isinstance(base, CalibratedStrategy):
            given = {"calibration": base.calibration, **given}
            settings["calibration"] = None
        return {**given, "base": type(base)(**settings)}

    @model_validator(mode="after")
    def _base_leaves_decoding_to_us(self) -> "QNorm":
        if isinstance(self.base, QNorm) or getattr(self.base, "q_norm", False):
            raise ValueError(f"the base {registry.spec(self.base)!r} applies Q-Norm already; use it as it is")
        return self

    def cache_options(self) -> dict[str, Any]:
        """Those of the base."""
        return self.base.cache_options()

    def recipe(self) -> Recipe:
        """What the base needs; its densities serve Q-Norm too."""
        return self.base.recipe() if isinstance(self.base, CalibratedStrategy) else Recipe()

    def formats(self, layer: LayerSpec) -> LayerFormat | None:
        """Those of the base, whose codes have to stand for levels on a grid."""
        formats = self._base().formats(layer)
        if isinstance(formats, MixedFormat):
            raise ValueError(
                f"Q-Norm moves the levels of a width; tokens of {registry.spec(self.base)!r} have widths of their own"
            )
        for fmt in () if formats is None else (formats.key, formats.value):
            if fmt.codes in ("custom", "float8") or fmt.unit != "range":
                own = f"codes={fmt.codes!r}" if fmt.unit == "range" else f"levels in units of {fmt.unit!r}"
                raise ValueError(
                    f"Q-Norm moves levels of affine grids and codebooks within a range; {registry.spec(self.base)!r} "
                    f"has {own}"
                )
            if fmt.scale == "static" and not isinstance(self.base, CalibratedStrategy):
                raise ValueError(
                    f"Q-Norm needs the ranges behind the static scales of {registry.spec(self.base)!r}; "
                    "derive it from CalibratedStrategy"
                )
        return formats

    def fit(self, layer: LayerSpec, side: Side, fmt: Format, statistics: Statistics) -> Tables:
        """The tables of a calibrated base, normalised."""
        assert isinstance(self.base, CalibratedStrategy)  # see `tables`
        return normalised_tables(statistics, fmt, self.base.fit(layer, side, fmt, statistics))

    def tables(self, layer: LayerSpec, side: Side, first: Tensor, valid: Tensor | None) -> Tables:
        """The tables of the base, normalised."""
        if isinstance(self.base, CalibratedStrategy):
            return super().tables(layer, side, first, valid)
        formats = self.formats(layer)
        assert formats is not None  # tables are asked for packed layers only
        tables = self.base.tables(layer, side, first, valid)
        return normalised_tables(self.statistics(layer, side, first, valid), getattr(formats, side), tables)

    def encode(
        self, states: Tensor, fmt: Format, side: Side, block: int, valid: Tensor | None, tables: Tables
    ) -> dict[str, Tensor]:
        """As the base."""
        return self.base.encode(states, fmt, side, block, valid, tables)

    def _base(self) -> CacheQuantizer:
        """The base, fitted to the prompt if we are: its formats may differ then."""
        if isinstance(self.base, CalibratedStrategy) and self.calibration == "prompt":
            return self.base.with_calibration("prompt")
        return self.base


@hookimpl
def cachequant_strategies() -> list[type[CalibratedStrategy]]:
    """Offer `qnorm`."""
    return [QNorm]
