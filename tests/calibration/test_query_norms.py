"""A calibration measures how large queries are, for strategies that give every token a width of its own."""

import json
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from cachequant.benchmarks.calibration import CalibrationText, Calibrator
from cachequant.core import AdaptiveStrategy, Format, LayerSpec, MixedFormat, Strategy
from cachequant.core.calibration import CalibratedStrategy, Calibration, Evidence, Recipe, Record, Statistics, resume
from cachequant.core.calibration.artifact import NUMBERS, RECORD, LayerRecord
from cachequant.core.calibration.statistics import BINS, Largest
from cachequant.core.hf.attach import attention_modules, is_attached
from cachequant.core.hf.taps import TapCache
from cachequant.strategies.kvquant import KVQuant

SINKS = 3
ROWS = (Format(bits=2, grid="midpoint"), Format(bits=4, grid="midpoint"))


class Bounded(AdaptiveStrategy, CalibratedStrategy):
    """Two or four bits; `first` is the first layer that is packed."""

    name: ClassVar[str] = "bounded"

    quantile: float | None = 0.9
    first: int = 0

    def formats(self, layer: LayerSpec) -> MixedFormat | None:
        return None if layer.index < self.first else MixedFormat(key=ROWS, value=ROWS)

    def needs_statistics(self) -> bool:
        return False

    def recipe(self) -> Recipe:
        return Recipe(query_quantile=self.quantile, sink_tokens=SINKS)


class Both(KVQuant):
    """KVQuant that wants to know query norms as well."""

    name: ClassVar[str] = "both"

    def recipe(self) -> Recipe:
        return super().recipe().model_copy(update={"query_quantile": 0.9})


def measured(model: PreTrainedModel, ids: Tensor, strategy: Any = None, **options: Any) -> Calibration:
    """The calibration of `strategy` on all of `ids`."""
    options = {"samples": len(ids), "heldout": 0, **options}
    return (strategy or Bounded()).calibrate(model, None, ids, **options).calibration


def squares(model: PreTrainedModel, ids: Tensor, layers: dict[int, list[int]], scaling: float) -> dict[int, Tensor]:
    """Squared norms `[kv_heads, query heads x tokens of all windows]` of scaled queries of the stock model.

    layers: by layer that is packed, the layers whose queries read its keys.
    """
    seen: dict[int, list[Tensor]] = {}
    handles = []
    for index, module in attention_modules(model).items():
        # its output norms are those after RoPE
        projection = getattr(module, "q_norm", module.q_proj)
        keep = lambda module, arguments, output, index=index: seen.setdefault(index, []).append(output)  # noqa: E731
        handles.append(projection.register_forward_hook(keep))
    with torch.no_grad():
        for row in ids:
            model(row[None])
    for handle in handles:
        handle.remove()
    dim = attention_modules(model)[0].head_dim
    found = {}
    for packed, readers in layers.items():
        parts = []
        for output in (each for reader in readers for each in seen[reader]):
            heads = output.reshape(1, ids.shape[1], 4, dim) if output.shape[1] != 4 else output.transpose(1, 2)
            norms = (scaling * heads[0, SINKS:].double()).square().sum(-1)  # [tokens, query heads]
            parts.append(norms.T.reshape(2, -1))
        found[packed] = torch.cat(parts, -1)
    return found


def quantiles(norms: Tensor, quantile: float = 0.9) -> Tensor:
    return torch.from_numpy(np.quantile(norms.numpy(), quantile, axis=-1)).float()


# ---- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.9, 1.0])
def test_norms_are_quantiles_over_tokens_and_the_query_heads_of_a_kv_head(build, windows, quantile):
    model, ids = build(), windows(3, 40)
    expected = squares(build(), ids, {0: [0], 1: [1]}, 16**-0.5)
    calibration = measured(model, ids, Bounded(quantile=quantile))
    for index in (0, 1):
        assert expected[index].shape == (2, 3 * 2 * (40 - SINKS))
        found = calibration.of(index, "key").query_norm
        assert found.dtype == torch.float32
        assert_close(found, quantiles(expected[index], quantile), rtol=1e-5, atol=0)
    assert not is_attached(model)


@pytest.mark.parametrize(
    ("model_type", "settings", "layers", "scaling"),
    [
        ("gemma3_text", {"head_dim": 32, "query_pre_attn_scalar": 5}, {1: [1], 2: [2]}, 5**-0.5),
        ("gemma4_text", {"num_kv_shared_layers": 1, "global_head_dim": 32, "head_dim": 32}, {1: [1, 2]}, 1.0),
    ],
    ids=["scaling of the model's own", "layers that share keys"],
)
def test_norms_are_of_all_queries_that_read_a_layer_as_the_model_scales_them(
    build, windows, model_type, settings, layers, scaling
):
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    ids = windows(2, 40)
    model = build(model_type, num_hidden_layers=3, sliding_window=24, layer_types=kinds, **settings)
    expected = squares(model, ids, layers, scaling)
    calibration = measured(model, ids)
    assert set(calibration.statistics) == set(layers)
    for index, norms in expected.items():
        assert_close(calibration.of(index, "key").query_norm, quantiles(norms), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_model_in_another_dtype_gives_nearly_the_same_norms(build, windows, dtype):
    ids = windows(2, 40)
    expected, found = (measured(model, ids).of(1, "key").query_norm for model in (build(), build(dtype=dtype)))
    assert_close(found, expected, rtol=0.03 if dtype == torch.bfloat16 else 1e-5, atol=0)


def test_a_layer_of_mixed_widths_has_norms_and_nothing_else(build, windows):
    calls = []
    calibration = measured(build(), windows(2, 40), Bounded(first=1), report=lambda *call: calls.append(call))
    assert calls == [("query norms", done, 2) for done in (0, 1, 2)]
    assert {index: list(sides) for index, sides in calibration.statistics.items()} == {1: ["key"]}
    assert calibration.of(1, "key").tensors().keys() == {"query_norm"}
    assert calibration.record.layers[1].views == {"key": {}}
    with pytest.raises(ValueError, match="measured no density, which tables are fitted to: a MixedFormat has none"):
        calibration.of(1, "key").mass("equal")
    with pytest.raises(ValueError, match="no value statistics of layer 1"):
        calibration.of(1, "value")


@pytest.mark.parametrize("settings", [{}, {"key_scale": "token"}, {"weights": "equal"}], ids=str)
def test_norms_come_with_ranges_and_densities_where_formats_have_them(build, windows, settings):
    ids = windows(3, 40)
    settings = {"block": 32, "sink_tokens": SINKS, **settings}
    plain, both = (measured(build(), ids, kind(**settings)) for kind in (KVQuant, Both))
    for index, norms in squares(build(), ids, {0: [0], 1: [1]}, 16**-0.5).items():
        for side in ("key", "value"):
            a, b = plain.of(index, side).tensors(), both.of(index, side).tensors()
            if side == "key":
                assert_close(b.pop("query_norm"), quantiles(norms), rtol=1e-5, atol=0)
            assert a.keys() == b.keys()
            # the pass that sees queries goes another way through attention, which is exact all the same
            assert all(torch.equal(a[name], b[name]) for name in a)
    model = build()
    strategy = Both(**settings).with_calibration(both)
    strategy.require_model(model)
    with pytest.raises(ValueError, match=r"not fit these settings: query_quantile was None, is 0\.9"):
        strategy.with_calibration(plain).require_model(model)


def test_the_order_of_windows_does_not_matter(build, windows):
    ids = windows(4, 40)
    assert measured(build(), ids) == measured(build(), ids.flip(0))


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_model_whose_queries_are_seen_computes_what_it_computes_without(build, windows, model_type):
    kinds = ["sliding_attention", "full_attention"]
    model = build(model_type, dtype=torch.float64, head_dim=16, sliding_window=24, layer_types=kinds)
    ids, shapes = windows(2, 50), []
    with torch.no_grad():
        expected = model(ids).logits
        cache = TapCache(
            model, Bounded(), lambda *arguments: None, observe_query=lambda layer, query: shapes.append(query.shape)
        )
        assert_close(model(ids, past_key_values=cache).logits, expected, rtol=0, atol=1e-9)
    assert shapes == [(2, 2, 2, 50, 16)] * len(cache.packed_layers)


def test_only_the_numbers_beyond_the_quantile_are_kept():
    rows, largest = torch.rand(2, 5000, generator=torch.Generator().manual_seed(0)), Largest(5000, 0.1)
    for part in rows.split(700, dim=1):
        largest.add(part)
    assert largest.kept.shape == (2, 501)
    assert_close(largest.quantile(), rows.quantile(0.9, dim=1), rtol=1e-6, atol=0)


# ---- kept ------------------------------------------------------------------------------------------------------------


def test_norms_are_saved_and_read_back_equal(build, windows, tmp_path):
    model = build()
    strategy = Bounded(interval=32).calibrate(model, None, windows(2, 40), samples=2, heldout=0)
    assert strategy.calibration.digest != measured(model, windows(2, 40, seed=2)).digest
    saved = strategy.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [RECORD, NUMBERS]
    loaded = Bounded.from_pretrained(tmp_path)
    assert loaded == saved == strategy
    assert loaded.interval == 32
    first, second = (each.calibration.of(1, "key").query_norm for each in (strategy, loaded))
    assert torch.equal(first, second)
    loaded.require_model(model)
    assert loaded.calibration.record.recipe.query_quantile == 0.9


def test_a_calibration_of_another_quantile_or_model_is_refused(build, windows):
    model = build()
    strategy = Bounded().calibrate(model, None, windows(2, 40), samples=2, heldout=0)
    strategy.require_model(model)
    Bounded(interval=32, calibration=strategy.calibration).require_model(model)
    with pytest.raises(ValueError, match=r"query_quantile was 0\.9, is 0\.5"):
        Bounded(quantile=0.5, calibration=strategy.calibration).require_model(model)
    with pytest.raises(ValueError, match="is of another model"):
        strategy.require_model(build(seed=1))


def test_norms_measured_for_mixed_widths_serve_no_format_that_needs_more(build, windows):
    mixed = measured(build(), windows(2, 40), Bounded())
    strategy = KVQuant(block=32, calibration=mixed)
    with pytest.raises(ValueError, match=r"not fit these settings: .*key scale was None"):
        strategy.require_model(build())


def hand_made() -> Calibration:
    """As it could have been made before there were query norms."""
    evidence = Evidence(windows=1, length=8, windows_sha256="", seconds=0.0)
    layer = LayerRecord(shape=LayerSpec(0, 1, 2, 16, 16), views={"key": {"scale": "token"}})
    record = Record(
        strategy="any",
        settings={},
        recipe=Recipe(sink_tokens=1),
        model={"type": "any"},
        layers={0: layer},
        evidence=evidence,
    )
    return Calibration(record, {0: {"key": Statistics(torch.ones(3, BINS))}})


def test_an_artifact_from_before_there_were_norms_is_read_and_has_its_old_digest(tmp_path):
    hand_made().save(tmp_path)
    content = json.loads((tmp_path / RECORD).read_text())
    assert content["version"] == 1
    del content["recipe"]["query_quantile"]
    (tmp_path / RECORD).write_text(json.dumps(content))
    loaded = Calibration.load(tmp_path)
    assert loaded.digest == hand_made().digest == "cde31e1002b261f4"
    assert loaded.of(0, "key").query_norm is None


# ---- interrupted -----------------------------------------------------------------------------------------------------


ONLINE, STATIC = Both(block=32, key_scale="token"), Both(block=32)
PLACES = [(strategy, ("query norms", done)) for strategy in (Bounded(), ONLINE, STATIC) for done in (1, 3)]


@pytest.mark.parametrize(("strategy", "place"), [*PLACES, (ONLINE, ("densities", 1)), (STATIC, ("densities", 1))])
def test_an_interrupted_calibration_goes_on_where_it_stopped(build, windows, tmp_path, strategy, place):
    ids, calls = windows(3, 40), []

    def report(name: str, done: int, count: int) -> None:
        calls.append((name, done))
        if calls.count(place) == 1 and calls[-1] == place:
            raise KeyboardInterrupt

    expected = measured(build(), ids, strategy)
    with pytest.raises(KeyboardInterrupt):
        measured(build(), ids, strategy, folder=tmp_path, report=report)
    assert [path.name for path in tmp_path.iterdir()] == [resume.FILE]
    stopped = len(calls)
    assert measured(build(), ids, strategy, folder=tmp_path, report=report) == expected
    assert calls[stopped] == place
    assert not list(tmp_path.iterdir())


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["equal", "fisher"])
def test_a_model_that_does_not_show_its_queries_is_refused(build, windows, weights):
    latent = {"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16}
    latent |= {"qk_nope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
    latent |= {"first_k_dense_replace": 2, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
    model = build("deepseek_v3", **latent)
    both = Both(block=32, key_rope="post", weights=weights, outliers=0)
    for strategy in (Bounded(), both):
        with pytest.raises(ValueError, match=r"layers \[0, 1\] of DeepseekV3ForCausalLM showed no queries: their keys"):
            measured(model, windows(2, 40), strategy)
    assert not is_attached(model)


def test_queries_that_are_not_finite_are_named(build, windows):
    model = build()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[5, 5] = float("inf")
    with pytest.raises(ValueError, match="layer 1: the queries are not finite in window 0"):
        measured(model, windows(2, 40))


def test_mixed_widths_of_which_nothing_is_wanted_cannot_be_calibrated(build, windows):
    with pytest.raises(
        ValueError, match=r"layer 0: .* only query norms can be measured, which the recipe of 'bounded'"
    ):
        measured(build(), windows(2, 40), Bounded(quantile=None))


def test_windows_of_nothing_but_sinks_are_refused(build, windows):
    with pytest.raises(ValueError, match="windows of 3 tokens are all sinks with sink_tokens=3"):
        measured(build(), windows(2, SINKS))
    assert measured(build(), windows(2, SINKS + 1)).of(0, "key").query_norm.isfinite().all()


@pytest.mark.parametrize("quantile", [-0.1, 90.0])
def test_quantiles_beyond_0_and_1_are_refused(quantile):
    with pytest.raises(ValueError, match="query_quantile"):
        Recipe(query_quantile=quantile)


# ---- beside ----------------------------------------------------------------------------------------------------------


def test_what_can_work_without_a_calibration_may_still_learn():
    assert Bounded().calibrated
    assert Bounded().learns
    assert not Bounded(quantile=None).learns
    assert KVQuant().learns
    assert not KVQuant(datatype="nf", key_scale="token").learns
    Bounded().require_model(None)


class Needing(Bounded):
    """Cannot do without norms."""

    name: ClassVar[str] = "needing"

    def needs_statistics(self) -> bool:
        return True


def test_leaderboards_share_norms_between_settings_that_need_the_same(build, windows):
    text = CalibrationText(lambda: ("text", ""), None)
    text._windows = windows(2, 40)
    model = build()
    calibrator = Calibrator(model, text)
    ready: list[Strategy] = [calibrator.ready(Needing(**given))[0] for given in ({}, {"interval": 32})]
    other = calibrator.ready(Needing(quantile=0.5))[0]
    assert ready[0].calibration is ready[1].calibration
    assert other.calibration != ready[0].calibration
    assert calibrator.ready(Bounded()) == (Bounded(), None)
