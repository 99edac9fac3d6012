"""What competes: strategies by their specs, transformers' caches beside them, and what each of them holds."""

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from cachequant import registry
from cachequant.benchmarks import contenders, held
from cachequant.benchmarks.calibration import CalibrationText, Calibrator
from cachequant.benchmarks.contenders import BASELINES, Candidate, Contender, Exact, Quantized
from cachequant.core import Format, LayerFormat, LayerSpec, PackedCache, Strategy, detach
from cachequant.core.hf.tiny import tiny_model


class Fussy(Strategy):
    """Does not accept all of its variants."""

    name: ClassVar[str] = "fussy"
    variants: ClassVar = ({}, {"bits": 3}, {"bits": "many"})
    bits: int = 4

    def formats(self, layer: LayerSpec) -> LayerFormat:
        side = Format.model_validate({"bits": self.bits})
        return LayerFormat(key=side, value=side)


def by_words(text, **options):
    """A tokenizer of texts that list their ids."""
    return SimpleNamespace(input_ids=[int(word) for word in text.split()])


by_words.eos_token_id = None


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def panel_of(model: Any, ready: Any = None) -> Any:
    calibrator = SimpleNamespace(ready=ready or (lambda strategy: (strategy, None)))
    return SimpleNamespace(model=model, residual_length=32, calibrator=calibrator)


def filled(model: Any, cache: Any, tokens: int = 100, batch: int = 2) -> Any:
    ids = torch.randint(2, 97, (batch, tokens), generator=torch.Generator().manual_seed(0))
    try:
        with torch.inference_mode():
            model(ids, past_key_values=cache)
    finally:
        detach(model)
    return cache


def test_all_is_every_variant_that_is_installed():
    specs = [candidate.spec for candidate in contenders.candidates(["all"])]
    assert len(specs) == len(set(specs))
    assert {spec.partition(":")[0] for spec in specs} >= set(registry.names())
    for cls in registry.strategies().values():
        assert sum(spec.partition(":")[0] == cls.name for spec in specs) == len(cls.variants)


def test_baselines_are_those_that_are_installed(monkeypatch):
    monkeypatch.setattr(contenders, "BACKENDS", {"quanto": lambda: True, "hqq": lambda: False})
    assert [candidate.spec for candidate in contenders.baselines()] == [
        "DynamicCache",
        "QuantizedCache:backend=quanto,nbits=4",
        "QuantizedCache:backend=quanto,nbits=2",
    ]


def test_equal_specs_compete_once_in_the_order_given():
    found = contenders.candidates(["uniform:bits=4", "none", "uniform", "DynamicCache", " DynamicCache"])
    assert [candidate.spec for candidate in found] == ["uniform", "none", "DynamicCache"]
    assert [candidate.baseline for candidate in found] == [False, False, True]
    assert [candidate.family for candidate in found] == ["uniform", "none", "DynamicCache"]


def test_variants_that_cannot_be_built_are_candidates_that_tell_when_they_are_built():
    fine, other, broken = (contenders.variant(Fussy, settings) for settings in Fussy.variants)
    assert [fine.spec, other.spec, broken.spec] == ["fussy", "fussy:bits=3", "fussy:bits=many"]
    assert fine.build() == Fussy()
    with pytest.raises(ValueError, match="bits"):
        broken.build()
    assert not contenders.needs_calibration(broken)


def test_specs_of_baselines_are_read_and_written():
    (found,) = contenders.candidates(["QuantizedCache:nbits=4,backend=quanto,group_size=64"])
    assert found.spec == "QuantizedCache:backend=quanto,nbits=4"
    assert found.build() == Quantized(backend="quanto", nbits=4)
    assert contenders.candidate(found.spec).build() == found.build()
    assert contenders.candidate("DynamicCache").build() == Exact()


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("DynamicCache:bits=4", "DynamicCache has no field 'bits' .*; it takes no fields"),
        ("QuantizedCache:nbit=4", "it takes backend, nbits, group_size; did you mean 'nbits'"),
        ("QuantizedCache:backend=quanto,nbits=3", "Input should be 2, 4 or 8"),
        ("QuantizedCache:nbits=4", "backend"),
        ("dynamiccache", "no strategy named 'dynamiccache'"),
    ],
)
def test_baselines_that_do_not_exist_are_refused(spec, complaint):
    with pytest.raises((ValueError, LookupError), match=complaint):
        contenders.candidate(spec)


def test_no_strategy_can_take_the_name_of_a_baseline():
    for name in BASELINES:
        with pytest.raises(TypeError, match="use lower-case words"):
            registry.register(plugin_of(type(name, (Fussy,), {"name": name})), "taken")


def plugin_of(strategy: type) -> Any:
    from cachequant.registry.hookspecs import hookimpl

    class Plugin:
        @hookimpl
        def cachequant_strategies(self):
            return [strategy]

    return Plugin()


def test_a_baseline_without_its_library_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(contenders.BACKENDS, "quanto", lambda: False)
    assert not [each for each in contenders.baselines() if "quanto" in each.spec]
    ready = contenders.candidate("QuantizedCache:backend=quanto,nbits=4").ready(panel_of(model))
    with pytest.raises(ImportError, match=r'needs optimum-quanto.*pip install "cachequant\[quanto\]"'):
        ready.new_cache()


def test_baselines_are_not_calibrated_and_keep_what_they_are_told(model):
    def refuse(strategy):
        raise AssertionError("a baseline learns nothing")

    ready = contenders.candidate("DynamicCache").ready(panel_of(model, refuse))
    assert (ready.strategy, ready.calibration) == (None, None)
    assert isinstance(ready.new_cache(), DynamicCache)


@pytest.mark.skipif(not contenders.BACKENDS["quanto"](), reason="optimum-quanto is not installed")
def test_the_quantized_cache_keeps_as_many_tokens_exact_as_ours(model):
    cache = contenders.candidate("QuantizedCache:backend=quanto,nbits=4").ready(panel_of(model)).new_cache()
    assert {layer.residual_length for layer in cache.layers} == {32}
    filled(model, cache)
    _, memory = held.weigh(cache, model, 2)
    assert memory.tokens == 100
    # the prefill is quantized whole: 4 bits, and two 32-bit numbers for each group of 64
    assert memory.bits_per_element == pytest.approx(4 + 64 / 64, rel=0.05)


def test_strategies_are_measured_calibrated_and_with_options(model):
    def ready(strategy):
        return strategy.model_copy(update={"bits": 2}), None

    contender = Candidate("uniform", lambda: registry.parse("uniform")).ready(panel_of(model, ready))
    assert contender.spec == "uniform"
    assert contender.strategy.bits == 2
    try:
        cache = contender.new_cache(sink_tokens=4)
        assert isinstance(cache, PackedCache)
        assert (cache.options.residual_length, cache.options.sink_tokens) == (32, 4)
        assert contender.new_cache(residual_length=0).options.residual_length == 0
    finally:
        detach(model)


def test_stock_caches_weigh_what_their_tensors_take(model):
    cache = filled(model, DynamicCache(config=model.config))
    report, memory = held.weigh(cache, model, 2)
    # keys and values of two layers, two rows, two heads of 64 channels, four bytes each
    assert memory.device_bytes == memory.exact_bytes == 2 * 2 * 2 * 2 * 64 * 100 * 4
    assert (memory.tokens, memory.bits_per_element, memory.ratio) == (100, 32, 1)
    assert held.held_bytes(cache) == report.device_bytes
    assert held.bits_by_layer(cache) == ()


def test_bits_by_layer_are_those_of_the_packed_part(model):
    strategy = registry.parse("uniform:key_bits=8,value_bits=2,block=32")
    contender = Contender("uniform", strategy, model, 4)
    cache = filled(model, contender.new_cache())
    report, memory = held.weigh(cache, model, 2)
    layers = held.bits_by_layer(cache)
    assert [layer.index for layer in layers] == [0, 1]
    for layer in layers:
        assert 8 < layer.key < 9
        assert 2 < layer.value < 3
    both = sum(layer.key + layer.value for layer in layers) / 4
    assert both == pytest.approx(memory.packed_bits_per_element, rel=1e-6)
    assert held.held_bytes(cache) == report.device_bytes + report.host_bytes


def test_a_cache_of_exact_tokens_alone_has_no_packed_bits(model):
    cache = filled(model, Contender("uniform", registry.parse("uniform"), model, 128).new_cache(), tokens=20)
    assert held.bits_by_layer(cache) == ()
    assert held.weigh(cache, model, 2)[1].packed_bits_per_element == 0


def test_a_preset_of_strategies_that_learn_is_calibrated_like_them(model):
    mixed = registry.parse('preset:default={"key":"kvquant:bits=3","value":"uniform:bits=2"}')
    assert contenders.needs_calibration(contenders.Candidate("preset", lambda: mixed))
    calibrator = Calibrator(model, CalibrationText(lambda: ("words", " ".join(["2 3 5 7 11 13"] * 800)), by_words, 2))
    ready, card = calibrator.ready(mixed)
    assert (card.text, card.windows) == ("words", 2)
    assert all(getattr(child, "calibrated", True) for child in ready.children())
    detach(model)
    PackedCache(model, ready)
    detach(model)


def test_what_slides_out_of_a_stock_cache_is_not_counted_as_held():
    config = MistralConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=32,
    )
    torch.manual_seed(0)
    sliding = MistralForCausalLM(config).eval()
    cache = filled(sliding, filled(sliding, DynamicCache(config=config)), tokens=1)
    report, memory = held.weigh(cache, sliding, 2)
    # a window less the token to come, in the storage of a whole one
    assert report.elements == 2 * 2 * 2 * 2 * 16 * 31
    assert memory.bits_per_element == pytest.approx(32 * 32 / 31, rel=1e-3)


def test_layers_of_the_host_do_not_dilute_the_packed_part(model):
    cache = filled(model, PackedCache(model, registry.parse("none"), residual_length=0, skip_layers=(0,)), 256)
    _, memory = held.weigh(cache, model, 2)
    assert memory.packed_bits_per_element == pytest.approx(32)
