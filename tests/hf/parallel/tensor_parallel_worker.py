"""What the processes of torchrun do for `test_tensor_parallel`: every case it asks for, each answer into a file.

    torchrun --nproc-per-node 2 tensor_parallel_worker.py FOLDER

reads `request.json` there, a `Request`, and writes `process0.json` and `process1.json`, an `Answer` to each case.
"""

import copy
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import BaseModel, ConfigDict

from cachequant import registry
from cachequant.benchmarks.sweep import parallel
from cachequant.core import PackedCache, StaticPackedCache

RESIDUAL = 16
NEW_TOKENS = 24
ROOM = 256
"""Tokens that fit a static cache."""


class Case(BaseModel):
    """One strategy on one model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    model: str
    """A folder."""
    spec: str
    task: str = "generate"
    """A key of `TASKS`."""


class Request(BaseModel):
    """All of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cases: list[Case]
    ids: list[list[int]]
    mask: list[list[int]]


class Answer(BaseModel):
    """What came of a case in one process."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    error: str | None = None
    tokens: list[list[int]] = []
    logits: list[list[float]] = []
    """Of the last step, `[batch, vocabulary]`."""
    rows: dict[str, int] = {}
    """Bytes by kind."""
    device_bytes: int = 0
    total_bytes: int = 0
    """`device_bytes` of all processes."""
    codebooks: list[list[float]] = []
    """Of every layer and side, where there are any."""
    shared: Any = None
    """What the main process told all."""


def generate(model: Any, case: Case, ids: torch.Tensor, mask: torch.Tensor) -> Answer:
    """Greedy tokens through a packed cache, and what the cache then holds."""
    return _generated(model, PackedCache(model, registry.parse(case.spec), residual_length=RESIDUAL), ids, mask)


def generate_static(model: Any, case: Case, ids: torch.Tensor, mask: torch.Tensor) -> Answer:
    """The same through a static cache."""
    strategy = registry.parse(case.spec)
    cache = StaticPackedCache(model, strategy, residual_length=RESIDUAL, max_length=ROOM)
    return _generated(model, cache, ids, mask)


def continue_saved(model: Any, case: Case, ids: torch.Tensor, mask: torch.Tensor) -> Answer:
    """The same where the prompt's cache was copied, saved and loaded in between, each process having its own file."""
    strategy = registry.parse(case.spec)
    cache = PackedCache(model, strategy, residual_length=RESIDUAL)
    with torch.no_grad():
        model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
    file = _file(case, parallel.rank())
    copy.deepcopy(cache).save(file)
    return _generated(model, PackedCache.load(file, model, strategy), ids, mask)


def load_neighbours(model: Any, case: Case, ids: torch.Tensor, mask: torch.Tensor) -> Answer:
    """Reading what `continue_saved` wrote in the other process."""
    PackedCache.load(_file(case, 1 - parallel.rank()), model, registry.parse(case.spec))
    return Answer()


def calibrate(model: Any, case: Case, ids: torch.Tensor, mask: torch.Tensor) -> Answer:
    """Learning from a text on what is left of the model here."""
    registry.parse(case.spec).calibrate(model, None, ids, samples=1, heldout=0)  # type: ignore[attr-defined]
    return Answer()


TASKS = {
    "generate": generate,
    "generate-static": generate_static,
    "continue-saved": continue_saved,
    "load-neighbours": load_neighbours,
    "calibrate": calibrate,
}


def answer(model: Any, case: Case, request: Request) -> Answer:
    """What comes of a case, its error included."""
    try:
        return TASKS[case.task](model, case, torch.tensor(request.ids), torch.tensor(request.mask))
    except ValueError as error:
        return Answer(error=str(error))


def _generated(model: Any, cache: PackedCache, ids: torch.Tensor, mask: torch.Tensor) -> Answer:
    out = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    report = cache.memory()
    tables = [tables for layer in cache.packed_layers for tables in getattr(layer, "tables", {}).values()]
    return Answer(
        tokens=out.sequences[:, ids.shape[1] :].tolist(),
        logits=out.logits[-1].tolist(),
        rows=report.rows,
        device_bytes=report.device_bytes,
        total_bytes=parallel.total(report.device_bytes),
        codebooks=[each.codebook.tolist() for each in tables if each.codebook is not None],
        shared=parallel.share({"from": parallel.rank(), "processes": parallel.world_size()}),
    )


def _file(case: Case, process: int) -> Path:
    return Path(case.model) / f"cache-{process}-of-{parallel.world_size()}.safetensors"


def main(folder: Path) -> None:
    """All cases of the request in `folder`."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    request = Request.model_validate_json((folder / "request.json").read_text())
    parallel.start("cpu")
    models: dict[str, Any] = {}
    answers = {}
    for case in request.cases:
        if case.model not in models:
            models[case.model] = parallel.load_sharded(case.model, torch.float32, "cpu")
        answers[case.name] = answer(models[case.model], case, request)
    written = "{" + ",".join(f'"{name}":{each.model_dump_json()}' for name, each in answers.items()) + "}"
    (folder / f"process{parallel.rank()}.json").write_text(written)
    parallel.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
