"""A model split over two processes generates what it generates in one, each holding its own heads."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cachequant import registry
from cachequant.benchmarks.sweep import parallel

sys.path.insert(0, str(Path(__file__).parent / "parallel"))
from tensor_parallel_worker import Answer, Case, Request, answer

pytestmark = pytest.mark.slow

WORKER = Path(__file__).parent / "parallel" / "tensor_parallel_worker.py"

SECONDS = 300
"""What the processes may take: several times what they take on a busy machine."""

PROMPT = 100
CALIBRATION = {"samples": 3, "length": 128, "heldout": 0}

PLAIN = "none:block=32"
ROTATED = "uniform:bits=4,rotation=hadamard,block=32"
BEFORE_ROPE = "uniform:bits=4,key_scale=channel,key_rope=pre,block=32"
FITTED = "kvquant:bits=3,block=32,calibration=prompt"
CALIBRATED = "kvquant:bits=3,block=32"
ADAPTIVE = "qaq:interval=16,granularity=head"
EVICTING = "h2o:interval=16,keep=0.5"

BLOCKS = {"plain": PLAIN, "rotated": ROTATED, "before rope": BEFORE_ROPE, "fitted": FITTED}
ROWS = {"adaptive": ADAPTIVE, "evicting": EVICTING}
SAME = [
    *(f"{name} llama" for name in (*BLOCKS, *ROWS, "calibrated", "static", "saved")),
    *(f"{name} qwen3" for name in ("rotated", "before rope", "calibrated", *ROWS)),
    "together olmo2",
]

# what every process holds whole: angles of all positions, codebooks, and which tokens are padding
REPLICATED = {"rope", "codebooks", "widths", "sinks"}


class Run(NamedTuple):
    """Answers by case."""

    alone: dict[str, Answer]
    processes: list[dict[str, Answer]]


@pytest.fixture(scope="module")
def run(build: Callable[..., PreTrainedModel], tokens, left_padded, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Everything in two processes at once: they take longer to start than to answer."""
    folder = tmp_path_factory.mktemp("parallel")
    shape = {"num_hidden_layers": 2, "head_dim": 32}
    models = {name: build(name, **shape) for name in ("llama", "qwen3")}
    models["llama-one-head"] = build("llama", **shape, num_key_value_heads=1)
    models["olmo2"] = _olmo2(models["llama"])
    for name, model in models.items():
        model.save_pretrained(folder / name)
    texts = tokens(3, CALIBRATION["length"], seed=5)
    stranger = build("llama", seed=1, **shape)

    def calibrated(spec: str, name: str, model: PreTrainedModel) -> str:
        place = folder / f"calibration of {name}"
        strategy: Any = registry.parse(spec)
        strategy.calibrate(model, None, texts, **CALIBRATION).save_pretrained(place)
        return f'{spec},calibration="{place}"'

    learned = {name: calibrated(CALIBRATED, name, models[name]) for name in ("llama", "qwen3")}
    of_stranger = calibrated(CALIBRATED, "stranger", stranger)
    of_norms = calibrated(ADAPTIVE, "norms", models["llama"])

    def case(name: str, model: str, spec: str, task: str = "generate") -> Case:
        return Case(name=name, model=str(folder / model), spec=spec, task=task)

    cases = [
        *(case(f"{name} llama", "llama", spec) for name, spec in (BLOCKS | ROWS).items()),
        *(case(f"{name} qwen3", "qwen3", (BLOCKS | ROWS)[name]) for name in ("rotated", "before rope", *ROWS)),
        *(case(f"calibrated {name}", name, spec) for name, spec in learned.items()),
        case("static llama", "llama", ROTATED, "generate-static"),
        case("together olmo2", "olmo2", "qaq:interval=16"),
        case("together llama", "llama", "qaq:interval=16"),
        case("all layers llama", "llama", "qaq:interval=16,granularity=token"),
        case("norms llama", "llama", of_norms),
        case("stranger llama", "llama", of_stranger),
        case("saved llama", "llama", BEFORE_ROPE, "continue-saved"),
        case("neighbours llama", "llama", BEFORE_ROPE, "load-neighbours"),
        case("learning llama", "llama", CALIBRATED, "calibrate"),
        case("one head", "llama-one-head", PLAIN),
    ]
    ids, mask = left_padded(tokens(2, PROMPT), [9, 0])
    request = Request(cases=cases, ids=ids.tolist(), mask=mask.tolist())
    (folder / "request.json").write_text(request.model_dump_json())
    process = _torchrun(folder)
    try:
        loaded = {name: AutoModelForCausalLM.from_pretrained(folder / name).eval() for name in models}
        alone = {each.name: answer(loaded[Path(each.model).name], each, request) for each in cases if each.name in SAME}
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        process.terminate()
    assert process.returncode == 0, output
    answers = [json.loads((folder / f"process{number}.json").read_text()) for number in range(2)]
    return Run(alone, [{name: Answer(**each) for name, each in named.items()} for named in answers])


def _olmo2(like: PreTrainedModel) -> PreTrainedModel:
    """Norms over all heads, for which transformers brings keys of all heads to every process."""
    settings = like.config.to_dict()
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings")  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model("olmo2", **{name: settings[name] for name in kept})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.12)
    return model


def _torchrun(folder: Path) -> subprocess.Popen[str]:
    """Two processes that talk over the loopback interface, on a port that is free."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    options = ["--nproc-per-node", "2", "--standalone", "--local-addr", "127.0.0.1"]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, str(WORKER), str(folder)],
        # GPUs are hidden: transformers would take them
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_two_processes_generate_what_one_does(run, name):
    alone = run.alone[name]
    assert alone.error is None
    assert len(set(alone.tokens[0])) > 4, "a model that repeats itself shows nothing"
    for process in run.processes:
        assert process[name].error is None
        assert process[name].tokens == alone.tokens
        assert process[name].logits == run.processes[0][name].logits


def test_logits_are_those_of_one_process_but_for_rounding(run):
    for process in run.processes:
        found, expected = (torch.tensor(each["plain llama"].logits) for each in (process, run.alone))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["plain llama", "rotated llama", "rotated qwen3"])
def test_each_process_holds_exactly_half(run, name):
    for process in run.processes:
        assert process[name].rows == {kind: size / 2 for kind, size in run.alone[name].rows.items()}
        assert process[name].total_bytes == run.alone[name].device_bytes


@pytest.mark.parametrize("name", [name for name in SAME if name.split()[-1] != "olmo2"])
def test_what_is_not_half_is_replicated(run, name):
    alone = run.alone[name].rows
    for kind in alone.keys() - REPLICATED - {"spare"}:
        assert sum(process[name].rows[kind] for process in run.processes) == alone[kind], kind
    for process in run.processes:
        for kind in {"rope", "codebooks"} & alone.keys():
            assert process[name].rows[kind] == alone[kind]
        # beside their share, sinks and widths have a number or a byte per token that says which are padding
        for kind in {"sinks", "widths"} & alone.keys():
            assert alone[kind] / 2 <= process[name].rows[kind] <= alone[kind] / 2 + 2 * 8 * (PROMPT + 60)


@pytest.mark.parametrize("name", ["fitted llama", "calibrated llama", "calibrated qwen3"])
def test_codebooks_are_fitted_to_the_heads_of_all_processes(run, name):
    expected = run.alone[name].codebooks
    assert len(expected) == 4
    for process in run.processes:
        torch.testing.assert_close(torch.tensor(process[name].codebooks), torch.tensor(expected), rtol=0, atol=1e-5)


def test_heads_that_every_process_sees_are_not_split(run):
    for process in run.processes:
        assert process["together olmo2"].rows == run.alone["together olmo2"].rows


REFUSED = {
    "together llama": "decides for all heads of a token together.*granularity='head'",
    "all layers llama": "decides for all heads of a token together",
    "norms llama": "calibration of all heads.*Leave the calibration out",
    "stranger llama": "of another model: the weights .* are others",
    "neighbours llama": "process: .* in the file, .* here",
    "learning llama": "split over processes.*Calibrate it in one process",
    "one head": "1 kv heads, which do not divide over 2 processes",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_differ_is_refused_in_every_process(run, name):
    for process in run.processes:
        assert re.search(REFUSED[name], process[name].error or ""), process[name].error


def test_the_main_process_tells_all(run):
    for process in run.processes:
        assert process["plain llama"].shared == {"from": 0, "processes": 2}


def test_one_process_needs_no_other():
    assert (parallel.rank(), parallel.world_size(), parallel.is_main()) == (0, 1, True)
    assert parallel.start("cpu") == torch.device("cpu")
    assert parallel.share({"pair": (1, 2)}) == {"pair": [1, 2]}
    assert parallel.total(7) == 7
    with pytest.raises(TypeError, match="JSON cannot say"):
        parallel.share(object())
    with pytest.raises(ValueError, match="this is the only one"):
        parallel.load_sharded("anywhere", torch.float32, "cpu")
    with pytest.raises(ValueError, match="'cpu' or 'cuda'"):
        parallel.start("auto")


def test_processes_that_have_not_met_share_nothing(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"call start\(device\) first"):
        parallel.share(1)
    with pytest.raises(RuntimeError, match=r"call start\(device\) first"):
        parallel.total(1)
