"""A run: what is already known is taken from the store, the rest measured and stored as it comes."""

import math
from collections.abc import Callable

from ..errors import message
from . import parallel
from .cells import Result
from .engines import Engine, local
from .store import Store
from .workbench import Workbench


class Unstored(OSError):
    """A result could not be written; those before it are safe."""


def sweep(
    bench: Workbench,
    store: Store,
    engine: Engine = local,
    *,
    retry_failed: bool = False,
    heard: Callable[[Result, bool], None] = lambda result, kept: None,
) -> list[Result]:
    """The results of all cells of `bench`, in their order; `store` has to be open.

    heard: called with each result as it comes, and whether it was kept from an earlier run.

    Raises Unstored when the disk is full or gone.
    """
    results: dict[str, Result] = {}
    for planned in bench.cells:
        found = store.find(planned.cell)
        if found is not None and (found.error is None or not retry_failed):
            results[planned.cell.key] = found
            heard(found, True)
    pending = [planned for planned in bench.cells if planned.cell.key not in results]
    if parallel.world_size() > 1:
        parallel.share([planned.cell.key for planned in pending])
    for measured in engine(bench, pending) if pending else ():
        result = finite(measured)
        try:
            try:
                store.put(result)
            except (TypeError, ValueError) as error:
                # samples of a plugin that no file can hold
                reason = f"cannot be stored: {message(error)}"
                result = result.model_copy(update={"outcome": None, "error": reason})
                store.put(result)
        except OSError as error:
            raise Unstored(
                f"cannot write to {store.folder}: {message(error)}. The {len(results)} results so far are safe; make "
                "room and run the same command again"
            ) from error
        results[result.cell.key] = result
        heard(result, False)
    return [results[planned.cell.key] for planned in bench.cells]


def assist(bench: Workbench) -> None:
    """What the other processes of torchrun do while the main one runs `sweep`: compute their share of the same cells.

    They keep nothing: figures are equal in all processes, and so are the bits that each holds per number.
    """
    pending = set(parallel.share(None))
    for planned in bench.cells:
        if planned.cell.key in pending:
            bench.measure(planned)


def finite(result: Result) -> Result:
    """The result, a failure if one of its figures is not finite."""
    outcome = result.outcome
    if outcome is None:
        return result
    figures = {**outcome.metrics, **outcome.errors, **outcome.latency}
    figures |= outcome.memory.model_dump() if outcome.memory else {}
    for layer in outcome.layers:
        figures |= {f"layer {layer.index} keys": layer.key, f"layer {layer.index} values": layer.value}
    wrong = sorted(name for name, value in figures.items() if not math.isfinite(value))
    if not wrong:
        return result
    return result.model_copy(update={"outcome": None, "error": f"figures that are not finite: {', '.join(wrong)}"})
