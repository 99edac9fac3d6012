"""Every installed strategy, in every variant it declares, passes every contract check that is for it."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from cachequant import registry
from cachequant.core import Format, LayerFormat, LayerSpec, Side, Strategy, Tables
from cachequant.core.calibration import CalibratedStrategy, Recipe, Statistics, fitted_tables
from cachequant.core.contract import check_strategy, parametrize_with_strategies
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
    "fp8:scale=head",
    "turboquant_k8v4:boundary_layers=0",
)


@parametrize_with_strategies(*registry.strategies().values(), *map(registry.parse, OTHER_SETTINGS))
def test_strategies_keep_the_contract(strategy, check):
    check(strategy)


class Learned(CalibratedStrategy):
    """A strategy of an outsider that has to be calibrated."""

    name: ClassVar[str] = "learned"

    def recipe(self) -> Recipe:
        return Recipe(outliers=0.02, gradients=True)

    def formats(self, layer: LayerSpec) -> LayerFormat:
        scale = "channel" if self.calibration == "prompt" else "static"
        key = Format(codes="codebook", bits=3, scale=scale, outliers=2, rope="pre")
        return LayerFormat(key=key, value=Format(codes="codebook", bits=4), block=64)

    def fit(self, layer: LayerSpec, side: Side, fmt: Format, statistics: Statistics) -> Tables:
        return fitted_tables(statistics, fmt, side, "nuq", "fisher-scaled")


def test_an_outsider_need_not_calibrate_for_the_checks() -> None:
    check_strategy(Learned())
    check_strategy(Learned(calibration="prompt"))


def test_what_an_outsider_calibrated_for_another_model_is_checked_all_the_same() -> None:
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    ids = torch.randint(2, 97, (2, 128), generator=torch.Generator().manual_seed(0))
    check_strategy(Learned().calibrate(model, None, ids, samples=2, heldout=0))


def test_a_strategy_that_keeps_the_first_and_last_layers_exact_is_tried_on_the_others() -> None:
    class Middle(Strategy):
        """Two bits, but for two layers at either end."""

        name: ClassVar[str] = "middle"

        def formats(self, layer: LayerSpec) -> LayerFormat | None:
            inner = 2 <= layer.index < layer.layers - 2
            return LayerFormat(key=Format(bits=2), value=Format(bits=2), block=32) if inner else None

        def encode(self, *args: Any) -> dict[str, Tensor]:
            packed.append(args)
            return super().encode(*args)

    packed: list[Any] = []
    check_strategy(Middle())
    assert packed


def test_all_checks_run_on_a_strategy_of_an_outsider() -> None:
    class Mixed(Strategy):
        """Keys of 8 bits in groups, values of 3 bits per channel."""

        name: ClassVar[str] = "mixed"

        def formats(self, layer: LayerSpec) -> LayerFormat:
            return LayerFormat(key=Format(bits=8, group=16), value=Format(bits=3, scale="channel"), block=64)

    check_strategy(Mixed())


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

    check_strategy(Halves())
