"""`cachequant plan`: bytes by formula against bytes held, what fits, the paper's table, what the command refuses."""

import json
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
import typer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from cachequant import registry
from cachequant.benchmarks.commands.plan import plan
from cachequant.benchmarks.errors import Unusable
from cachequant.benchmarks.plan.formula import Setting, device_bytes, formula
from cachequant.benchmarks.plan.growth import host_capacity, store_capacity
from cachequant.benchmarks.plan.mixes import Mix
from cachequant.benchmarks.plan.paper import compare
from cachequant.benchmarks.plan.planning import BASELINE, Budget, longest_context, make_plan, mixes_of
from cachequant.benchmarks.plan.shapes import NAMED, ModelShape, read_config, shape_of
from cachequant.benchmarks.plan.sizes import parse_count, parse_reserve, parse_size
from cachequant.core import AdaptiveStrategy, Format, LayerFormat, LayerSpec, MemoryReport, PackedCache, Side, Strategy
from cachequant.core.calibration import CalibratedStrategy
from cachequant.core.hf.tiny import tiny_model
from cachequant.core.host import HostCopy
from cachequant.core.store import PackedStore

pytestmark = pytest.mark.slow

VARIANTS = [(cls, settings) for cls in registry.strategies().values() for settings in cls.variants]
GIB = 2**30

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
}
SLIDING = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3 with heads of 128": {"model_type": "qwen3", "head_dim": 128, "num_attention_heads": 8},
    "sliding windows": {"model_type": "gemma3_text", "head_dim": 32, "query_pre_attn_scalar": 32, **SLIDING},
    "angles of neighbours": {"model_type": "cohere", "num_key_value_heads": 4},
    "angles that depend on the length": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    },
    "convolutions": {"model_type": "lfm2", "layer_types": ["conv", "full_attention", "full_attention"]},
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def tiny(dtype: torch.dtype) -> tuple[PreTrainedModel, ModelShape]:
    model = tiny_model(dtype)
    return model, shape_of("tiny", model.config, str(dtype).removeprefix("torch."))


@cache
def small(name: str) -> tuple[PreTrainedModel, ModelShape]:
    settings = {**SMALL, **ARCHITECTURES[name]}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval(), shape_of(name, config, "float32")


@cache
def llama(name: str = "llama-7b") -> ModelShape:
    return shape_of(*read_config(name))


def fill(model: PreTrainedModel, strategy: Any, batch: int, *pieces: int, **options: Any) -> MemoryReport:
    """What a cache holds after forwards of so many tokens."""
    packed = PackedCache(model, strategy, **options)
    ids = torch.randint(2, 97, (batch, sum(pieces)), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for piece in ids.split(pieces, dim=1):
            model(piece, past_key_values=packed)
    return packed.memory()


def ready(strategy: Any, model: PreTrainedModel) -> Any:
    """Calibrated, if it has to be."""
    parts = strategy.children() if hasattr(strategy, "children") else [strategy]
    if not any(isinstance(part, CalibratedStrategy) and not part.calibrated for part in parts):
        return strategy
    ids = torch.randint(2, 97, (2, 192), generator=torch.Generator().manual_seed(2))
    return strategy.calibrate(model, None, ids, samples=2, heldout=0)


def differing(report: MemoryReport, rows: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Kinds of bytes that are not as many: held, and by formula."""
    names = report.rows.keys() | rows.keys()
    pairs = {name: (report.rows.get(name, 0), rows.get(name, 0)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def mixes(strategy: Any, shape: ModelShape) -> list[Mix | None]:
    return mixes_of(strategy, shape, ())


# ---- the formula is what is held -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "batch", "tokens"), [("float32", 1, 300), ("bfloat16", 3, 519)])
@pytest.mark.parametrize(("cls", "settings"), VARIANTS, ids=[f"{cls.name}-{values}" for cls, values in VARIANTS])
def test_formula_is_what_every_strategy_holds_after_a_prompt(cls, settings, dtype, batch, tokens):
    model, shape = tiny(getattr(torch, dtype))
    strategy = cls(**settings)
    report = fill(model, ready(strategy, model), batch, tokens)
    found = [formula(strategy, shape, Setting(batch=batch), mix) for mix in mixes(strategy, shape)]
    rows = [each.held(tokens, "prompt") for each in found]
    if len(rows) == 1:
        assert not differing(report, rows[0])
        assert device_bytes(rows[0]) == report.device_bytes
    else:
        low, high = map(device_bytes, rows)
        assert low <= report.device_bytes <= high
        assert low < high, "bounds that are equal bound nothing"
    assert rows[0].get("host copy", 0) == report.host_bytes
    assert found[0].elements(tokens) == report.elements


@pytest.mark.parametrize("spec", ["uniform:block=32", "uniform:block=32,key_scale=channel,key_rope=pre"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_formula_is_what_every_architecture_holds(architecture, spec):
    model, shape = small(architecture)
    strategy = registry.parse(spec)
    options = {"residual_length": 16, "sink_tokens": 3}
    for batch, pieces in ((3, [203]), (1, [70, *(30 * [1])])):
        tokens = sum(pieces)
        found = formula(strategy, shape, Setting(batch=batch, **options))
        report = fill(model, strategy, batch, *pieces, **options)
        rows = found.held(tokens, "prompt" if len(pieces) == 1 else "steps", pieces[0])
        assert not differing(report, rows)
        assert found.elements(tokens) == report.elements


@pytest.mark.parametrize(
    ("spec", "residual"),
    [
        ("uniform:block=32", 0),
        ("none:block=32,key_rope=pre", 40),
        ("h2o:interval=24", 0),
        ("h2o:interval=24", 10),
        ("scissorhands:interval=24,window=20,keep=0.5", 0),
        ("scissorhands:interval=24,window=40,keep=0.5", 7),
    ],
)
def test_formula_follows_decoding_token_by_token(spec, residual):
    model, shape = tiny(torch.float32)
    strategy = registry.parse(spec)
    (mix,) = mixes(strategy, shape)
    found = formula(strategy, shape, Setting(batch=2, residual_length=residual), mix)
    packed = PackedCache(model, strategy, residual_length=residual)
    ids = torch.randint(2, 97, (2, 135), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(ids[:, :70], past_key_values=packed)
        for tokens in range(71, 136):
            model(ids[:, tokens - 1 : tokens], past_key_values=packed)
            rows = found.held(tokens, "steps", 70)
            assert not differing(packed.memory(), rows), tokens
            assert device_bytes(rows) <= device_bytes(found.held(tokens, "worst"))


@pytest.mark.parametrize(("prompt", "steps"), [(50, 32), (150, 30)])
def test_bounds_contain_what_qaq_holds_while_decoding(prompt, steps):
    model, shape = tiny(torch.bfloat16)
    strategy = registry.parse("qaq:interval=32,granularity=head,sigma_key=0.0005")
    options = {"residual_length": 20, "sink_tokens": 2}
    report = fill(model, strategy, 1, prompt, *(steps * [1]), **options)
    tokens = prompt + steps
    low, high = (
        formula(strategy, shape, Setting(**options), Mix(kind=kind)).held(tokens, "steps", prompt)
        for kind in ("least", "most")
    )
    assert device_bytes(low) < report.device_bytes < device_bytes(high)
    assert low["host copy"] == high["host copy"] == report.host_bytes
    # two layers; a decision is two tokens away, and to know of the last five queries
    assert low["attention history"] == report.rows["attention history"] == 2 * 3 * tokens * 2 * 4


def test_an_average_that_is_measured_gives_what_is_held():
    model, shape = tiny(torch.bfloat16)
    strategy = registry.parse("qaq:min_bits=4,max_bits=4,host_copy=false")
    report = fill(model, strategy, 2, 500)
    rows = formula(strategy, shape, Setting(batch=2), Mix(kind="average", bits=4)).held(500, "prompt")
    assert not differing(report, rows)


def test_counts_of_an_average_have_that_average():
    counts = Mix(kind="average", bits=3.3).counts(10_000, 128, 0, (2, 3, 4, 8), False)
    assert counts.keys() == {3, 4}
    assert sum(counts.values()) == 10_000
    assert sum(width * count for width, count in counts.items()) == pytest.approx(33_000, abs=1)


@pytest.mark.parametrize("spec", ["uniform:block=64", "kvquant:calibration=prompt", "qaq", "h2o", "scissorhands"])
def test_worst_case_bounds_prompts_in_chunks_and_never_falls(spec):
    model, shape = tiny(torch.float32)
    strategy = registry.parse(spec)
    found = formula(strategy, shape, Setting(batch=2), mixes(strategy, shape)[-1])
    sizes = [found.largest(tokens) for tokens in range(1, 1200)]
    assert sizes == sorted(sizes)
    for pieces in ([37, 300, 1, 64], [128, 128, 129], [500, *(30 * [1])]):
        assert fill(model, strategy, 2, *pieces).device_bytes <= found.largest(sum(pieces))


def test_left_padding_is_counted_where_it_is_said():
    model, shape = tiny(torch.float32)
    strategy = registry.parse("uniform:block=32,key_scale=channel,key_rope=pre")
    ids = torch.randint(2, 97, (3, 200), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(200) >= torch.tensor([[0], [5], [40]])).long()
    packed = PackedCache(model, strategy, sink_tokens=1)
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=packed)
    found = formula(strategy, shape, Setting(batch=3, sink_tokens=1, padded=True))
    assert not differing(packed.memory(), found.held(200, "prompt"))


def test_layers_left_exact_are_counted_as_they_are_held():
    class Middle(Strategy):
        """One layer only, by its formats."""

        name: ClassVar[str] = "middle"

        def formats(self, layer: LayerSpec) -> LayerFormat | None:
            return LayerFormat(key=Format(bits=2), value=Format(bits=8), block=32) if layer.index == 1 else None

    model, shape = small("qwen3 with heads of 128")
    found = formula(Middle(), shape, Setting(skip_layers=(-1,)))
    report = fill(model, Middle(), 1, 333, skip_layers=(-1,))
    assert not differing(report, found.held(333, "prompt"))
    assert report.rows["host layers"] > 0 < report.rows["key exact"]


def test_bytes_of_a_strategys_own_are_measured_and_said_to_be():
    class Nibbles(Strategy):
        """Bytes that no format describes."""

        name: ClassVar[str] = "nibbles"

        def formats(self, layer: LayerSpec) -> LayerFormat:
            return LayerFormat(key=Format(codes="custom"), value=Format(bits=4), block=64)

        def encode(self, states: Tensor, fmt: Format, side: Side, block: int, valid: Any, tables: Any) -> Any:
            if side == "value":
                return super().encode(states, fmt, side, block, valid, tables)
            blocks = states.unflatten(2, (-1, block))
            return {"levels": blocks.to(torch.float8_e4m3fn), "sums": blocks.sum((-1, -2), keepdim=True)}

        def decode(self, packed: Any, fmt: Format, side: Side, block: int, tables: Any) -> Tensor:
            return packed["levels"].float().flatten(2, 3)

    model, shape = tiny(torch.float32)
    report = fill(model, Nibbles(), 3, 517)
    found = formula(Nibbles(), shape, Setting(batch=3))
    assert not differing(report, found.held(517, "prompt"))
    assert report.rows["key levels"] > 0
    (row,) = make_plan(shape, [Nibbles()], Setting(), Budget(memory=GIB, reserve=0, weights=0), 64).rows[2:]
    assert row.notes == ("bytes of keys measured on random states",)


def test_buffers_grow_by_the_rule_of_the_store():
    store, host, held = PackedStore(), HostCopy(), 0
    for blocks in range(1, 150):
        store.append({"codes": torch.zeros(1, 1, 1, 2)})
        assert store.held_bytes() // 8 == store_capacity(blocks, 1, "steps") <= store_capacity(blocks, 1, "worst")
    for added in (70, *(60 * [24])):
        held += added
        host.append({"key": torch.zeros(1, 1, added, 1), "value": torch.zeros(1, 1, added, 1)})
        assert host.held_bytes() // 8 == host_capacity(held, 70, 24, "steps") <= host_capacity(held, 70, 24, "worst")


# ---- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "billions"), [("llama-7b", 6.738), ("llama-13b", 13.016), ("llama-30b", 32.529), ("llama-65b", 65.286)]
)
def test_named_shapes_have_the_parameters_of_their_models(name, billions):
    shape = llama(name)
    assert shape.parameters / 1e9 == pytest.approx(billions, abs=1e-3)
    assert shape.weights == 2 * shape.parameters
    assert shape.positions == 2048


def test_weights_that_are_tied_count_once():
    model, shape = tiny(torch.float32)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    name, config = read_config(None)
    assert name == "reference"
    assert shape_of(name, config).weights == 2 * 4_590_848


def test_quantized_weights_are_not_guessed(tmp_path):
    config = {**NAMED["llama-7b"], "num_hidden_layers": 1, "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = shape_of(*read_config(str(tmp_path)))
    assert "give their size with --weights" in shape.notes[0]


# ---- what fits -------------------------------------------------------------------------------------------------------


def test_longest_context_fits_and_one_token_more_does_not():
    budget = Budget(memory=20 * GIB, reserve=GIB, weights=llama().weights)
    made = make_plan(llama(), [registry.parse("uniform:bits=4")], Setting(), budget)
    stock, row = made.rows
    room = 19 * GIB - llama().weights
    found = formula(registry.parse("uniform:bits=4"), llama(), Setting())
    assert found.largest(row.longest) <= room < found.largest(row.longest + 1)
    assert stock.longest == room // (32 * 2 * 4096 * 2)
    assert row.longest > 3.5 * stock.longest
    assert (row.at.tokens, row.at.worst) == (row.longest, found.largest(row.longest))
    # 4 bits, 32 bits of scale and zero per 128 channels
    assert row.limit_bits == pytest.approx(4.25)
    assert row.bytes_per_token == pytest.approx(32 * 2 * 4096 * 4.25 / 8)
    assert row.layer_bytes_per_token == pytest.approx([2 * 4096 * 4.25 / 8] * 32)
    assert (stock.strategy, stock.limit_bits, stock.at.ratio) == (BASELINE, 16, 1)


def test_what_dominates_adds_up_to_weights_and_cache():
    budget = Budget(memory=80 * GIB, reserve=0, weights=llama().weights)
    row = make_plan(llama(), [registry.parse("kvquant:bits=2")], Setting(), budget, 2**17).rows[1]
    assert sum(row.at.categories.values()) == row.at.worst + llama().weights
    kinds = {"weights", "codes", "scales", "outliers", "exact tail", "sinks", "rope tables", "codebooks", "spare"}
    assert row.at.categories.keys() == kinds
    assert list(row.at.categories)[:2] == ["weights", "codes"]


def test_host_copies_are_no_device_memory():
    budget = Budget(memory=80 * GIB, reserve=0, weights=0)
    with_copies, without = (
        make_plan(llama(), [registry.parse(spec)], Setting(), budget, 10**5).rows[-1]
        for spec in ("qaq", "qaq:host_copy=false")
    )
    assert with_copies.at.worst == without.at.worst
    assert with_copies.longest == without.longest
    # exact copies of all but the tail, in memory that grows by a 32nd
    assert with_copies.at.host == pytest.approx(10**5 * 32 * 2 * 4096 * 2 * 33 / 32, rel=0.01)
    assert without.at.host == 0


def test_devices_share_weights_heads_and_layers():
    shape, strategy = llama(), registry.parse("uniform:bits=4,key_scale=channel,key_rope=pre")
    one = formula(strategy, shape, Setting())
    halves = formula(strategy, shape, Setting(tensor_parallel=2))
    stages = formula(strategy, shape, Setting(stages=2))
    without_tables = {name: size for name, size in one.held(5000).items() if name != "rope"}
    for each in (halves, stages):
        rows = each.held(5000)
        # every device turns its keys by a table of its own
        assert rows.pop("rope") == 2 * one.held(5000)["rope"]
        assert rows == without_tables
        assert 2 * each.largest(5000) == device_bytes(each.held(5000, "worst"))
        assert each.elements(5000) == one.elements(5000)
    fullest = formula(strategy, shape, Setting(stages=3)).largest(5000)
    assert fullest > device_bytes(formula(strategy, shape, Setting(stages=3)).held(5000, "worst")) / 3


def test_heads_decided_together_cannot_be_split():
    with pytest.raises(ValueError, match="granularity='head'"):
        formula(registry.parse("qaq"), llama(), Setting(tensor_parallel=2))
    formula(registry.parse("qaq:granularity=head"), llama(), Setting(tensor_parallel=2))


def test_what_holds_no_more_with_length_has_no_limit():
    settings = {**SMALL, "sliding_window": 24}
    shape = shape_of("windows", AutoConfig.for_model("mistral", **settings), "bfloat16")
    row = make_plan(shape, [], Setting(), Budget(memory=GIB, reserve=0, weights=0)).rows[0]
    assert row.longest is None and row.at is None and row.limit_bits is None and row.bytes_per_token == 0
    assert longest_context(lambda tokens: False) == 0
    assert longest_context(lambda tokens: tokens <= 12345) == 12345


def test_prompts_that_windows_hold_whole_are_noted():
    shape = small("sliding windows")[1]
    made = make_plan(shape, [], Setting(), Budget(memory=GIB, reserve=0, weights=0), 1000)
    (note,) = [note for note in made.notes if "sliding window" in note]
    # two of three layers, all but their windows; 16 bits in the baseline, 32 in the model's own
    assert made.rows[1].at.prompt_excess == 2 * (1000 - 24) * 2 * 2 * 32 * 4
    assert "976.00 KiB" in note and "Read long prompts in chunks" in note


def test_a_strategy_that_refuses_the_shape_is_a_row_with_its_reason():
    strategies = [registry.parse(spec) for spec in ("uniform:group_size=48", "uniform")]
    rows = make_plan(llama(), strategies, Setting(), Budget(memory=80 * GIB, reserve=0, weights=0)).rows
    assert "48 channels does not divide head_dim=128" in rows[1].error and rows[1].at is None
    assert rows[2].error is None
    budget = Budget(memory=GIB, reserve=0, weights=0)
    (_, row) = make_plan(llama(), [registry.parse("qaq")], Setting(), budget, 9, [1]).rows
    assert "1 bits on average; give 2 to 8 as --average-bits" in row.error


def test_weights_that_do_not_fit_say_how_much_is_missing():
    shape = llama("llama-65b")
    with pytest.raises(Unusable, match=r"121\.60 GiB.*less a reserve of 0 B are 41\.60 GiB too little") as caught:
        make_plan(shape, [], Setting(), Budget(memory=80 * GIB, reserve=0, weights=shape.weights))
    assert caught.value.option == "--memory"
    make_plan(shape, [], Setting(stages=2), Budget(memory=80 * GIB, reserve=0, weights=shape.weights), 1)


def test_every_installed_strategy_can_be_planned():
    strategies = [cls(**settings) for cls, settings in VARIANTS]
    rows = make_plan(llama(), strategies, Setting(), Budget(memory=80 * GIB, reserve=0, weights=0)).rows
    assert not [row.error for row in rows if row.error]
    adaptive = sum(issubclass(cls, AdaptiveStrategy) and cls.name == "qaq" for cls, _ in VARIANTS)
    assert len(rows) == 1 + len(strategies) + 2 * adaptive
    assert all(
        row.longest > rows[0].longest for row in rows[1:] if row.strategy != "none" and "qaq" not in row.strategy
    )


# ---- the paper -------------------------------------------------------------------------------------------------------

# GiB of one sequence by the paper's accounting: fp16, nuq4, nuq4-1%, nuq3, nuq3-1%, nuq2, nuq2-1%
PAPER = {
    ("LLaMA-7B", 2**17): (64.0, 16.0, 17.3, 12.0, 13.3, 8.0, 9.3),
    ("LLaMA-7B", 2**20): (512, 128.1, 138.6, 96.1, 106.6, 64.1, 74.6),
    ("LLaMA-7B", 10 * 2**20): (5120, 1281.3, 1386.2, 961.3, 1066.2, 641.3, 746.2),
    ("LLaMA-13B", 2**17): (100.0, 25.0, 27.1, 18.8, 20.8, 12.5, 14.6),
    ("LLaMA-30B", 2**17): (195.0, 48.8, 52.7, 36.6, 40.6, 24.4, 28.4),
    ("LLaMA-65B", 2**17): (320.0, 80.0, 86.5, 60.0, 66.5, 40.0, 46.5),
    ("LLaMA-65B", 2**20): (2560, 640.3, 692.1, 480.3, 532.1, 320.3, 372.1),
}
OURS = {
    ("LLaMA-7B", 2**17): (64.0, 16.6, 18.6, 12.6, 14.6, 8.6, 10.6),
    ("LLaMA-7B", 2**20): (512, 132.3, 148.3, 100.3, 116.3, 68.3, 84.3),
    ("LLaMA-7B", 10 * 2**20): (5120, 1322.6, 1482.6, 1002.6, 1162.6, 682.6, 842.6),
    ("LLaMA-13B", 2**17): (100.0, 25.9, 29.0, 19.6, 22.8, 13.4, 16.5),
    ("LLaMA-30B", 2**17): (195.0, 50.5, 56.5, 38.3, 44.4, 26.1, 32.2),
    ("LLaMA-65B", 2**17): (320.0, 82.8, 92.8, 62.8, 72.8, 42.8, 52.8),
    ("LLaMA-65B", 2**20): (2560, 660.5, 740.5, 500.5, 580.5, 340.5, 420.5),
}


@pytest.fixture(scope="module")
def compared():
    return compare("kvquant")


def test_papers_table_is_reproduced_and_ours_is_pinned(compared):
    for key, paper in PAPER.items():
        cells = [cell for cell in compared.cells if (cell.model, cell.tokens) == key]
        assert [cell.paper for cell in cells] == pytest.approx(paper, abs=0.051), key
        assert [cell.ours for cell in cells] == pytest.approx(OURS[key], abs=0.06), key
    printed = [cell for cell in compared.cells if cell.printed is not None]
    assert len(printed) == 9
    for cell in printed:
        # of a million tokens the paper prints whole GiB
        assert cell.paper == pytest.approx(cell.printed, abs=0.5 if cell.tokens == 2**20 else 0.051)


def test_differences_to_the_paper_add_up_and_have_reasons(compared):
    for cell in compared.cells:
        numbers = 2 * cell.tokens * {"LLaMA-7B": 32 * 4096}.get(cell.model, 0)
        if numbers:
            assert sum(cell.difference.values()) * numbers / 8 / GIB == pytest.approx(cell.ours - cell.paper, rel=1e-6)
        if cell.bits != 16:
            assert cell.difference.keys() <= compared.reasons.keys()
    cell = compared.cell("LLaMA-7B", 2**20, 2, True)
    # a scale and zero per head of 128 value channels, where the paper has one for all 4096
    assert cell.difference["scales"] == pytest.approx(32 / 128 / 2 - 32 / 4096 / 2, abs=1e-3)
    # two slots of 32 bits per 128 numbers, where the paper has 1 % and a pointer per token
    assert cell.difference["outliers"] == pytest.approx(0.5 - 0.32 - 32 / 4096, abs=1e-3)


# ---- the command -----------------------------------------------------------------------------------------------------

app = typer.Typer()
app.command()(plan)


def run(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "150", "TERM": "dumb", "NO_COLOR": "1"}).invoke(app, arguments)


def text_of(result: Any) -> str:
    """Without the frame and line breaks of an error."""
    return " ".join(result.output.replace("│", " ").split())


def test_command_prints_a_table_and_json():
    chosen = ("--strategies", "uniform:bits=4;qaq", "--model", "llama-7b", "--memory", "24GiB")
    result = run(*chosen)
    assert result.exit_code == 0, result.output
    text = text_of(result)
    assert "1 device of 24.00 GiB, or 25.77 GB, each; 2.40 GiB of it left free; weights 12.55 GiB in all" in text
    assert "llama-7b has 2,048 positions" in text
    assert all(word in text for word in (BASELINE, "uniform", "at least: all of 2 bits", "if 4 bits on average"))
    made = json.loads(run(*chosen, "--json").output)
    assert [row["strategy"] for row in made["rows"]] == [BASELINE, "uniform", "qaq", "qaq", "qaq"]
    assert f"{made['rows'][1]['longest']:,}" in text
    assert made["budget"] == {"memory": 24 * GIB, "reserve": int(2.4 * GIB), "weights": llama().weights}


def test_command_plans_the_bundled_model_and_defaults():
    result = run("--context", "1K", "--dtype", "float32", "--batch", "4")
    assert result.exit_code == 0, result.output
    assert "reference: LlamaForCausalLM, 4.6M parameters, 6 layers, float32, batch 4" in text_of(result)
    assert "DynamicCache, float32" in result.output and "positions" not in result.output


def test_command_prints_the_papers_table():
    result = run("--paper", "kvquant")
    assert result.exit_code == 0, result.output
    assert "68.3 / 64.1*" in result.output and "1,483 / 1,386" in result.output
    assert "LLaMA-65B, 131,072 tokens: the text says 32K" in text_of(result)
    assert len(json.loads(run("--paper", "kvquant", "--json").output)["cells"]) == 4 * 3 * 7


@pytest.mark.parametrize(
    ("arguments", "option", "says"),
    [
        (["--model", "lama-7b"], "--model", "one of llama-7b"),
        (["--strategies", "unifrom"], "--strategies", "uniform"),
        (["--strategies", "uniform:bit=4"], "--strategies", "did you mean 'bits'"),
        (["--memory", "80"], "--memory", "80GiB"),
        (["--memory", "lots"], "--memory", "cannot read 'lots'"),
        (["--memory", "0GB"], "--memory", "no memory"),
        (["--weights", "4bit"], "--weights", "cannot read '4bit'"),
        (["--reserve", "120%"], "--reserve", "leaves nothing"),
        (["--reserve", "90GB"], "--reserve", "leaves nothing"),
        (["--context", "long"], "--context", "128K"),
        (["--skip-layers", "0;1"], "--skip-layers", "commas"),
        (["--skip-layers", "9"], "--skip-layers", "layers 0 to 5"),
        (["--devices", "3", "--tp", "2"], "--devices", "no multiple"),
        (["--devices", "9"], "--devices", "at most 6"),
        (["--tp", "3"], "--tp", "one of [1, 2]"),
        (["--model", "llama-65b"], "--memory", "too little"),
        (["--paper", "qaq"], "--paper", "kvquant"),
    ],
)
def test_command_refuses_and_names_the_option(arguments, option, says):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert f"Invalid value for {option}:" in text_of(result)
    assert says in text_of(result)


def test_a_folder_without_a_config_is_refused(tmp_path):
    assert "holds no config.json" in text_of(run("--model", str(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    result = run("--model", str(tmp_path))
    assert result.exit_code == 2 and "cannot read the config" in text_of(result)


def test_sizes_tell_decimal_from_binary_units():
    assert (parse_size("80GB"), parse_size("80 gib"), parse_size("1.5MiB")) == (80 * 10**9, 80 * GIB, 3 * 2**19)
    assert (parse_reserve("10%", 1000), parse_reserve("0", 1000), parse_reserve("5B", 1000)) == (100, 0, 5)
    assert (parse_count("131072"), parse_count("128K"), parse_count("2m")) == (2**17, 2**17, 2**21)
