"""Every installed strategy, in every variant it declares, passes every contract check."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from cachequant import registry
from cachequant.core import CacheQuantizer, Format, LayerFormat, LayerSpec, Side, Strategy, Tables, contract
from cachequant.core.calibration import CalibratedStrategy, Recipe, Statistics, fitted_tables
from cachequant.core.hf.tiny import tiny_model

OTHER_SETTINGS = (
    "none:key_rope=pre,block=32",
    "uniform:bits=4,group_size=32,symmetric=true,block=64",
    "kvquant:bits=2,q_norm=true,key_scale=channel,value_scale=static,block=32",
    "kvquant:bits=3,datatype=nf,key_scale=token,block=64",
    "qnorm:base=uniform,bits=2,calibration=prompt",
    "qaq:granularity=head,min_bits=0,max_bits=16,interval=16,alpha=0",
    "qaq:granularity=token,shared_bits=true,interval=1",
    "qaq:profile=repository,window=40",
    "h2o:keep=1",
    "scissorhands:recent=0,interval=8",
)
STRATEGIES = [strategy(**settings) for strategy in registry.strategies().values() for settings in strategy.variants]
STRATEGIES += [registry.parse(spec) for spec in OTHER_SETTINGS]


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("strategy", STRATEGIES, ids=registry.spec)
def test_strategies_keep_the_contract(strategy: CacheQuantizer, check: Callable[[CacheQuantizer], None]) -> None:
    check(strategy)


class Misbehaving(Strategy):
    """Per-token 4 bits with one fault, chosen by name."""

    name: ClassVar[str] = "misbehaving"

    fault: str

    def formats(self, layer: LayerSpec) -> LayerFormat:
        return LayerFormat(key=Format(), value=Format())

    def encode(
        self, states: Tensor, fmt: Format, side: Side, block: int, valid: Tensor | None, tables: Tables
    ) -> dict[str, Tensor]:
        if self.fault == "writes to its input":
            states.mul_(0.5)
        if self.fault == "lets the last block decide":
            states = states.clamp(max=float(states[:, :, -1].max()))
        if self.fault == "mixes batch rows":
            states = states - states.mean(0)
        if self.fault == "remembers":
            CALLS.append(1)
            states = states * len(CALLS)
        packed = super().encode(states, fmt, side, block, valid, tables)
        if self.fault == "returns a wrong shape":
            packed["scales"] = packed["scales"].flatten(2, 3)
        if self.fault == "lies about its bytes":
            packed["extra"] = packed["scales"].clone()
        if self.fault == "throws the signal away":
            packed["codes"] = torch.zeros_like(packed["codes"])
        return packed


CALLS: list[int] = []

FAULTS = {
    "writes to its input": contract.check_encoding_leaves_its_input_unchanged,
    "lets the last block decide": contract.check_blocks_are_encoded_independently,
    "mixes batch rows": contract.check_batch_rows_and_heads_are_independent,
    "remembers": contract.check_encoding_is_deterministic,
    "returns a wrong shape": contract.check_encoding_returns_whole_blocks,
    "lies about its bytes": contract.check_bytes_match_the_formula,
    "throws the signal away": contract.check_decoding_gives_back_shape_and_most_of_the_signal,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_strategy_is_caught_by_name(fault: str) -> None:
    with pytest.raises(contract.ContractError, match="misbehaving"):
        FAULTS[fault](Misbehaving(fault=fault))


class Learned(CalibratedStrategy):
    """A strategy of an outsider that has to be calibrated, with or without one fault."""

    name: ClassVar[str] = "learned"

    fault: str = ""

    def recipe(self) -> Recipe:
        return Recipe(outliers=0.02, gradients=True)

    def formats(self, layer: LayerSpec) -> LayerFormat:
        scale = "channel" if self.calibration == "prompt" else "static"
        key = Format(codes="codebook", bits=3, scale=scale, outliers=2, rope="pre")
        return LayerFormat(key=key, value=Format(codes="codebook", bits=4), block=64)

    def fit(self, layer: LayerSpec, side: Side, fmt: Format, statistics: Statistics) -> Tables:
        return fitted_tables(statistics, fmt, side, "nuq", "fisher-scaled")

    def require_model(self, model: Any) -> None:
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
        if self.fault == "overflows beyond its static grid" and side == "key":
            packed = super().encode(states, fmt, side, block, valid, tables)
            return {**packed, "outlier_value": packed["outlier_value"] * torch.inf}
        return super().encode(states, fmt, side, block, valid, tables)


LEARNED_FAULTS = {
    "serves without a calibration": contract.check_missing_and_foreign_calibrations_are_refused,
    "serves other models": contract.check_missing_and_foreign_calibrations_are_refused,
    "drifts on its static grid": contract.check_constant_and_zero_states_decode_finite,
    "overflows beyond its static grid": contract.check_constant_and_zero_states_decode_finite,
}


@pytest.mark.parametrize("fault", LEARNED_FAULTS)
def test_a_faulty_calibrated_strategy_is_caught_by_name(fault: str) -> None:
    with pytest.raises(contract.ContractError, match="learned"):
        LEARNED_FAULTS[fault](Learned(fault=fault))


def test_a_fit_to_padding_is_caught() -> None:
    contract.check_padding_does_not_disturb_real_tokens(Learned(calibration="prompt"))
    with pytest.raises(contract.ContractError, match="padding not to raise the error"):
        contract.check_padding_does_not_disturb_real_tokens(Learned(calibration="prompt", fault="fits to padding"))


def test_an_outsider_need_not_calibrate_for_the_checks() -> None:
    contract.check_strategy(Learned())
    contract.check_strategy(Learned(calibration="prompt"))


def test_what_an_outsider_calibrated_for_another_model_is_checked_all_the_same() -> None:
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    ids = torch.randint(2, 97, (2, 128), generator=torch.Generator().manual_seed(0))
    contract.check_strategy(Learned().calibrate(model, None, ids, samples=2, heldout=0))


def test_all_checks_run_on_a_strategy_of_an_outsider() -> None:
    class Mixed(Strategy):
        """Keys of 8 bits in groups, values of 3 bits per channel."""

        name: ClassVar[str] = "mixed"

        def formats(self, layer: LayerSpec) -> LayerFormat:
            return LayerFormat(key=Format(bits=8, group=16), value=Format(bits=3, scale="channel"), block=64)

    contract.check_strategy(Mixed())


def test_bytes_of_a_strategys_own_making_work_in_every_mode() -> None:
    class Halves(Strategy):
        """float8 states, a format the kernels do not know."""

        name: ClassVar[str] = "halves"

        def formats(self, layer: LayerSpec) -> LayerFormat:
            return LayerFormat(key=Format(codes="custom", rope="pre"), value=Format(codes="custom"), block=32)

        def encode(
            self, states: Tensor, fmt: Format, side: Side, block: int, valid: Tensor | None, tables: Tables
        ) -> dict[str, Tensor]:
            return {"float8": states.unflatten(2, (-1, block)).to(torch.float8_e4m3fn).view(torch.uint8)}

        def decode(self, packed: Any, fmt: Format, side: Side, block: int, tables: Tables) -> Tensor:
            return packed["float8"].flatten(2, 3).view(torch.float8_e4m3fn).float()

    for check in contract.CHECKS:
        check(Halves())
