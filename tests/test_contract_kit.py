"""The contract catches what a strategy may do wrong, and says so: strategy, check and expectation."""

import builtins
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import pytest
import torch
from pydantic import ConfigDict, PlainSerializer, PrivateAttr
from torch import Tensor

from cachequant.core import AdaptiveStrategy, Format, LayerFormat, LayerSpec, MixedFormat, Side, Strategy, Tables
from cachequant.core.calibration import CalibratedStrategy, Recipe, Statistics, fitted_tables
from cachequant.core.contract import (
    CHECKS,
    VERSION,
    ContractError,
    check_strategy,
    checks_for,
    kept,
    packed,
    parametrize_with_strategies,
    settings,
    widths,
)
from cachequant.core.contract.material import of_its_own
from cachequant.kernels import quantize

pytest_plugins = ["pytester"]

CALLS: list[Any] = []
ELSEWHERE: dict[Any, Tensor] = {}


@pytest.fixture(autouse=True)
def forgotten():
    CALLS.clear()
    ELSEWHERE.clear()


class Misbehaving(Strategy):
    """Codebook keys and affine values, both of 4 bits, with one fault, chosen by name."""

    name: ClassVar[str] = "misbehaving"
    shared: ClassVar[list[int]] = []

    fault: str = ""
    _last: Any = PrivateAttr(None)

    def formats(self, layer: LayerSpec) -> Any:
        if self.fault == "answers with a dict":
            return {"key": Format(), "value": Format()}
        if self.fault == "changes its formats" and layer.index == 0:
            CALLS.append(1)
        key = Format(codes="codebook", bits=3 if len(CALLS) % 2 else 4)
        if self.fault == "turns what is constant":
            key = Format(codes="codebook", symmetric=True, unit="rms")
        return LayerFormat(key=key, value=Format(), block=32)

    def tables(self, layer: LayerSpec, side: Side, first: Tensor, valid: Tensor | None) -> Any:
        if self.fault == "writes to the first block":
            first.mul_(0.5)
        if self.fault == "writes to the mask of the first block" and valid is not None:
            valid.fill_(True)
        levels = torch.linspace(-1, 1, 16)
        if self.fault == "fits to what came before":
            CALLS.append(float(first.max()))
            levels = levels * max(CALLS)
        if self.fault == "has one codebook for all":
            CALLS.append(levels)
            return Tables.of(codebook=CALLS[0].copy_(levels * first.abs().max()))
        if self.fault == "has levels that are not finite":
            return Tables.of(codebook=torch.cat([levels[:-1], torch.tensor([torch.inf])]))
        if self.fault == "has a codebook of another size":
            return Tables(codebook=torch.linspace(-1, 1, 10))
        if self.fault == "has a codebook of doubles":
            return Tables.of(codebook=levels.double())
        if self.fault == "has a codebook upside down":
            return Tables.of(codebook=levels.flip(0))
        if self.fault == "has tables of its own kind":
            return {"codebook": levels}
        return Tables() if self.fault == "has no codebook" else Tables(codebook=levels)

    def encode(self, states: Tensor, fmt: Format, side: Side, block: int, valid: Tensor | None, tables: Tables) -> Any:
        if self.fault == "writes to its input":
            states.mul_(0.5)
        if self.fault == "writes to the mask" and valid is not None:
            valid.fill_(True)
        if self.fault == "writes to the tables" and tables.codebook is not None:
            tables.codebook.add_(0.01)
        if self.fault == "lets the last block decide":
            states = states.clamp(max=float(states[:, :, -1].max()))
        if self.fault == "mixes batch rows":
            states = states - states.mean(0)
        if self.fault == "mixes heads":
            states = states - states.mean(1, keepdim=True)
        if self.fault == "counts its calls":
            CALLS.append(1)
            states = states * len(CALLS)
        if self.fault == "encodes what is new less than before":
            CALLS.append(float(states.max()))
            states = states / max(CALLS)
        if self.fault == "keeps the last states":
            self._last = states
        if self.fault == "turns what is constant" and side == "key" and not states.std():
            states = -states
        if self.fault == "adds to what it encodes":
            states = states + 0.5
        if self.fault == "reads 16 bits otherwise" and states.dtype == torch.bfloat16:
            states = states.view(torch.float16)
        if self.fault == "counts on its class":
            self.shared.append(states.shape[2])
        if self.fault == "raises":
            raise KeyError("no such table")
        packed = super().encode(states, fmt, side, block, valid, tables)
        if self.fault == "returns one buffer for all":
            if not CALLS or any(CALLS[0][name].shape != tensor.shape for name, tensor in packed.items()):
                CALLS[:] = [packed]
            return {name: CALLS[0][name].copy_(tensor) for name, tensor in packed.items()}
        if self.fault == "returns nothing":
            return {}
        if self.fault == "returns a tuple":
            return tuple(packed.values())
        if self.fault == "returns a wrong shape":
            packed["scales"] = packed["scales"].flatten(2, 3)
        if self.fault == "returns another shape than its format":
            packed["scales"] = packed["scales"].flatten(-2)
        if self.fault == "returns a wrong dtype":
            packed["scales"] = packed["scales"].float()
        if self.fault == "leaves a tensor out":
            del packed["scales"]
        if self.fault == "returns more than its format":
            packed["extra"] = packed["scales"].clone()
        if self.fault == "keeps more than it shows":
            packed["codes"] = torch.stack([packed["codes"], packed["codes"]])[0]
        if self.fault == "throws the signal away":
            packed["codes"] = torch.zeros_like(packed["codes"])
        return packed


FAULTS = {
    "answers with a dict": settings.check_formats_depend_on_the_layer_alone,
    "changes its formats": settings.check_formats_depend_on_the_layer_alone,
    "writes to the first block": packed.check_tables_leave_their_input_unchanged,
    "writes to the mask of the first block": packed.check_tables_leave_their_input_unchanged,
    "fits to what came before": packed.check_tables_depend_on_their_arguments_alone,
    "has one codebook for all": packed.check_tables_depend_on_their_arguments_alone,
    "has levels that are not finite": packed.check_tables_have_the_shapes_of_the_format,
    "has a codebook of another size": packed.check_tables_have_the_shapes_of_the_format,
    "has a codebook of doubles": packed.check_tables_have_the_shapes_of_the_format,
    "has a codebook upside down": packed.check_tables_have_the_shapes_of_the_format,
    "has tables of its own kind": packed.check_tables_have_the_shapes_of_the_format,
    "has no codebook": packed.check_tables_have_the_shapes_of_the_format,
    "writes to its input": packed.check_encoding_leaves_its_input_unchanged,
    "writes to the mask": packed.check_encoding_leaves_its_input_unchanged,
    "writes to the tables": packed.check_encoding_leaves_its_input_unchanged,
    "lets the last block decide": packed.check_blocks_are_encoded_independently,
    "mixes heads": packed.check_batch_rows_and_heads_are_independent,
    "mixes batch rows": packed.check_batch_rows_and_heads_are_independent,
    "counts its calls": packed.check_encoding_is_deterministic,
    "encodes what is new less than before": packed.check_encoding_is_deterministic,
    "reads 16 bits otherwise": packed.check_encoding_takes_states_of_any_dtype,
    "returns one buffer for all": packed.check_encoding_is_deterministic,
    "keeps the last states": kept.check_nothing_is_kept_on_the_strategy,
    "counts on its class": kept.check_nothing_is_kept_on_the_strategy,
    "raises": packed.check_encoding_is_deterministic,
    "returns nothing": packed.check_encoding_returns_whole_blocks,
    "returns a tuple": packed.check_encoding_returns_whole_blocks,
    "returns a wrong shape": packed.check_encoding_returns_whole_blocks,
    "returns another shape than its format": packed.check_encoding_has_the_tensors_of_its_format,
    "returns a wrong dtype": packed.check_encoding_has_the_tensors_of_its_format,
    "leaves a tensor out": packed.check_encoding_has_the_tensors_of_its_format,
    "returns more than its format": packed.check_encoding_has_the_tensors_of_its_format,
    "keeps more than it shows": packed.check_bytes_match_the_formula,
    "adds to what it encodes": packed.check_constant_states_are_given_back,
    "turns what is constant": packed.check_constant_states_are_given_back,
    "throws the signal away": packed.check_decoding_gives_back_shape_and_most_of_the_signal,
}


class Formatted(Strategy):
    """4 bits, with one fault in its formats, chosen by name."""

    name: ClassVar[str] = "formatted"

    fault: str = ""

    def formats(self, layer: LayerSpec) -> Any:
        CALLS.append(layer)
        value = Format(group=layer.head_dim if self.fault == "cuts values as if they were keys" else None)
        if self.fault == "refuses what is unlike keys" and layer.value_dim != layer.head_dim:
            raise ValueError("values as wide as keys, please")
        if self.fault == "changes its mind about the last layers" and layer.index > 2:
            value = Format(bits=2 + 2 * (len(CALLS) % 2))
        if self.fault == "answers with a dict of deep layers" and layer.index > 2:
            return {"key": Format(), "value": value}
        if self.fault == "packs no layer" or (self.fault == "packs deep models alone" and layer.layers < 20):
            return None
        return LayerFormat(key=Format(), value=value, block=32)


FORMAT_FAULTS = {
    "cuts values as if they were keys": settings.check_formats_fit_values_of_another_width,
    "changes its mind about the last layers": settings.check_formats_depend_on_the_layer_alone,
    "answers with a dict of deep layers": settings.check_formats_depend_on_the_layer_alone,
    "packs no layer": settings.check_some_layer_is_packed,
    "packs deep models alone": settings.check_some_layer_is_packed,
}


class Own(Strategy):
    """float8 states, in bytes of its own making, with one fault, chosen by name."""

    name: ClassVar[str] = "own"

    fault: str = ""
    _encoded: bool = PrivateAttr(False)

    def formats(self, layer: LayerSpec) -> LayerFormat:
        return LayerFormat(key=Format(codes="custom"), value=Format(codes="custom"), block=32)

    def tables(self, layer: LayerSpec, side: Side, first: Tensor, valid: Tensor | None) -> Tables:
        return Tables(gain=torch.tensor(0.5))

    def encode(
        self, states: Tensor, fmt: Format, side: Side, block: int, valid: Tensor | None, tables: Tables
    ) -> dict[str, Tensor]:
        blocks = states.unflatten(2, (-1, block))
        if self.fault == "keeps the states elsewhere":
            keys = torch.empty(blocks.shape[:3], dtype=torch.int64)
            for place in torch.cartesian_prod(*map(torch.arange, keys.shape)).tolist():
                kept = blocks[tuple(place)].clone()
                keys[tuple(place)] = key = hash(tuple(kept.flatten().tolist()))
                ELSEWHERE[key] = kept
            return {"keys": keys}
        self._encoded = self.fault == "decodes by what it did before"
        float8 = (blocks / tables.gain).to(torch.float8_e4m3fn).view(torch.uint8)
        CALLS.append(float8.clone())
        if self.fault == "returns the states as well":
            return {"float8": float8, "states": blocks.clone()}
        return {"float8": float8}

    def decode(self, packed: Mapping[str, Tensor], fmt: Format, side: Side, block: int, tables: Tables) -> Any:
        if self.fault == "keeps the states elsewhere":
            keys = packed["keys"]
            found = torch.stack([ELSEWHERE[key] for key in keys.flatten().tolist()])
            return found.unflatten(0, keys.shape).flatten(2, 3)
        float8 = packed["float8"]
        if self.fault == "decodes what came last":
            float8 = CALLS[-1]
        if self.fault == "decodes what came of that shape first":
            float8 = next(each for each in CALLS if each.shape == float8.shape)
        if self.fault == "decodes by the place of a block":
            float8 = float8 ^ torch.arange(float8.shape[2], dtype=torch.uint8)[:, None, None]
        decoded = float8.flatten(2, 3).view(torch.float8_e4m3fn).float() * tables.gain
        if self.fault == "writes to the tables it decodes with":
            tables.gain.mul_(1.01)
        if self._encoded:
            decoded = decoded * 0.99
        if self.fault == "writes to what it decodes":
            packed["float8"].zero_()
        if self.fault == "decodes to integers":
            return decoded.to(torch.int32)
        return decoded[:, :, 1:] if self.fault == "decodes to another shape" else decoded


OWN_FAULTS = {
    "keeps the states elsewhere": packed.check_bytes_can_hold_what_is_decoded,
    "returns the states as well": packed.check_bytes_match_the_formula,
    "writes to the tables it decodes with": packed.check_decoding_leaves_its_input_unchanged,
    "writes to what it decodes": packed.check_decoding_leaves_its_input_unchanged,
    "decodes to integers": packed.check_decoding_gives_back_shape_and_most_of_the_signal,
    "decodes to another shape": packed.check_decoding_gives_back_shape_and_most_of_the_signal,
}


READ_ELSEWHERE = {
    "decodes what came last": "of equal bytes to be equal, whatever came between",
    "decodes by what it did before": "by an equal strategy to be equal",
    "decodes what came of that shape first": "to read its bytes",
    "decodes by the place of a block": "to move with their bytes",
}


class Learned(CalibratedStrategy):
    """A strategy that has to be calibrated, with one fault, chosen by name."""

    name: ClassVar[str] = "learned"

    fault: str = ""

    def recipe(self) -> Recipe:
        return Recipe(outliers=0.02, gradients=True)

    def formats(self, layer: LayerSpec) -> LayerFormat:
        scale = "channel" if self.calibration == "prompt" else "static"
        key = Format(codes="codebook", bits=3, scale=scale, outliers=2, rope="pre")
        block = 32 if self.fault == "packs otherwise once calibrated" and self.calibrated else 64
        return LayerFormat(key=key, value=Format(codes="codebook", bits=4), block=block)

    def fit(self, layer: LayerSpec, side: Side, fmt: Format, statistics: Statistics) -> Tables:
        return fitted_tables(statistics, fmt, side, "nuq", "fisher-scaled")

    def require_model(self, model: Any) -> None:
        if self.fault == "does not say why it refuses" and not self.calibrated:
            raise ValueError("no")
        careless = self.fault == "serves without a calibration" and not self.calibrated
        if not careless and self.fault != "serves other models":
            super().require_model(model)

    def tables(self, layer: LayerSpec, side: Side, first: Tensor, valid: Tensor | None) -> Tables:
        return super().tables(layer, side, first, None if self.fault == "fits to padding" else valid)

    def encode(
        self, states: Tensor, fmt: Format, side: Side, block: int, valid: Tensor | None, tables: Tables
    ) -> dict[str, Tensor]:
        if self.fault == "drifts on its static grid" and tables.scale is not None:
            states = states + 2 * tables.scale[:, None]
        packed = super().encode(states, fmt, side, block, valid, tables)
        if self.fault == "overflows beyond its static grid" and side == "key":
            return {**packed, "outlier_value": packed["outlier_value"] * torch.inf}
        return packed


LEARNED_FAULTS = {
    "packs otherwise once calibrated": settings.check_formats_depend_on_the_layer_alone,
    "does not say why it refuses": settings.check_missing_and_foreign_calibrations_are_refused,
    "serves without a calibration": settings.check_missing_and_foreign_calibrations_are_refused,
    "serves other models": settings.check_missing_and_foreign_calibrations_are_refused,
    "drifts on its static grid": packed.check_constant_states_are_given_back,
    "overflows beyond its static grid": packed.check_constant_and_zero_states_decode_finite,
}


class Recent(AdaptiveStrategy):
    """The newest at 4 bits, the others at 2, with one fault, chosen by name."""

    name: ClassVar[str] = "recent"

    fault: str = ""

    def formats(self, layer: LayerSpec) -> MixedFormat:
        rows = (Format(bits=2), Format(bits=4))
        return MixedFormat(key=rows, value=rows)

    @property
    def attention_window(self) -> int:
        return 4

    def widths(self, layer: LayerSpec, evidence: Any) -> dict[Side, Tensor]:
        CALLS.append(1)
        width = torch.full_like(evidence.low["key"], 2, dtype=torch.uint8)
        width[..., -20:] = 4
        if self.fault == "gives a width that is not its":
            width[..., :1] = 3
        if self.fault == "gives widths of integers":
            width = width.int()
        if self.fault == "drops tokens, which its format does not":
            width[..., :1] = 0
        if self.fault == "changes its mind":
            width[..., -1] = 2 + 2 * (len(CALLS) % 2)
        if self.fault == "writes to the evidence":
            evidence.low["key"].zero_()
        if self.fault == "writes to the attention" and evidence.attention is not None:
            evidence.attention.zero_()
        if self.fault == "decides by another row":
            width[0] = 2 + 2 * (evidence.high["key"][1].mean() > 3).to(torch.uint8)
        return {"key": width, "value": width.clone()}


RECENT_FAULTS = {
    "gives a width that is not its": widths.check_widths_are_those_of_the_formats,
    "gives widths of integers": widths.check_widths_are_those_of_the_formats,
    "drops tokens, which its format does not": widths.check_widths_are_those_of_the_formats,
    "changes its mind": widths.check_deciding_changes_nothing_and_is_deterministic,
    "writes to the evidence": widths.check_deciding_changes_nothing_and_is_deterministic,
    "writes to the attention": widths.check_deciding_changes_nothing_and_is_deterministic,
    "decides by another row": widths.check_widths_of_a_batch_row_are_its_own,
}


class Thawed(Misbehaving):
    """Its fields can be assigned."""

    name: ClassVar[str] = "thawed"
    model_config = ConfigDict(frozen=False)


class Lax(Misbehaving):
    """It takes any field."""

    name: ClassVar[str] = "lax"
    model_config = ConfigDict(extra="ignore")


class Forgetful(Misbehaving):
    """Its dumped settings are those of another."""

    name: ClassVar[str] = "forgetful"

    bits: Annotated[int, PlainSerializer(lambda bits: bits + 1)] = 4


class Unlike(Misbehaving):
    """Equal ones hash unlike."""

    name: ClassVar[str] = "unlike"

    def __hash__(self) -> int:
        return id(self)


class Uncalled(Misbehaving):
    """A name that cannot be typed in a spec."""

    name: ClassVar[str] = "Un called"


class Nicknamed(Misbehaving):
    """An alias in upper case."""

    name: ClassVar[str] = "nicknamed"
    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {"UPPER": {}}


class Miscalled(Misbehaving):
    """An alias for a field that it does not have."""

    name: ClassVar[str] = "miscalled"
    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {"another": {"bits": 4}}


class Searched(Misbehaving):
    """Values to try of a field that it does not have."""

    name: ClassVar[str] = "searched"
    searchable: ClassVar[Mapping[str, Sequence[Any]]] = {"bits": (2, 4)}


class Placed(Misbehaving):
    """A field that comes first, and is none."""

    name: ClassVar[str] = "placed"
    positional: ClassVar[str | None] = "bits"


CALLED = {
    Uncalled: "its name is 'Un called'; use lower-case words joined by hyphens",
    Nicknamed: "'UPPER' is no alias; use lower-case words",
    Miscalled: "'another' stands for {'bits': 4}, which does not build: bits: Extra inputs are not permitted$",
    Searched: r"searchable to name fields, fault, got \['bits'\]",
    Placed: r"positional to name fields, fault, got \['bits'\]",
}


EXAMPLES = [
    *((Misbehaving(fault=fault), check) for fault, check in FAULTS.items()),
    *((Own(fault=fault), check) for fault, check in OWN_FAULTS.items()),
    *((Formatted(fault=fault), check) for fault, check in FORMAT_FAULTS.items()),
    *((cls(), settings.check_the_registry_takes_its_names) for cls in CALLED),
    *((Recent(fault=fault), check) for fault, check in RECENT_FAULTS.items()),
    *((Learned(fault=fault), check) for fault, check in LEARNED_FAULTS.items()),
    (Learned(calibration="prompt", fault="fits to padding"), packed.check_padding_does_not_disturb_real_tokens),
    *((Own(fault=fault), packed.check_decoding_depends_on_its_bytes_alone) for fault in READ_ELSEWHERE),
    (Forgetful(), settings.check_settings_are_frozen_strict_and_round_trip),
    (Unlike(), settings.check_settings_are_frozen_strict_and_round_trip),
    (Thawed(), settings.check_settings_are_frozen_strict_and_round_trip),
    (Lax(), settings.check_settings_are_frozen_strict_and_round_trip),
]


@pytest.mark.parametrize(("strategy", "check"), EXAMPLES, ids=lambda part: getattr(part, "fault", "by"))
def test_a_fault_is_caught_by_the_check_it_breaks(strategy, check):
    with pytest.raises(ContractError) as caught:
        check(strategy)
    assert f"strategy '{strategy.name}" in str(caught.value)
    assert f"does not keep {check.__name__}: expected " in str(caught.value)


@pytest.mark.parametrize("strategy", [strategy for strategy, _ in EXAMPLES], ids=lambda each: each.fault or each.name)
def test_a_fault_is_caught_by_running_all_checks(strategy):
    with pytest.raises(ContractError, match=rf"strategy '{strategy.name}.* does not keep check_\w+: expected "):
        check_strategy(strategy)


@pytest.mark.parametrize("strategy", [Misbehaving(), Formatted(), Own(), Recent()], ids=lambda each: each.name)
def test_the_examples_without_their_fault_keep_the_contract(strategy):
    check_strategy(strategy)


def test_values_of_another_width_may_be_refused():
    settings.check_formats_fit_values_of_another_width(Formatted(fault="refuses what is unlike keys"))


class Logarithms(Strategy):
    """A sign and a logarithm for every number, in a byte, so that zero comes back as almost nothing."""

    name: ClassVar[str] = "logarithms"

    def formats(self, layer: LayerSpec) -> LayerFormat:
        return LayerFormat(key=Format(codes="custom"), value=Format(codes="custom"), block=32)

    def encode(
        self, states: Tensor, fmt: Format, side: Side, block: int, valid: Tensor | None, tables: Tables
    ) -> dict[str, Tensor]:
        blocks = states.unflatten(2, (-1, block)).float()
        most = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        steps = (-(blocks.abs() / most).clamp(min=2**-15.9).log2() * 8).round().clamp(0, 127).to(torch.int16)
        return {"codes": torch.where(blocks < 0, -steps - 1, steps).to(torch.int8), "most": most.to(torch.bfloat16)}

    def decode(self, packed: Mapping[str, Tensor], fmt: Format, side: Side, block: int, tables: Tables) -> Tensor:
        codes = packed["codes"].float()
        steps = torch.where(codes < 0, -codes - 1, codes)
        return (torch.where(codes < 0, -1.0, 1.0) * 2 ** (-steps / 8) * packed["most"].float()).flatten(2, 3)


class ValuesOnly(Logarithms):
    """Exact keys, about which it does not know what to say."""

    name: ClassVar[str] = "values-only"

    def formats(self, layer: LayerSpec) -> LayerFormat:
        return LayerFormat(key=Format(codes="exact"), value=Format(codes="custom"), block=32)

    def tables(self, layer: LayerSpec, side: Side, first: Tensor, valid: Tensor | None) -> Tables:
        return {"value": Tables()}[side]

    def encode(
        self, states: Tensor, fmt: Format, side: Side, block: int, valid: Tensor | None, tables: Tables
    ) -> dict[str, Tensor]:
        return {"value": super().encode}[side](states, fmt, side, block, valid, tables)


def test_a_side_that_is_kept_exact_is_not_asked_about():
    for check in checks_for(ValuesOnly()):
        check(ValuesOnly())


def test_a_code_without_a_zero_may_give_almost_nothing_for_it():
    some = of_its_own(Logarithms())[0]
    zeros = torch.zeros_like(some.states())
    assert 0 < float(some.decode(some.encode(zeros)).abs().max()) < 1e-20
    packed.check_constant_states_are_given_back(Logarithms())


class Free:
    """What the protocol asks, and nothing else: no settings, no base class."""

    name = "free"

    def require_model(self, model: Any) -> None: ...

    def cache_options(self) -> dict[str, Any]:
        return {}

    def formats(self, layer: LayerSpec) -> LayerFormat:
        return LayerFormat(key=Format(), value=Format(), block=32)

    def tables(self, layer: LayerSpec, side: Side, first: Tensor, valid: Tensor | None) -> Tables:
        return Tables()

    def encode(self, *arguments: Any) -> dict[str, Tensor]:
        return quantize.encode(*arguments)

    def decode(self, *arguments: Any) -> Tensor:
        raise NotImplementedError


def test_a_strategy_without_settings_keeps_the_contract():
    assert not {"check_saved_caches_resume", "check_settings_are_frozen_strict_and_round_trip"} & names(Free())
    check_strategy(Free())


# --- messages


def test_messages_write_a_strategy_as_its_spec():
    with pytest.raises(ContractError) as caught:
        packed.check_encoding_leaves_its_input_unchanged(Misbehaving(fault="writes to its input"))
    assert str(caught.value) == (
        "strategy 'misbehaving:fault=\"writes to its input\"' does not keep "
        "check_encoding_leaves_its_input_unchanged: expected encode(key) not to change its input"
    )


def test_what_a_strategy_raises_is_told_and_chained():
    with pytest.raises(ContractError, match="expected 'The same states give the same bytes") as caught:
        packed.check_encoding_is_deterministic(Misbehaving(fault="raises"))
    assert "it raised KeyError('no such table')" in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)


def test_the_wrong_tensor_is_named():
    with pytest.raises(ContractError, match=r"encode\(key\)\['scales'\] to be torch.float16 .*, got torch.float32"):
        packed.check_encoding_has_the_tensors_of_its_format(Misbehaving(fault="returns a wrong dtype"))


@pytest.mark.parametrize(
    ("fault", "expectation"),
    [
        ("has tables of its own kind", r"expected tables\(key\) to return Tables, got {"),
        ("has no codebook", r"expected tables\(key\) with \['codebook'\], got \[\]"),
    ],
)
def test_what_tables_lack_is_told(fault, expectation):
    with pytest.raises(ContractError, match=expectation):
        packed.check_tables_have_the_shapes_of_the_format(Misbehaving(fault=fault))


@pytest.mark.parametrize("fault", READ_ELSEWHERE)
def test_what_else_is_read_than_bytes_is_told(fault):
    with pytest.raises(ContractError, match=READ_ELSEWHERE[fault]):
        packed.check_decoding_depends_on_its_bytes_alone(Own(fault=fault))


def test_states_kept_elsewhere_are_told_by_the_bits_that_are_left():
    with pytest.raises(ContractError, match=r"0\.03\d+ bits a number lose at least \d.* but 0 was lost"):
        packed.check_bytes_can_hold_what_is_decoded(Own(fault="keeps the states elsewhere"))


@pytest.mark.parametrize("cls", CALLED)
def test_what_the_registry_would_refuse_is_told(cls):
    with pytest.raises(ContractError, match=CALLED[cls]):
        settings.check_the_registry_takes_its_names(cls())


def test_layers_that_were_tried_are_told():
    with pytest.raises(ContractError, match="but of models of 2, 6 and 12 layers it keeps all 20 exact"):
        settings.check_some_layer_is_packed(Formatted(fault="packs no layer"))


# --- which checks are for whom


def names(strategy: Any) -> set[str]:
    return {check.__name__ for check in checks_for(strategy)}


def test_checks_are_chosen_by_what_a_strategy_is():
    own, shared, learned, adaptive = map(names, (Own(), Misbehaving(), Learned(), Recent()))
    assert "check_bytes_can_hold_what_is_decoded" in own - shared
    assert "check_encoding_has_the_tensors_of_its_format" in shared - own
    assert "check_missing_and_foreign_calibrations_are_refused" in learned - shared
    assert "check_widths_are_those_of_the_formats" in adaptive - shared
    assert "check_streaming_equals_the_simulation" in shared - adaptive
    assert not any("encod" in name for name in adaptive)
    assert own | shared | learned | adaptive == {check.__name__ for check in CHECKS}


def test_a_strategy_that_keeps_every_layer_exact_has_nothing_to_encode():
    class Exact(Strategy):
        name: ClassVar[str] = "exact"

        def formats(self, layer: LayerSpec) -> None:
            return None

    assert not any("encod" in name for name in names(Exact()))
    for check in checks_for(Exact()):
        if check is not settings.check_some_layer_is_packed:
            check(Exact())


def test_a_check_expects_nothing_of_a_strategy_that_it_is_not_for():
    for check in CHECKS:
        if check.__name__ not in names(Recent()):
            check(Recent())


def test_every_check_has_a_sentence():
    assert all(check.__doc__ for check in CHECKS)
    assert len({check.__name__ for check in CHECKS}) == len(CHECKS)


# --- exceptions and versions


class Excepted(Misbehaving):
    """Throws the signal away, and says so."""

    name: ClassVar[str] = "excepted"
    exceptions: ClassVar[Mapping[str, str]] = {
        "check_decoding_gives_back_shape_and_most_of_the_signal": "it is a test of the contract",
    }

    fault: str = "throws the signal away"


def test_a_declared_exception_is_no_failure():
    check_strategy(Excepted())


def test_an_exception_that_is_not_needed_is_a_failure():
    message = r"strategy 'excepted.* declares that it does not keep check_decoding_gives.* but keeps it.* remove it"
    with pytest.raises(ContractError, match=message):
        check_strategy(Excepted(fault="none"))


class Clipping(Strategy):
    """4 bits for what is left when the ends are cut off."""

    name: ClassVar[str] = "clipping"

    kept: float = 1.0

    @property
    def exceptions(self) -> Mapping[str, str]:  # type: ignore[override]
        return {"check_constant_states_are_given_back": "it clips"} if self.kept < 1 else {}

    def formats(self, layer: LayerSpec) -> LayerFormat:
        return LayerFormat(key=Format(symmetric=True), value=Format(symmetric=True), block=32)

    def encode(self, states: Tensor, *rest: Any) -> dict[str, Tensor]:
        most = states.float().abs().amax(-1, keepdim=True) * self.kept
        return super().encode(states.float().clamp(-most, most), *rest)


@pytest.mark.parametrize("kept", [1.0, 0.9])
def test_exceptions_may_depend_on_settings(kept):
    check_strategy(Clipping(kept=kept))


def test_who_clips_is_told_of_exceptions():
    with pytest.raises(ContractError, match="a strategy that clips on purpose says so in `exceptions`"):
        packed.check_constant_states_are_given_back(Clipping(kept=0.9))


@pytest.mark.parametrize(
    ("declared", "complaint"),
    [
        ({"check_encoding_is_determinstic": "no"}, "got .*determinstic'; did you mean 'check_encoding_is_determin"),
        ({"check_encoding_is_deterministic": "  "}, "a reason why check_encoding_is_deterministic cannot be kept"),
        ({"check_declarations_fit_this_contract": "no"}, "exceptions to name checks that may be left out"),
        (["check_encoding_is_deterministic"], "exceptions to map names of checks to reasons"),
    ],
    ids=["unknown", "no reason", "itself", "no mapping"],
)
def test_exceptions_name_a_check_and_a_reason(declared, complaint):
    class Declaring(Misbehaving):
        name: ClassVar[str] = "declaring"
        exceptions: ClassVar[Any] = declared

    with pytest.raises(ContractError, match=f"'declaring' does not keep check_declarations.*{complaint}"):
        check_strategy(Declaring())


@pytest.mark.parametrize("version", [None, VERSION])
def test_a_strategy_of_this_contract_is_checked(version):
    class Timely(Misbehaving):
        contract: ClassVar[int | None] = version

    settings.check_declarations_fit_this_contract(Timely())


@pytest.mark.parametrize(
    ("version", "complaint"),
    [
        (VERSION + 1, rf"contract = {VERSION}, .*, got {VERSION + 1}: upgrade cachequant$"),
        (
            VERSION - 1,
            rf"contract = {VERSION}, .*, got {VERSION - 1}: read what changed, .* write contract = {VERSION}$",
        ),
        (str(VERSION), rf"contract to be a whole number, got '{VERSION}'$"),
    ],
    ids=["newer", "older", "text"],
)
def test_a_strategy_of_another_contract_is_told(version, complaint):
    class Other(Misbehaving):
        name: ClassVar[str] = "other"
        contract: ClassVar[Any] = version

    with pytest.raises(ContractError, match=f"'other' does not keep .*expected {complaint}"):
        check_strategy(Other())


# --- in pytest


MODULE = """
from typing import ClassVar

from cachequant.core import Format, LayerFormat, Strategy
from cachequant.core.contract import parametrize_with_strategies


class Mine(Strategy):
    name: ClassVar[str] = "my-strategy"
    variants: ClassVar = ({}, {"bits": 2})
    exceptions: ClassVar = {"check_encoding_is_deterministic": "dice"}

    bits: int = 4

    def formats(self, layer):
        return LayerFormat(key=Format(bits=self.bits), value=Format(), block=32)

    def encode(self, states, *rest):
        rolls.append(1)
        return super().encode(states * (1 + LUCK * len(rolls)), *rest)


LUCK = 0.1
rolls = []
"""


def run(pytester, module: str, *options: str):
    pytester.makepyfile(module)
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", *options)


CHOSEN = "deterministic or whole_blocks"


def test_classes_stand_for_their_variants_and_every_check_has_a_readable_id(pytester):
    test = "@parametrize_with_strategies(Mine, Mine(bits=8))\ndef test_it(strategy, check):\n    check(strategy)\n"
    run(pytester, f"{MODULE}\n\n{test}", "-v", "-k", CHOSEN).assert_outcomes(passed=3, xfailed=3)
    listed = run(pytester, f"{MODULE}\n\n{test}", "--collect-only", "-q", "-k", CHOSEN).outlines
    assert "my-strategy:bits=2-encoding_returns_whole_blocks" in " ".join(listed)
    assert "my-strategy:bits=8-encoding_is_deterministic" in " ".join(listed)
    assert "widths" not in " ".join(listed), "not for this strategy"


def test_an_exception_that_is_not_needed_fails_in_pytest_too(pytester):
    test = "LUCK = 0\n\n@parametrize_with_strategies(Mine)\ndef test_it(strategy, check):\n    check(strategy)\n"
    result = run(pytester, f"{MODULE}\n\n{test}", "-k", CHOSEN)
    result.assert_outcomes(passed=2, failed=2)
    result.stdout.fnmatch_lines("*XPASS(strict)*dice*")


def test_a_test_of_strategies_alone_runs_once_for_each(pytester):
    test = "@parametrize_with_strategies(Mine)\ndef test_it(strategy):\n    assert strategy.bits in (2, 4)\n"
    run(pytester, f"{MODULE}\n\n{test}").assert_outcomes(passed=2)


def test_variants_that_do_not_build_are_named():
    class Fussy(Misbehaving):
        name: ClassVar[str] = "fussy"
        variants: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"faults": 3})

    with pytest.raises(ContractError, match=r"'fussy': expected every one of its variants to build, but {'faults': 3}"):
        parametrize_with_strategies(Fussy)


@pytest.mark.parametrize("given", [(), ("uniform",), (3,)])
def test_what_is_no_strategy_is_refused(given):
    with pytest.raises(TypeError, match="strategy; give classes or instances"):
        parametrize_with_strategies(*given)


def test_a_test_without_the_argument_is_refused():
    with pytest.raises(TypeError, match=r"test_it has no argument `strategy`; write def test_it\(strategy, check\)"):

        @parametrize_with_strategies(Misbehaving)
        def test_it(check): ...


def test_without_pytest_the_way_out_is_told(monkeypatch):
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "pytest":
            raise ImportError("No module named 'pytest'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "cachequant\[test\]"'):
        parametrize_with_strategies(Misbehaving)
