"""Running a model over a text to measure what a strategy has to know."""

import hashlib
import inspect
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ...kernels.format import MixedFormat, Side
from ...kernels.quantize import NO_TABLES, normalise
from ..adaptive import AdaptiveStrategy
from ..calibration.artifact import Calibration, Evidence, LayerRecord, Record, digest_of, view
from ..calibration.resume import Unfinished
from ..calibration.statistics import Density, Extremes, Largest, Statistics, static_grid
from .attach import attention_modules, detach, is_attached
from .cache import PackedCache
from .compat import computes_on
from .identity import identify
from .layer import SIDES, PackedLayer
from .split import split_heads
from .taps import TapCache, TapLayer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..calibration.strategy import CalibratedStrategy

EVIDENCE_CHUNK = 32
"""Tokens per pass in which held-out text is read through the packed cache."""

Place = tuple[int, Side]
Observe = Callable[[TapLayer, Side, Tensor, Tensor | None], None]
Report = Callable[[str, int, int], None]


def calibrate(
    strategy: "CalibratedStrategy",
    model: PreTrainedModel,
    tokenizer: "PreTrainedTokenizerBase | None",
    texts: str | Sequence[str] | Tensor,
    *,
    samples: int = 16,
    length: int | None = None,
    heldout: int = 1,
    folder: str | Path | None = None,
    report: Report | None = None,
) -> Calibration:
    """Measure what `strategy` asks for on `samples` windows of `length` tokens.

    One pass finds the channel ranges of static grids and query norms, as far as they are wanted; another the densities,
    if the formats have any, with Fisher information by a backward pass where the recipe asks for gradients. Memory is
    that of the model on one window, plus the statistics, which do not grow with the text except for ranges,
    `recipe.outliers` of all keys, and query norms, a number per query and head for those beyond the quantile.

    tokenizer, texts: texts are joined by blank lines. Windows are spread evenly and do not overlap; each begins as the
        tokenizer begins a text. Or token ids `[windows, length]`, tokenizer None.
    samples, length: 16 windows of 2048 tokens by default (the paper's), or as many as the model takes.
    heldout: further windows, from the end of the text, on which perplexity is measured with and without the cache.
    folder: where intermediate results go, so that an interrupted calibration resumes at the window where it stopped.
    report: called with `(pass, windows done, windows)`.

    Raises ValueError for a text that is too short, states that are not finite, and a layer that is given no gradient or
    does not show its queries; and for a model whose heads are split over processes.
    """
    if split_heads(model, attention_modules(model)):
        raise ValueError(
            f"the heads of this {type(model).__name__} are split over processes, none of which sees all of them. "
            "Calibrate it in one process, with device_map where one device is too small, and load the result here"
        )
    windows, rest = cut(model, tokenizer, texts, samples, length, heldout)
    strategy = strategy.with_calibration(None)
    unfinished = Unfinished(folder)
    with _undisturbed(model):
        gathering = _Gathering(strategy, model, windows, unfinished, report or _silent)
        statistics, seconds = gathering.run()
        evidence = Evidence(
            windows=len(windows),
            length=windows.shape[1],
            windows_sha256=digest_of(windows),
            seconds=round(seconds, 3),
            versions={
                "python": platform.python_version(), "torch": torch.__version__,
                "transformers": version("transformers"),
            },
        )  # fmt: skip
        record = Record(
            strategy=strategy.name,
            settings=strategy.model_dump(mode="json", exclude={"calibration"}),
            recipe=strategy.recipe(),
            model=identify(model),
            layers=gathering.layers,
            evidence=evidence,
        )
        calibration = Calibration(record, statistics)
        if len(rest):
            measured = _perplexities(model, strategy.with_calibration(calibration), rest, report or _silent)
            record = record.model_copy(update={"evidence": evidence.model_copy(update=measured)})
            calibration = Calibration(record, statistics)
    unfinished.remove()
    return calibration


def cut(
    model: PreTrainedModel,
    tokenizer: "PreTrainedTokenizerBase | None",
    texts: str | Sequence[str] | Tensor,
    samples: int,
    length: int | None,
    heldout: int,
) -> tuple[Tensor, Tensor]:
    """Token ids `[samples, length]` to calibrate on, and `[heldout, length]` to measure on.

    Raises ValueError, saying what would fit, when the text is too short or the windows are longer than the model takes.
    """
    if samples < 1 or heldout < 0:
        raise ValueError(f"samples={samples} must be at least 1 and heldout={heldout} at least 0")
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2**20
    if isinstance(texts, Tensor):
        if texts.ndim != 2 or len(texts) < samples + heldout or texts.is_floating_point():
            raise ValueError(
                f"token ids must be [windows, length] integers with at least samples + heldout = {samples + heldout} "
                f"windows, got {texts.dtype} {tuple(texts.shape)}"
            )
        windows = texts[: samples + heldout, :length]
        _fitting(windows.shape[1], context)
        windows = windows.long()
        return windows[:samples], windows[samples:]
    if tokenizer is None:
        raise ValueError("texts need a tokenizer; give one, or token ids [windows, length]")
    length = _fitting(min(2048, context) if length is None else length, context)
    text = texts if isinstance(texts, str) else "\n\n".join(texts)
    begin = list(tokenizer("", add_special_tokens=True).input_ids)
    if begin and tokenizer.eos_token_id is not None and begin[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:
        begin = begin[:-1]
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    taken = length - len(begin)
    needed = (samples + heldout) * taken
    if len(ids) < needed:
        fitting = len(ids) // taken - heldout
        remedy = f"use at most {fitting} samples" if fitting > 0 else "use shorter windows"
        raise ValueError(
            f"the text has {len(ids)} tokens; {samples} windows of {length} and {heldout} held out need {needed}. "
            f"Give a longer text, or {remedy}"
        )
    last = len(ids) - heldout * taken
    starts = [i * (last - taken) // max(1, samples - 1) for i in range(samples)]
    starts += [last + i * taken for i in range(heldout)]
    windows = torch.tensor([begin + ids[at : at + taken] for at in starts])
    return windows[:samples], windows[samples:]


def _fitting(length: int, context: int) -> int:
    if not 2 <= length <= context:
        raise ValueError(f"windows of {length} tokens: use 2 to {context}, the model's context")
    return length


class _Gathering:
    """The passes over the windows, and what they have gathered."""

    def __init__(
        self,
        strategy: "CalibratedStrategy",
        model: PreTrainedModel,
        windows: Tensor,
        unfinished: Unfinished,
        report: Report,
    ) -> None:
        self.layers: dict[int, LayerRecord] = {}
        self._strategy, self._model, self._windows = strategy, model, windows
        self._skips_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._recipe = strategy.recipe()
        self._unfinished, self._report = unfinished, report
        self._job = _hash_of(strategy, model, windows)
        if windows.shape[1] <= self._recipe.sink_tokens:
            raise ValueError(
                f"windows of {windows.shape[1]} tokens are all sinks with sink_tokens={self._recipe.sink_tokens}; "
                "use longer windows"
            )
        self._extremes: dict[Place, Extremes] = {}
        self._ranges: dict[Place, tuple[Tensor, Tensor]] = {}
        self._densities: dict[Place, Density] = {}
        self._fisher: dict[Place, Tensor] = {}
        self._norms: dict[Place, Largest] = {}
        self._pass, self._done = 0, 0
        self._seconds = 0.0
        """Of earlier runs that were interrupted."""

    def run(self) -> tuple[dict[int, dict[Side, Statistics]], float]:
        """Both passes, from where an earlier run stopped; the statistics and the seconds they took."""
        earlier = self._unfinished.load(self._job)
        if earlier is not None:
            self._restore(*earlier)
        self._start = time.perf_counter() - self._seconds
        clean = True
        try:
            for number, (name, observe, gradients) in enumerate(self._passes()):
                if number < self._pass:
                    continue
                self._report(name, self._done, len(self._windows))
                while self._done < len(self._windows):
                    clean = False
                    self._run_window(observe, gradients)
                    self._done += 1
                    clean = True
                    self._unfinished.save(self._job, self._state(), self._tensors())
                    self._report(name, self._done, len(self._windows))
                    if observe == self._observe_ranges and not self._extremes and not self._norms:
                        break  # all grids are online, and queries of no interest
                self._ranges.update({place: extremes.bounds() for place, extremes in self._extremes.items()})
                self._extremes = {}
                self._pass, self._done = number + 1, 0
            # what follows, measuring perplexity, may be interrupted too
            self._unfinished.save(self._job, self._state(), self._tensors(), now=True)
        except BaseException:
            if clean:  # else half a window is counted: what was saved last stands
                self._unfinished.save(self._job, self._state(), self._tensors(), now=True)
            raise
        return self._statistics(), time.perf_counter() - self._start

    def _passes(self) -> Iterator[tuple[str, Observe, bool]]:
        """Name, what observes, and whether it takes gradients; the first pass shows what is left for the second."""
        yield "ranges" if self._recipe.query_quantile is None else "query norms", self._observe_ranges, False
        if any(any(record.views.values()) for record in self.layers.values()):
            yield "densities", self._observe_density, self._recipe.gradients

    def _run_window(self, observe: Observe, gradients: bool) -> None:
        """One window through the model; `observe` sees every side that the strategy packs."""
        # cloned: what was made in inference mode cannot be kept for a backward pass
        ids = self._windows[self._done : self._done + 1].to(computes_on(self._model)).clone()
        seen: set[Place] = set()
        squares: dict[int, list[Tensor]] = {}

        def tap(layer: TapLayer, side: Side, states: Tensor, gradient: Tensor | None) -> None:
            seen.add((layer.index, side))
            if isinstance(layer.formats, MixedFormat):
                self._note(layer)
                return
            fmt = getattr(layer.formats, side)
            if fmt.codes == "exact":
                return
            if not fmt.packed:
                raise ValueError(f"{fmt.codes!r} codes of the {side}s of layer {layer.index} cannot be calibrated")
            for what, tensor in (("states", states), ("gradients", gradient)):
                if tensor is not None and not tensor.isfinite().all():
                    raise ValueError(
                        f"layer {layer.index}: the {what} of the {side}s are not finite in window {self._done}. "
                        f"The model computes in {states.dtype}; try bfloat16 or float32, or another text"
                    )
            self._note(layer)
            observe(layer, side, states, gradient)

        def tap_query(layer: TapLayer, query: Tensor) -> None:
            rows = query[..., self._recipe.sink_tokens :, :].square().sum(-1).float()
            squares.setdefault(layer.index, []).append(rows.transpose(0, 1).flatten(1))

        asked = observe == self._observe_ranges and self._recipe.query_quantile is not None
        tapped = tap_query if asked else None
        cache = TapCache(self._model, self._strategy, tap, gradients=gradients, observe_query=tapped)
        if not cache.packed_layers:
            raise ValueError(f"{type(self._model).__name__} has no full-attention layer: nothing to calibrate")
        with torch.set_grad_enabled(gradients):
            # without a loss, logits are of no use
            unused = {} if gradients or not self._skips_logits else {"logits_to_keep": 1}
            logits = self._model(ids, past_key_values=cache, use_cache=True, **unused).logits
            if gradients:
                # the sum, not the mean: small gradients vanish in half precision, and only their ratios count
                torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum").backward()
        missing = [layer.index for layer in cache.packed_layers if (layer.index, "key") not in seen]
        if missing:
            raise ValueError(
                f"layers {missing} showed no keys{' and gradients' if gradients else ''}. With gradient checkpointing "
                "models run without their cache: call model.gradient_checkpointing_disable()"
            )
        if asked:
            self._add_norms(squares)

    def _add_norms(self, squares: dict[int, list[Tensor]]) -> None:
        """Take the squared norms of one window into account, `[kv_heads, n]` in parts by layer."""
        missing = [index for index in self.layers if index not in squares]
        if missing:
            raise ValueError(
                f"layers {missing} of {type(self._model).__name__} showed no queries: their keys are used before "
                "attention is called, as in multi-head latent attention. Use a strategy that needs no query norms"
            )
        for index in self.layers:
            rows = torch.cat(squares[index], -1)
            if not rows.isfinite().all():
                raise ValueError(
                    f"layer {index}: the queries are not finite in window {self._done}. The model computes in "
                    f"{self._model.dtype}; try bfloat16 or float32, or another text"
                )
            if (index, "key") not in self._norms:
                numbers = len(self._windows) * rows.shape[-1]
                self._norms[index, "key"] = Largest(numbers, self._beyond())
            self._norms[index, "key"].add(rows)

    def _observe_ranges(self, layer: TapLayer, side: Side, states: Tensor, gradient: Tensor | None) -> None:
        skipped = 0 if self._recipe.ranges_include_sinks else self._recipe.sink_tokens
        if getattr(layer.formats, side).scale == "static":
            place = (layer.index, side)
            if place not in self._extremes:
                self._extremes[place] = Extremes(self._range_tokens(), self._recipe.outliers)
            self._extremes[place].add(states[:, :, skipped:])

    def _observe_density(self, layer: TapLayer, side: Side, states: Tensor, gradient: Tensor | None) -> None:
        fmt, block = getattr(layer.formats, side), layer.formats.block
        if fmt.scale != "channel" and not fmt.trim:
            block = states.shape[2]  # every token stands for itself
        whole = states.shape[2] // block * block
        states = states[:, :, :whole]
        valid = torch.arange(whole, device=states.device)[None] >= self._recipe.sink_tokens
        place = (layer.index, side)
        tables = static_grid(*self._ranges[place], fmt).to(states.device) if fmt.scale == "static" else NO_TABLES
        normalised, width = normalise(states, fmt, side, block, valid, tables)
        fisher = None if gradient is None else gradient[:, :, :whole].float().square()
        if fisher is not None:
            channels = (fisher * valid[:, None, :, None]).sum((0, 2), dtype=torch.float64).cpu()
            self._fisher[place] = self._fisher.get(place, 0) + channels
        self._densities.setdefault(place, Density()).add(normalised, width, valid[:, None, :, None], fisher)

    def _note(self, layer: TapLayer) -> None:
        if layer.index in self.layers:
            return
        if isinstance(layer.formats, MixedFormat):
            if self._recipe.query_quantile is None:
                raise ValueError(
                    f"layer {layer.index}: of tokens that have widths of their own only query norms can be measured, "
                    f"which the recipe of {self._strategy.name!r} does not ask for"
                )
            views: dict[Side, dict[str, Any]] = {"key": view(layer.formats, "key")}
        else:
            views = {side: view(layer.formats, side) for side in SIDES if getattr(layer.formats, side).codes != "exact"}
            block, tokens = layer.formats.block, self._windows.shape[1]
            if tokens < block:
                raise ValueError(f"windows of {tokens} tokens are shorter than a block of {block}; use longer ones")
            if tokens // block * block <= self._recipe.sink_tokens:
                raise ValueError(
                    f"whole blocks of {block} in windows of {tokens} tokens are all sinks with "
                    f"sink_tokens={self._recipe.sink_tokens}; use longer windows"
                )
        self.layers[layer.index] = LayerRecord(shape=layer.spec, views=views)

    def _statistics(self) -> dict[int, dict[Side, Statistics]]:
        found: dict[int, dict[Side, Statistics]] = {}
        for place in sorted({*self._densities, *self._norms}):
            index, side = place
            density, norms, fisher = self._densities.get(place), self._norms.get(place), self._fisher.get(place)
            low, high = self._ranges.get(place, (None, None))
            found.setdefault(index, {})[side] = Statistics(
                None if density is None else density.mass.float(),
                None if low is None else low.cpu(),
                None if high is None else high.cpu(),
                None if fisher is None else (fisher / fisher.max().clamp(min=1e-300)).sqrt().float(),
                None if norms is None else norms.quantile().cpu(),
            )
        return found

    # ---- resuming --------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {
            "pass": self._pass,
            "done": self._done,
            "seconds": time.perf_counter() - self._start,
            "layers": {index: record.model_dump(mode="json") for index, record in self.layers.items()},
        }

    def _tensors(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for kind, pairs in (
            ("extremes", {place: extremes.kept for place, extremes in self._extremes.items()}),
            ("range", self._ranges),
            ("norms", {place: (norms.kept, torch.tensor(norms.numbers)) for place, norms in self._norms.items()}),
        ):
            for (index, side), pair in pairs.items():
                for number, tensor in enumerate(pair or ()):
                    assert tensor is not None  # nothing is made before it is added to
                    named[f"{index}.{side}.{kind}.{number}"] = tensor
        named.update({f"{index}.{side}.density": density.mass for (index, side), density in self._densities.items()})
        named.update({f"{index}.{side}.fisher": fisher for (index, side), fisher in self._fisher.items()})
        return named

    def _restore(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self._pass, self._done, self._seconds = state["pass"], state["done"], state["seconds"]
        self.layers = {int(index): LayerRecord.model_validate(record) for index, record in state["layers"].items()}
        for name, tensor in tensors.items():
            index, side, kind, *number = name.split(".")
            place: Any = (int(index), side)
            if kind == "density":
                self._densities[place] = Density(tensor)
            elif kind == "fisher":
                self._fisher[place] = tensor
            elif number == ["0"]:
                pair = (tensor, tensors[f"{index}.{side}.{kind}.1"])
                if kind == "range":
                    self._ranges[place] = pair
                elif kind == "norms":
                    self._norms[place] = Largest(int(pair[1]), self._beyond(), tensor)
                else:
                    self._extremes[place] = Extremes(self._range_tokens(), self._recipe.outliers, pair)

    def _range_tokens(self) -> int:
        skipped = 0 if self._recipe.ranges_include_sinks else self._recipe.sink_tokens
        return len(self._windows) * (self._windows.shape[1] - skipped)

    def _beyond(self) -> float:
        """The share of query norms above the quantile."""
        assert self._recipe.query_quantile is not None  # called where it is asked for
        return 1 - self._recipe.query_quantile


def _hash_of(strategy: "CalibratedStrategy", model: PreTrainedModel, windows: Tensor) -> str:
    """Of all that decides what is gathered."""
    settings = strategy.model_dump_json(exclude={"calibration"})
    text = json.dumps([strategy.name, settings, identify(model), digest_of(windows)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@torch.inference_mode()
def _perplexities(
    model: PreTrainedModel, strategy: "CalibratedStrategy", windows: Tensor, report: Report
) -> dict[str, Any]:
    """What `Evidence` says of held-out windows `[n, length]`."""
    exact = quantized = 0.0
    residual = packs_read = 0
    for done, row in enumerate(windows):
        report("evidence", done, len(windows))
        ids = row[None].to(computes_on(model))
        exact += _loss(model, ids, DynamicCache(config=model.config), ids.shape[1])
        cache = PackedCache(model, strategy)
        quantized += _loss(model, ids, cache, EVIDENCE_CHUNK)
        residual = cache.options.residual_length
        together = max(map(_packed_together, cache.packed_layers))
        packs_read = max(0, ids.shape[1] - EVIDENCE_CHUNK - residual) // together
    report("evidence", len(windows), len(windows))
    tokens = windows.numel() - len(windows)
    return {
        "perplexity_exact": math.exp(exact / tokens),
        # windows so short that nothing packed is read show nothing
        "perplexity": math.exp(quantized / tokens) if packs_read else None,
        "heldout_tokens": tokens,
        "residual_length": residual,
    }


def _packed_together(layer: PackedLayer) -> int:
    """How many tokens leave the exact tail at a time."""
    return layer.strategy.interval if isinstance(layer.strategy, AdaptiveStrategy) else layer.formats.block


def _loss(model: PreTrainedModel, ids: Tensor, cache: Any, chunk: int) -> float:
    """Of all tokens but the first, read in passes of `chunk` tokens."""
    total = 0.0
    for start in range(0, ids.shape[1], chunk):
        logits = model(ids[:, start : start + chunk], past_key_values=cache, use_cache=True).logits[0].float()
        targets = ids[0, start + 1 : start + chunk + 1]
        total += float(torch.nn.functional.cross_entropy(logits[: len(targets)], targets, reduction="sum"))
    return total


@contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and frozen parameters while this is open; afterwards the model is as it was."""
    attached, training = is_attached(model), {module: module.training for module in model.modules()}
    frozen = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        with torch.inference_mode(False):
            yield
    finally:
        for parameter, wanted in frozen.items():
            parameter.requires_grad_(wanted)
        for module, mode in training.items():
            module.training = mode
        if not attached:
            detach(model)


def _silent(name: str, done: int, windows: int) -> None:
    pass
