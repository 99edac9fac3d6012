"""`pytest --benchmark-only` is what users of pytest-benchmark know: groups, figures, stored runs, options, failures."""

import hashlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cachequant.benchmarks import packing
from cachequant.benchmarks.arena import Arena
from cachequant.benchmarks.asked import asked
from cachequant.benchmarks.contenders import Contender, baselines, candidate, installed
from cachequant.benchmarks.held import UNPACKED_ROWS
from cachequant.benchmarks.pytest_options import LENGTHS, OPTIONS, TASKS, destination
from cachequant.core import PackedCache

ROOT = Path(find_spec("cachequant.core").origin).parents[1]
VOCABULARY, CONTEXT = 64, 512

pytestmark = [
    pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="an installed wheel is not a checkout"),
    pytest.mark.slow,
]

PLUGIN = '''
from typing import ClassVar

from cachequant.core import Format, LayerFormat, LayerSpec, Strategy
from cachequant.registry.hookspecs import hookimpl


class Half(Strategy):
    """Half the bits."""

    name: ClassVar[str] = "half"

    def formats(self, layer: LayerSpec) -> LayerFormat:
        return LayerFormat(key=Format(bits=8), value=Format(bits=8), block=32)


@hookimpl
def cachequant_strategies():
    return [Half]
'''


def build_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder with a tokenizer that knows one word per id, texts, and a plugin that is installed there."""
    folder = tmp_path_factory.mktemp("tiny")
    build_model().save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w0", unk_token="w1").save_pretrained(folder)
    ids = torch.randint(2, VOCABULARY, (1500,), generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in ids))
    (folder / "short.txt").write_text("w2 w3")
    metadata = folder / "plugins" / "cachequant_half-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: cachequant-half\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[cachequant]\nhalf = cachequant_half\n")
    (folder / "plugins" / "cachequant_half.py").write_text(PLUGIN)
    return folder


def run_pytest(*arguments: object, path: Path | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`pytest` from the root or another folder, with `path` first on PYTHONPATH."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def first(folder):
    """A run of three strategies, one of which does not fit the model: what it printed, its JSON, and its options."""
    options = (
        "--benchmark-only",
        f"--model={folder}",
        f"--text={folder / 'text.txt'}",
        "--tasks=perplexity:windows=2",
        "--lengths=128,256",
        "--no-baselines",
        f"--benchmark-storage=file://{folder / 'runs'}",
        "--deselect=benchmarks/bench_codebooks.py",
    )
    done = run_pytest(
        *options,
        "--strategies=uniform:bits=4;DynamicCache",
        "--strategies=half;uniform:group_size=24",
        "--benchmark-save=first",
        f"--benchmark-json={folder / 'run.json'}",
        path=folder / "plugins",
    )
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "run.json").read_text()), options


def figures(first: Any, group: str, strategy: str, **known: Any) -> dict[str, Any]:
    """The `extra_info` of one benchmark."""
    (found,) = [
        info
        for info in (bench["extra_info"] for bench in first[1]["benchmarks"])
        if {"group": group, "strategy": strategy, **known}.items() <= info.items()
    ]
    return found


# --- what is measured


def test_every_strategy_has_a_benchmark_in_every_group(first, folder):
    found = sorted(
        (bench["group"], bench["params"]["strategy"], bench["extra_info"]["strategy"])
        for bench in first[1]["benchmarks"]
    )
    length = "perplexity:length=416,windows=2"
    groups = ["encode"]
    groups += [f"accuracy-memory on {name}, {length}" for name in (folder.name, "outlier twin")]
    groups += [f"{task} {tokens} tokens" for task in ("prefill of", "decode one token at") for tokens in (128, 256)]
    assert found == sorted((group, spec, spec) for group in groups for spec in ("uniform", "DynamicCache", "half"))


def test_decoding_holds_the_context_that_its_group_names(first):
    # two layers of two sides, two heads of 32 float32 numbers
    per_token = 2 * 2 * 2 * 32 * 4
    for context in (128, 256):
        info = figures(first, "decode", "DynamicCache", context=context)
        assert (info["bytes"], info["bits_per_element"]) == (context * per_token, 32.0)
        packed = figures(first, "decode", "half", context=context)
        assert packed["bytes"] < info["bytes"] / 1.5
        assert packed["packed_bits_per_element"] == 9.0


def test_encoding_has_its_bytes_and_its_rate(first):
    info = figures(first, "encode", "uniform")
    # four bits and a scale and zero of 16 bits each for 32 numbers
    assert info["packed_bits_per_element"] == 5.0
    assert info["context"] == CONTEXT
    assert info["bytes"] == CONTEXT * 2 * 2 * 2 * 32 * 5 // 8
    # 512 tokens of float32 states
    seconds = CONTEXT * 2 * 2 * 2 * 32 * 4 / info["bytes_per_second"]
    assert info["ms_per_1024_tokens"] == pytest.approx(1e3 * seconds * 2)


def test_accuracy_is_that_of_the_packed_cache(first, folder):
    for name in (folder.name, "outlier twin"):
        exact = figures(first, "accuracy-memory", "DynamicCache", model=name)
        assert (exact["kl_mean"], exact["kl_p99"], exact["top1"]) == (0.0, 0.0, 1.0)
        packed = figures(first, "accuracy-memory", "uniform", model=name)
        assert 0 < packed["kl_mean"] < packed["kl_p99"]
        assert 0 < packed["top1"] <= 1 < packed["perplexity"]
        assert packed["bits_per_element"] < exact["bits_per_element"]


@pytest.mark.parametrize("spec", ["uniform:bits=3", "uniform:key_scale=channel,key_rope=pre", "h2o", "qaq"])
def test_what_encoding_packs_is_what_a_cache_holds(spec):
    model = build_model()
    ids = torch.randint(2, VOCABULARY, (1, 256), generator=torch.Generator().manual_seed(0))
    contender = Contender(spec, candidate(spec).build(), model, 32)
    work = packing.packing(contender, ids)
    cache = PackedCache(model, contender.source, residual_length=0, sink_tokens=0)
    packing.prefill(model, ids, cache)
    rows = cache.memory().rows
    held = sum(size for name, size in rows.items() if name not in UNPACKED_ROWS | {"rope"})
    assert work.elements == cache.memory().elements
    assert work.packed_bytes(work.pack(work.fresh())) == held


# --- who takes part


def test_whatever_is_installed_appears_by_itself(folder):
    done = run_pytest("--benchmark-only", "--collect-only", "-q", path=folder / "plugins")
    assert done.returncode == 0, done.stdout + done.stderr
    collected = {line for line in done.stdout.splitlines() if "::" in line}
    assert all(line.startswith("benchmarks/") for line in collected)
    specs = {each.spec for each in (*installed(), *baselines())} | {"half"}
    assert {"DynamicCache", "qaq", "uniform"} < specs
    for spec in specs:
        names = [f"bench_speed.py::test_encode[{spec}]"]
        names += [f"bench_speed.py::test_{task}[{n}-{spec}]" for task in ("prefill", "decode") for n in LENGTHS]
        names += [f"bench_leaderboard.py::test_accuracy_memory[{TASKS[0]}-{spec}-{p}]" for p in ("model", "twin")]
        assert {f"benchmarks/{name}" for name in names} <= collected


def test_a_plain_run_collects_no_benchmarks():
    done = run_pytest("--collect-only", "-q", "benchmarks")
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout + done.stderr


# --- what is shown


def test_the_summary_ranks_by_bits_and_marks_the_pareto_front(first):
    _, board = first[0].split("leaderboard: memory against accuracy, perplexity:length=416,windows=2")
    lines = board.splitlines()
    (uniform,) = [number for number, line in enumerate(lines) if line.strip().startswith("uniform ")]
    (exact,) = [number for number, line in enumerate(lines) if line.strip().startswith("DynamicCache ")]
    assert uniform < exact
    assert lines[exact].count("* 0.0000") == 2
    assert "Newest 32 tokens kept exact." in " ".join(board.split())
    assert "Text: text.txt, sha256" in board


def test_what_fails_is_named_with_its_reason_and_the_rest_is_measured(first):
    reason = "a group of 24 channels does not divide head_dim=32"
    flat = " ".join(first[0].split())
    for group in ("encode:", "prefill of 256 tokens:", "decode one token at 128 tokens:"):
        assert f"{group} uniform:group_size=24: ValueError: " in flat
    assert "failed: uniform:group_size=24 on outlier twin: ValueError: " in flat
    assert reason in flat
    assert "Traceback" not in flat


# --- stored runs


def test_stored_runs_are_compared(first, folder):
    options = (*first[2], "--strategies=uniform:bits=4", "--benchmark-compare=0001", "-k", "test_decode")
    # pytest-benchmark names a storage by its place under the working directory, and raises where it is not there
    done = run_pytest("-c", ROOT / "pyproject.toml", ROOT / "benchmarks", *options, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    for length in (128, 256):
        rows = {words[1] for words in lines if words[:1] == [f"test_decode[{length}-uniform]"]}
        assert rows == {"(NOW)", "(0001_first)"}


def test_a_run_says_what_it_measured(first, folder):
    said = first[1]["cachequant"]
    assert [model["panel"] for model in said["models"]] == [folder.name, "outlier twin"]
    assert said["text"]["sha256"] == hashlib.sha256((folder / "text.txt").read_bytes()).hexdigest()
    assert (said["environment"]["threads"], said["models"][0]["dtype"]) == (1, "float32")


# --- options


class Given:
    """A pytest.Config as far as options go."""

    def __init__(self, **given: Any) -> None:
        self._given: dict[str, Any] = {destination(name): None for name in OPTIONS}
        for name, value in given.items():
            self._given[destination(name)] = value

    def getoption(self, name: str) -> Any:
        return self._given[name]


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("strategies", ["unifrom"], "--strategies: no strategy named 'unifrom'"),
        ("strategies", ["uniform:bits=5"], "--strategies: "),
        ("strategies", [" ; "], "--strategies"),
        ("tasks", ["perplexty"], "--tasks: "),
        ("tasks", ["perplexity:windows=0"], "--tasks: "),
        ("lengths", "128,many", "--lengths: cannot read '128,many'"),
        ("lengths", "0", "--lengths: cannot read '0'"),
        ("dtype", "float8", "--dtype: 'float8' is none of float32, bfloat16, float16"),
        ("device", "warp", "--device: "),
        ("threads", "0", "--threads: '0'"),
    ],
)
def test_options_that_cannot_be_read_are_named(option, value, complaint):
    with pytest.raises(pytest.UsageError) as caught:
        asked(Given(**{option: value}))
    assert str(caught.value).startswith(complaint)


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("model", "/no/such/model", "--model: cannot load the model: there is no folder '/no/such/model'"),
        ("text", "{folder}/absent.txt", "--text: cannot read"),
        ("text", "{folder}/short.txt", "--tasks: perplexity:windows=2: the text has 2 tokens"),
        ("lengths", "128,496", "--lengths: 496 tokens and 17 more are beyond the context of"),
    ],
)
def test_options_that_do_not_fit_the_model_are_named(folder, option, value, complaint):
    given = {"model": str(folder), "text": str(folder / "text.txt"), "tasks": ["perplexity:windows=2"]}
    found = asked(Given(**{**given, "strategies": ["none"], option: value.format(folder=folder)}))
    with pytest.raises(pytest.UsageError) as caught:
        Arena.open(found, set(found.lengths))
    assert str(caught.value).startswith(complaint)


def test_default_lengths_beyond_the_model_are_left_out(folder):
    given = {"model": str(folder), "text": str(folder / "text.txt"), "tasks": ["perplexity:windows=2"]}
    arena = Arena.open(asked(Given(**given, strategies=["none"])), set(LENGTHS))
    refused = {length for length in LENGTHS if arena.refusal(length)}
    assert refused == {512, 1024}


def test_a_model_that_does_not_load_is_a_usage_error():
    done = run_pytest("--benchmark-only", "--model=/no/such/model", "--strategies=none", "-k", "test_encode")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: --model: cannot load the model: there is no folder '/no/such/model'" in done.stderr


def test_options_are_known_behind_a_space_and_refused_where_nothing_reads_them():
    done = run_pytest("--lengths", "128", "--collect-only")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--lengths says what benchmarks measure; add --benchmark-only" in done.stdout + done.stderr


def test_baselines_stand_beside_chosen_strategies_unless_they_are_not_wanted():
    beside = {each.spec for each in baselines()}
    assert set(asked(Given(strategies=["none"])).strategies) == {"none"} | beside
    assert asked(Given(strategies=["none"], no_baselines=True)).strategies == ("none",)
    everything = {each.spec for each in installed()}
    assert set(asked(Given()).strategies) == everything | beside
    assert set(asked(Given(no_baselines=True)).strategies) == everything
