"""Every variant of every installed strategy, and the caches of transformers, on a model and its outlier twin.

The time is that of one evaluation, without the calibration of strategies that need one. What it found is in
`extra_info` and in the summary below the tables.
"""

from cachequant.benchmarks.arena import of_memory
from cachequant.benchmarks.errors import message
from cachequant.benchmarks.sweep.cells import Result
from cachequant.core import detach


def test_accuracy_memory(benchmark, arena, task, strategy, panel):
    planned = arena.planned(task, strategy, arena.panel(panel))
    name = planned.panel.card.panel
    benchmark.group = f"accuracy-memory on {name}, {planned.cell.task}"
    result = Result(cell=planned.cell, environment=arena.bench.environment)
    try:
        prepared = arena.prepared(planned)
        contender = planned.candidate.ready(planned.panel)
        result = result.model_copy(update={"calibration": contender.calibration})
        detach(planned.panel.model)
        outcome = benchmark.pedantic(planned.task.measure, args=(planned.panel, prepared, contender), rounds=1)
        result = result.model_copy(update={"outcome": outcome, "seconds": round(benchmark.stats.stats.max, 3)})
    except Exception as error:
        result = result.model_copy(update={"error": f"{type(error).__name__}: {message(error)}"})
    finally:
        detach(planned.panel.model)
    outcome = arena.enter(result).outcome
    benchmark.extra_info.update(strategy=strategy, group="accuracy-memory", model=name, task=planned.cell.task)
    benchmark.extra_info.update(outcome.metrics)
    if outcome.memory:
        benchmark.extra_info.update(context=outcome.memory.tokens, **of_memory(outcome.memory))
