"""What competes on a leaderboard: every strategy, and the caches of transformers that users have today."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from transformers import Cache, DynamicCache, QuantizedCache
from transformers.utils.import_utils import is_hqq_available, is_optimum_quanto_available

from .. import registry
from ..core import PackedCache
from ..registry import descriptions, specs
from .calibration import CalibrationCard, uncalibrated

if TYPE_CHECKING:
    from .subjects import Panel


class Baseline(BaseModel):
    """A cache of transformers. Specs name it by its class, which no strategy can be called."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]

    def cache(self, model: Any, residual_length: int) -> Cache:
        """An empty one."""
        raise NotImplementedError

    def versions(self) -> dict[str, str]:
        """Of the libraries it needs besides transformers."""
        return {}


class Exact(Baseline):
    """What every model uses by default."""

    name: ClassVar[str] = "DynamicCache"

    def cache(self, model: Any, residual_length: int) -> Cache:
        """See `Baseline`."""
        return DynamicCache(config=model.config)


class Quantized(Baseline):
    """The quantized cache of transformers, over one of its two backends."""

    name: ClassVar[str] = "QuantizedCache"

    backend: Literal["quanto", "hqq"] = Field(description="Library that packs.")
    nbits: Literal[2, 4, 8] = Field(description="Bits per number; quanto has 2 and 4.")
    group_size: int = Field(default=64, ge=1, description="Numbers that share a scale.")

    def cache(self, model: Any, residual_length: int) -> Cache:
        """See `Baseline`; raises ImportError where the backend is not installed."""
        if not BACKENDS[self.backend]():
            raise ImportError(
                f"backend={self.backend} needs {PACKAGES[self.backend]}, which is not installed; "
                f'pip install "cachequant[{self.backend}]"'
            )
        return QuantizedCache(
            self.backend,
            model.config,
            nbits=self.nbits,
            q_group_size=self.group_size,
            residual_length=max(1, residual_length),
        )

    def versions(self) -> dict[str, str]:
        """See `Baseline`; nothing where it is not installed."""
        return {self.backend: version(PACKAGES[self.backend])} if BACKENDS[self.backend]() else {}


PACKAGES = {"quanto": "optimum-quanto", "hqq": "hqq"}
BACKENDS: dict[str, Callable[[], bool]] = {"quanto": is_optimum_quanto_available, "hqq": is_hqq_available}
BASELINES: dict[str, type[Baseline]] = {cls.name: cls for cls in (Exact, Quantized)}
EXACT = Exact.name


@dataclass(frozen=True)
class Contender:
    """What makes caches for one model, ready to be measured."""

    spec: str
    source: Any
    """The strategy or the baseline."""
    model: Any
    residual_length: int
    calibration: CalibrationCard | None = None
    """What the strategy has learned from, if that was for this run."""

    @property
    def strategy(self) -> Any | None:
        """None for a baseline."""
        return None if isinstance(self.source, Baseline) else self.source

    def new_cache(self, **options: Any) -> Cache:
        """An empty cache; a packed one attaches to the model. options: of `PackedCache`."""
        if isinstance(self.source, Baseline):
            return self.source.cache(self.model, options.get("residual_length", self.residual_length))
        return PackedCache(self.model, self.source, **{"residual_length": self.residual_length, **options})


@dataclass(frozen=True)
class Candidate:
    """A strategy or baseline that may turn out not to exist: plugins break in their constructors too."""

    spec: str
    build: Callable[[], Any]

    @property
    def family(self) -> str:
        """The strategy's name."""
        return self.spec.partition(":")[0]

    @property
    def baseline(self) -> bool:
        """Whether it is a cache of transformers."""
        return self.family in BASELINES

    def ready(self, panel: "Panel") -> Contender:
        """Built, and calibrated for the model of `panel` if it needs that. Raises whatever plugins raise."""
        source, card = self.build(), None
        if not isinstance(source, Baseline):
            source, card = panel.calibrator.ready(source)
        return Contender(self.spec, source, panel.model, panel.residual_length, card)


def installed() -> list[Candidate]:
    """The variants of all installed strategies."""
    return [variant(cls, settings) for cls in registry.strategies().values() for settings in cls.variants]


def baselines() -> list[Candidate]:
    """The caches of transformers that are installed."""
    found: list[Baseline] = [Exact()]
    found += [Quantized(backend=name, nbits=bits) for name in ("quanto", "hqq") if BACKENDS[name]() for bits in (4, 2)]
    return [_given(baseline) for baseline in found]


def variant(cls: Any, settings: dict[str, Any]) -> Candidate:
    """A strategy class with settings, which it need not accept."""
    try:
        strategy = cls(**settings)
    except Exception:
        # told again, and reported, when the leaderboard comes to it
        spec = ",".join(f"{name}={value}" for name, value in settings.items())
        return Candidate(f"{cls.name}:{spec}" if spec else cls.name, lambda: cls(**settings))
    return Candidate(registry.spec(strategy), lambda: strategy)


def candidates(given: Iterable[str]) -> list[Candidate]:
    """Candidates of specs like `uniform:bits=4` and `QuantizedCache:backend=hqq,nbits=2`; `all` is every strategy.

    Raises what `registry.parse` raises.
    """
    found: dict[str, Candidate] = {}
    for spec in given:
        each = installed() if spec == "all" else [candidate(spec)]
        found |= {candidate.spec: candidate for candidate in each}
    return list(found.values())


def candidate(spec: str) -> Candidate:
    """The candidate of one spec. Raises what `registry.parse` raises."""
    if spec.partition(":")[0].strip() in BASELINES:
        return _given(_baseline(spec))
    strategy = registry.parse(spec)
    return Candidate(registry.spec(strategy), lambda: strategy)


def needs_calibration(candidate: Candidate) -> bool:
    """Whether it has to be calibrated before it can be measured."""
    try:
        strategy = candidate.build()
    except Exception:
        return False  # told when the leaderboard comes to it
    return uncalibrated(strategy)


def _baseline(spec: str) -> Baseline:
    name, values = specs.split(spec)
    cls = BASELINES[name]
    for field in values:
        if field not in cls.model_fields:
            close = get_close_matches(field, cls.model_fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            allowed = ", ".join(cls.model_fields) or "no fields"
            raise ValueError(f"{name} has no field {field!r} (from {spec!r}); it takes {allowed}{hint}")
    return cls(**{field: specs.read(value, False) for field, value in values.items()})


def _given(baseline: Baseline) -> Candidate:
    spec = specs.join(baseline.name, descriptions.settings(baseline))
    return Candidate(spec, lambda: baseline)
