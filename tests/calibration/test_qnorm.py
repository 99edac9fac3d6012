"""Q-Norm over any strategy: moments are restored, codes stay, and what cannot be moved is refused."""

from typing import Any, ClassVar

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.testing import assert_close

from cachequant import registry
from cachequant.core import Format, LayerFormat, LayerSpec, PackedCache, Side, Strategy, Tables
from cachequant.core.hf.taps import TapCache
from cachequant.kernels.quantize import decode, normalise
from cachequant.strategies.kvquant import KVQuant
from cachequant.strategies.qnorm import QNorm
from cachequant.strategies.uniform import Uniform

BLOCK = 32
BASES = {
    "token": "uniform:bits=2,block=32",
    "group": "uniform:bits=3,block=32,group_size=8",
    "channel": "uniform:bits=2,block=32,key_scale=channel,key_rope=pre",
    "rotated": "uniform:bits=2,block=32,rotation=hadamard",
    "kvquant": "kvquant:bits=2,block=32,outliers=0",
    "kvquant-outliers": "kvquant:bits=2,block=32,outliers=0.05",
    "kvquant-int": "kvquant:bits=2,block=32,datatype=int,outliers=0",
}


@pytest.fixture(scope="module")
def model(build):
    return build()


def ready(base: Any, model: Any, windows: Any, **settings: Any) -> QNorm:
    return QNorm(base=base, **settings).calibrate(model, None, windows(2, 4 * BLOCK), samples=2, heldout=0)


def passing(model: Any, strategy: Any, ids: Tensor) -> dict[tuple[int, Side], Tensor]:
    """All states that a strategy would pack, `[windows, kv_heads, tokens, head_dim]`."""
    seen: dict[tuple[int, Side], Tensor] = {}
    with torch.no_grad():
        cache = TapCache(model, strategy, lambda layer, side, states, _: seen.__setitem__((layer.index, side), states))
        model(ids, past_key_values=cache)
    return seen


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_decoded_numbers_have_the_moments_of_the_calibration_text(model, windows, base):
    strategy = ready(base, model, windows)
    sinks = strategy.recipe().sink_tokens
    moved = 0.0
    for (index, side), states in passing(model, strategy, windows(2, 4 * BLOCK)).items():
        spec = strategy.calibration.record.layers[index].shape
        formats = strategy.formats(spec)
        fmt = getattr(formats, side).model_copy(update={"outliers": 0, "trim": 0})
        if getattr(formats, side).trim:
            continue  # ranges without outliers cannot be had without them
        valid = (torch.arange(states.shape[2]) >= sinks).expand(len(states), -1)
        tables = strategy.tables(spec, side, states[:, :, :BLOCK], valid[:, :BLOCK])
        plain = Tables(codebook=tables.codebook, scale=tables.scale, zero=tables.zero)
        assert tables.gain is not None
        normalised, width = normalise(states, fmt, side, BLOCK, valid, plain)
        inside = valid[:, None, :, None] & (normalised.abs() <= 1.001) & (width > 0)
        packed = strategy.encode(states, fmt, side, BLOCK, valid, tables)
        # where decoded states lie on the same grids
        relative = []
        for each in (tables, plain):
            back = decode(packed, fmt, side, spec.head_dim, BLOCK, each)
            middle = states if fmt.rotation == "none" else rotated(states)
            back = back if fmt.rotation == "none" else rotated(back)
            relative.append((back - (middle - normalised * width)) / width)
        moments = [torch.stack([u[inside].mean(), u[inside].std()]) for u in (normalised, *relative)]
        assert_close(moments[1], moments[0], rtol=1e-2, atol=5e-3)
        moved = max(moved, float((moments[2] - moments[0]).abs().max()))
    assert moved > 0.005  # else nothing was proven


def rotated(states: Tensor) -> Tensor:
    from cachequant.kernels.rotation import hadamard_rotate

    return hadamard_rotate(states)


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_codes_and_bytes_are_those_of_the_base(model, windows, base):
    strategy = ready(base, model, windows)
    alone = registry.parse(base)
    if isinstance(alone, KVQuant):
        alone = alone.with_calibration(None).calibrate(model, None, windows(2, 4 * BLOCK), samples=2, heldout=0)
    spec = strategy.calibration.record.layers[0].shape
    formats = strategy.formats(spec)
    assert formats == alone.formats(spec)
    states = torch.randn(2, spec.kv_heads, BLOCK, spec.head_dim, generator=torch.Generator().manual_seed(0))
    for side in ("key", "value"):
        fmt = getattr(formats, side)
        packed = [
            s.encode(states, fmt, side, BLOCK, None, s.tables(spec, side, states, None)) for s in (strategy, alone)
        ]
        assert packed[0].keys() == packed[1].keys()
        assert torch.equal(packed[0]["codes"], packed[1]["codes"])
        tables = [s.tables(spec, side, states, None).tensors() for s in (strategy, alone)]
        assert tables[0].keys() - tables[1].keys() == {"gain", "offset"}
        assert all(torch.equal(tables[0][name], tables[1][name]) for name in tables[1])


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_it_generates_calibrated_and_fitted_to_the_prompt(model, windows, base):
    for strategy in (ready(base, model, windows), QNorm(base=base, calibration="prompt")):
        cache = PackedCache(model, strategy, residual_length=0)
        with torch.no_grad():
            model(windows(2, 3 * BLOCK), past_key_values=cache)
            assert model(windows(2, 1), past_key_values=cache).logits.isfinite().all()
        tables = cache.packed_layers[1].tables
        assert tables["key"].gain is not None
        assert tables["value"].offset is not None
        assert cache.options.sink_tokens == strategy.base.cache_options().get("sink_tokens", 0)


def test_kvquants_own_switch_is_the_same_thing(model, windows):
    wrapped = ready("kvquant:bits=2,block=32", model, windows)
    inside = KVQuant(bits=2, block=32, q_norm=True)
    inside = inside.calibrate(model, None, windows(2, 4 * BLOCK), samples=2, heldout=0)
    spec = wrapped.calibration.record.layers[1].shape
    first = torch.zeros(1, 2, BLOCK, 16)
    for side in ("key", "value"):
        a, b = (s.tables(spec, side, first, None).tensors() for s in (wrapped, inside))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


# ---- the base --------------------------------------------------------------------------------------------------------


def test_a_base_may_be_a_name_a_spec_or_a_strategy():
    assert QNorm().base == KVQuant()
    assert QNorm(base="uniform").base == Uniform()
    assert QNorm(base="uniform:bits=2") == QNorm(base=Uniform(bits=2))
    assert QNorm(base="uniform", bits=2).base == Uniform(bits=2)
    assert QNorm(base=KVQuant(outliers=0), bits=3).base == KVQuant(bits=3, outliers=0)


@pytest.mark.parametrize(
    "strategy", [QNorm(), QNorm(base="uniform:bits=2"), QNorm(base="kvquant:bits=2,outliers=0")], ids=registry.spec
)
def test_specs_lead_back(strategy):
    assert registry.parse(registry.spec(strategy)) == strategy
    assert QNorm.model_validate(strategy.model_dump(mode="json")) == strategy
    assert hash(QNorm.model_validate(strategy.model_dump())) == hash(strategy)


def test_what_is_saved_is_read_back_equal(model, windows, tmp_path):
    strategy = ready(KVQuant(bits=2, block=BLOCK), model, windows)
    saved = strategy.save_pretrained(tmp_path)
    loaded = QNorm.from_pretrained(tmp_path)
    assert loaded == saved == strategy
    assert hash(loaded) == hash(strategy)
    assert registry.parse(registry.spec(loaded)) == strategy
    assert loaded.base == KVQuant(bits=2, block=BLOCK)
    three = QNorm.from_pretrained(tmp_path, bits=3)
    assert three.base.bits == 3
    three.require_model(model)


def test_the_calibration_of_a_base_becomes_ours(model, windows):
    base = KVQuant(bits=2, block=BLOCK).calibrate(model, None, windows(2, 4 * BLOCK), samples=2, heldout=0)
    strategy = QNorm(base=base)
    assert strategy.calibration == base.calibration
    assert strategy.base.calibration is None
    strategy.require_model(model)
    assert QNorm(base="kvquant:calibration=prompt").calibration == "prompt"


class Odd(Strategy):
    """Bytes of its own making."""

    name: ClassVar[str] = "odd"

    codes: str = "custom"

    def formats(self, layer: LayerSpec) -> LayerFormat:
        scale = "static" if self.codes == "static" else "token"
        codes = "affine" if self.codes == "static" else "custom"
        return LayerFormat(key=Format(codes=codes, scale=scale), value=Format())


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (Odd(), "'odd' has codes='custom'"),
        (Odd(codes="static"), "derive it from CalibratedStrategy"),
        ("fp8", "'fp8' has codes='float8'"),
        ("turboquant:boundary_layers=0", "has levels in units of 'norm'"),
    ],
    ids=["custom", "static", "floats", "norms"],
)
def test_bases_without_levels_on_known_grids_are_refused(model, base, message):
    strategy = QNorm(base=base, calibration="prompt")
    with pytest.raises(ValueError, match=message):
        strategy.formats(LayerSpec(0, 1, 2, 64, 64))
    with pytest.raises(ValueError, match=message):
        PackedCache(model, strategy)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": "qnorm"}, "applies Q-Norm already"),
        ({"base": "kvquant:q_norm=true"}, "applies Q-Norm already"),
        ({"base": "none", "bits": 2}, "the base 'none' has no bits; leave them unset"),
        ({"base": 7}, "is no strategy; give a spec"),
        ({"base": "kvquant:bits=7"}, "bits"),
        ({"base": "uniform", "bits": 5}, "bits"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        QNorm(**settings)


def test_an_unknown_base_names_those_that_are_installed():
    with pytest.raises(LookupError, match=r"no strategy named 'unifrom'.*did you mean 'uniform'"):
        QNorm(base="unifrom")
