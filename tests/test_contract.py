"""Every installed strategy, in every variant it declares, passes every contract check."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from cachequant import registry
from cachequant.core import CacheQuantizer, Format, LayerFormat, LayerSpec, Side, Strategy, Tables, contract

OTHER_SETTINGS = ("none:key_rope=pre,block=32", "uniform:bits=4,group_size=32,symmetric=true,block=64")
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
