"""A run: what is already known is taken from the store, the rest measured and stored as it comes."""

import math
from collections.abc import Callable

from ..errors import message
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
    for measured in engine(bench, pending) if pending else ():
        result = finite(measured)
        try:
            store.put(result)
        except OSError as error:
            raise Unstored(
                f"cannot write to {store.folder}: {message(error)}. The {len(results)} results so far are safe; make "
                "room and run the same command again"
            ) from error
        results[result.cell.key] = result
        heard(result, False)
    return [results[planned.cell.key] for planned in bench.cells]


def finite(result: Result) -> Result:
    """The result, a failure if one of its figures is not finite."""
    figures = {**result.outcome.metrics, **result.outcome.errors, **result.outcome.latency} if result.outcome else {}
    wrong = sorted(name for name, value in figures.items() if not math.isfinite(value))
    if not wrong:
        return result
    return result.model_copy(update={"outcome": None, "error": f"figures that are not finite: {', '.join(wrong)}"})
