"""The base of strategies that learn from a text before they are used."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import torch
from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer
from torch import Tensor

from ...kernels.format import Format, LayerFormat, MixedFormat, Side
from ...kernels.quantize import Tables, normalise
from ..protocol import LayerSpec, Strategy
from .artifact import Calibration, Recipe, view
from .statistics import Density, Statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# fewer say nothing about what follows: codebooks are NormalFloat then
PROMPT_TOKENS = 16


def _read(value: Any) -> Any:
    return Calibration.load(value) if isinstance(value, str | os.PathLike) and value != "prompt" else value


def _write(value: Any) -> Any:
    return value.describe() if isinstance(value, Calibration) else value


Source = Annotated[
    Calibration | Literal["prompt"] | None,
    BeforeValidator(_read),
    PlainSerializer(_write, when_used="json"),
]


class CalibratedStrategy(Strategy):
    """Base of strategies whose tables are fitted to statistics of a model.

    Subclasses declare fields, write `formats`, and turn statistics into tables in `fit`. They are used calibrated::

        strategy = registry.get("kvquant")(bits=3).calibrate(model, tokenizer, texts)
        strategy.save_pretrained("llama-kvquant")
        strategy = registry.get("kvquant").from_pretrained("llama-kvquant")
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    calibration: Source = Field(
        default=None,
        description="Folder or hub id that `cachequant calibrate` filled; or prompt: fit to the first block packed.",
    )

    # ---- what a subclass writes ------------------------------------------------------------------------------------

    def recipe(self) -> Recipe:
        """What has to be measured; without gradients and outliers by default."""
        return Recipe()

    def fit(self, layer: LayerSpec, side: Side, fmt: Format, statistics: Statistics) -> Tables:
        """The tables of one side of one layer."""
        raise NotImplementedError(f"strategy {self.name!r} must define fit(layer, side, fmt, statistics)")

    def needs_statistics(self) -> bool:
        """Whether these settings are fitted to anything; if not, the strategy works without a calibration."""
        return True

    # ---- calibrating, saving, loading ------------------------------------------------------------------------------

    @property
    def learns(self) -> bool:
        """Whether a calibration is of use: what these settings cannot do without, or query norms."""
        return self.needs_statistics() or self.recipe().query_quantile is not None

    @property
    def calibrated(self) -> bool:
        """Whether the strategy can be used as it is: calibrated, fitting itself to the prompt, or fitted to nothing."""
        return self.calibration is not None or not self.needs_statistics()

    def calibrate(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase | None",
        texts: "str | Sequence[str] | Tensor",
        **options: Any,
    ) -> Self:
        """The same strategy, calibrated for `model`; see `core.hf.calibrate.calibrate` for `options` and errors.

        texts: one text or several, or token ids `[windows, length]`, for which no tokenizer is needed.
        """
        from ..hf.calibrate import calibrate

        return self.with_calibration(calibrate(self, model, tokenizer, texts, **options))

    def with_calibration(self, calibration: Calibration | Literal["prompt"] | None) -> Self:
        """The same settings with another calibration."""
        return type(self)(**{**self._given(), "calibration": calibration})

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **settings: Any) -> Self:
        """The strategy whose calibration lies in a folder or a hub repository, ready to use.

        settings: fields to change, such as `bits`. Those that the calibration depends on are refused when used.
        """
        if "calibration" in settings:
            raise ValueError(f"the calibration comes from {source}; construct the strategy to use another")
        calibration = Calibration.load(source)
        record = calibration.record
        if record.strategy != cls.name:
            raise ValueError(f"{source} holds a calibration of {record.strategy!r}, not of {cls.name!r}")
        return cls(**{**record.settings, **settings, "calibration": calibration})

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Self:
        """Write calibration and settings to `folder`; returns the strategy as read from there."""
        calibration = self._fitted_calibration()
        settings = self.model_dump(mode="json", exclude={"calibration"})
        record = calibration.record.model_copy(update={"strategy": self.name, "settings": settings})
        return self.with_calibration(Calibration(record, calibration.statistics).save(folder))

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes; `options` go to `HfApi.create_repo`. Returns the commit's address."""
        from tempfile import TemporaryDirectory

        from huggingface_hub import HfApi

        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api = HfApi(token=options.pop("token", None))
            api.create_repo(repo_id, exist_ok=True, **options)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder))

    def describe(self) -> dict[str, Any]:
        """The calibration by its contents, so that a cache outlives the folder's name."""
        digest = self.calibration.digest if isinstance(self.calibration, Calibration) else self.calibration
        return {**super().describe(), "calibration": digest}

    # ---- what the cache calls --------------------------------------------------------------------------------------

    def require_model(self, model: "PreTrainedModel") -> None:
        """Raise ValueError unless calibrated, for this model and these settings."""
        if self.calibration == "prompt" or (self.calibration is None and self.calibrated):
            return
        record = self._fitted_calibration().record
        from ..hf.identity import differences

        differing = differences(record.model, model)
        if differing:
            raise ValueError(
                f"{self.name}: the calibration {self._place()} is of another model: {'; '.join(differing)}. "
                "Calibrate for this one"
            )
        for layer in record.layers.values():
            formats = self.formats(layer.shape)
            if formats is not None:
                for side in layer.views:
                    self._suitable(layer.shape, side, formats)

    def tables(self, layer: LayerSpec, side: Side, first: Tensor, valid: Tensor | None) -> Tables:
        """Fitted to the calibration, or to `first` with `calibration="prompt"`."""
        if isinstance(self.calibration, Calibration):
            return _calibrated_tables(self, layer, side)  # type: ignore[arg-type] (frozen models hash)
        formats = self.formats(layer)
        assert formats is not None  # tables are asked for packed layers only
        return self.fit(layer, side, getattr(formats, side), self.statistics(layer, side, first, valid))

    def statistics(self, layer: LayerSpec, side: Side, first: Tensor, valid: Tensor | None) -> Statistics:
        """Of the calibration, or of `first` with `calibration="prompt"`; empty where few of its tokens are real.

        Raises ValueError where the calibration was made for other settings.
        """
        formats = self.formats(layer)
        assert formats is not None  # tables are asked for packed layers only
        if self.calibration is None and self.calibrated:
            return Statistics(Density().mass.float())
        if self.calibration != "prompt":
            return self._suitable(layer, side, formats)
        assert isinstance(formats, LayerFormat)  # rows of mixed widths have no tables
        fmt: Format = getattr(formats, side)
        normalised, width = normalise(first, fmt, side, formats.block, valid)
        keep = torch.ones_like(normalised, dtype=torch.bool)
        if valid is not None:
            keep &= valid[:, None, :, None]
        density = Density()
        if valid is None or int(valid.sum()) >= PROMPT_TOKENS:
            density.add(normalised, width, keep)
        return Statistics(density.mass.float())

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _given(self) -> dict[str, Any]:
        """The fields as they are, nested strategies and calibrations not taken apart."""
        return {name: getattr(self, name) for name in type(self).model_fields}

    def _place(self) -> str:
        source = self.calibration.source if isinstance(self.calibration, Calibration) else None
        return f"in {source}" if source else "given"

    def _fitted_calibration(self) -> Calibration:
        if isinstance(self.calibration, Calibration):
            return self.calibration
        raise ValueError(
            f"{self.name} is not calibrated. Calibrate it once for your model, with\n"
            f"  cachequant calibrate {self.name} --model PATH --text FILE --out DIR\n"
            f"or strategy.calibrate(model, tokenizer, texts), and use "
            f"registry.get({self.name!r}).from_pretrained('DIR'). "
            "Without a text, calibration='prompt' fits the first block of each prompt, knowing no gradients"
        )

    def _suitable(self, layer: LayerSpec, side: Side, formats: LayerFormat | MixedFormat) -> Statistics:
        """The statistics of one side; raises ValueError where they were measured for other settings."""
        calibration = self._fitted_calibration()
        record = calibration.record
        if layer.index not in record.layers:
            raise ValueError(f"{self.name}: the calibration {self._place()} lacks layer {layer.index}; calibrate again")
        measured, wanted = record.layers[layer.index], self.recipe()
        if record.recipe.gradients:
            wanted = wanted.model_copy(update={"gradients": True})  # what was weighted can be read unweighted
        differing = [
            *_differing("", asdict(measured.shape), asdict(layer)),
            *_differing("", record.recipe.model_dump(), wanted.model_dump()),
            *_differing(f"{side} ", measured.views.get(side, {}), view(formats, side)),
        ]
        if differing:
            raise ValueError(
                f"{self.name}: the calibration {self._place()} does not fit these settings: {'; '.join(differing)}. "
                "Use the settings of the calibration (from_pretrained does), or calibrate again"
            )
        return calibration.of(layer.index, side)


def _differing(prefix: str, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [f"{prefix}{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names]


@lru_cache(maxsize=4096)
def _calibrated_tables(strategy: CalibratedStrategy, layer: LayerSpec, side: Side) -> Tables:
    formats = strategy.formats(layer)
    assert formats is not None  # tables are asked for packed layers only
    statistics = strategy._suitable(layer, side, formats)
    return strategy.fit(layer, side, getattr(formats, side), statistics)
