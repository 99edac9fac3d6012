"""Who measures cells: this process, one after the other, or the workers of a Ray cluster, one cell a task."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch

from ..errors import Unusable, message
from .cells import Cell, Result
from .job import Job
from .workbench import Planned, Workbench

Engine = Callable[[Workbench, Sequence[Planned]], Iterator[Result]]


def local(bench: Workbench, pending: Sequence[Planned]) -> Iterator[Result]:
    """In this process."""
    for planned in pending:
        yield bench.measure(planned)


def ray(bench: Workbench, pending: Sequence[Planned]) -> Iterator[Result]:
    """On a Ray cluster: the one that RAY_ADDRESS names or that runs here, else one of this machine's cores.

    Each worker loads the model once, and has to have the same packages, plugins, models and texts. A task takes one
    GPU if the job computes on one, else as many cores as the job has threads. Results come in the order they are done.

    Raises Unusable if Ray is not installed or does not start.
    """
    try:
        import ray as cluster
    except ImportError as error:
        raise Unusable(
            'Ray is not installed; pip install "cachequant[ray]", or measure here with --engine local', "--engine"
        ) from error
    ours = not cluster.is_initialized()
    if ours:
        try:
            cluster.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise Unusable(f"cannot start Ray: {message(error)}", "--engine") from error
    try:
        yield from _distribute(cluster, bench, pending)
    finally:
        if ours:
            cluster.shutdown()


def _distribute(cluster: Any, bench: Workbench, pending: Sequence[Planned]) -> Iterator[Result]:
    device = bench.job.device.partition(":")[0]
    gpu = torch.cuda.is_available() if device == "auto" else device != "cpu"
    resources = {"num_gpus": 1, "num_cpus": 1} if gpu else {"num_cpus": bench.job.threads or 1}
    task = cluster.remote(max_retries=1, **resources)(measure_there)
    # a worker sees one GPU, its own
    job = bench.job.model_copy(update={"device": device}).model_dump_json()
    here = os.getcwd()
    waiting = {task.remote(job, planned.cell.model_dump_json(), here): planned for planned in pending}
    try:
        while waiting:
            (done, *_), _ = cluster.wait(list(waiting), num_returns=1)
            planned = waiting.pop(done)
            try:
                yield Result.model_validate_json(cluster.get(done))
            except cluster.exceptions.RayError as error:
                # a worker that died, or could not load the model, takes its cell with it and no other
                cause = getattr(error, "cause", None) or error
                reason = f"{type(cause).__name__}: {message(cause)}"
                yield Result(cell=planned.cell, environment=bench.environment, error=reason)
    finally:
        for each in waiting:
            cluster.cancel(each, force=True)


def measure_there(job: str, cell: str, folder: str) -> str:
    """On a worker: the result, as JSON, of a cell of `job`, itself JSON.

    folder: the one that relative paths were given in.

    Raises LookupError, saying what differs, if the cell is another one here.
    """
    if os.path.isdir(folder):
        os.chdir(folder)
    bench = _bench(job)
    wanted = Cell.model_validate_json(cell)
    for planned in bench.cells:
        if planned.cell.key == wanted.key:
            return bench.measure(planned).model_dump_json()
    alike = [
        each.cell for each in bench.cells if (each.cell.task, each.cell.strategy) == (wanted.task, wanted.strategy)
    ]
    found = min((_differences(wanted, each) for each in alike), key=len, default=["its strategy or task"])
    raise LookupError(
        f"worker {os.uname().nodename} would measure something else, {wanted.folder} differs there in: "
        f"{', '.join(found)}; give it the same cachequant, plugins, model, texts and kind of device"
    )


def _differences(one: Cell, other: Cell) -> list[str]:
    """The fields in which two cells differ, as paths: `versions.torch`."""
    found = []
    for name, value in one.model_dump(mode="json").items():
        there = other.model_dump(mode="json")[name]
        if isinstance(value, dict) and isinstance(there, dict):
            found += [f"{name}.{key}" for key in value | there if value.get(key) != there.get(key)]
        elif value != there:
            found.append(name)
    return found


@lru_cache(maxsize=1)
def _bench(job: str) -> Workbench:
    return Workbench(Job.model_validate_json(job))


ENGINES: dict[str, Engine] = {"local": local, "ray": ray}
