"""Scores of tasks of lm-evaluation-harness through a cache, and how they came about."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from transformers import Cache, PreTrainedModel

from ... import registry
from ...core import CacheQuantizer, detach
from ...core.hf.attach import is_attached
from .harness import require_harness
from .local_tasks import local_task
from .reading import Protocol, Reading

# resamplings behind standard errors of metrics that are no means
RESAMPLINGS = 1000

# of sampled text and sampled examples, the harness's own default
SEED = 1234

# they tell how to use what we do not offer
CHATTER = ("lm_eval.api.task", "lm_eval.models.huggingface")


class Score(BaseModel):
    """One metric of one task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    metric: str
    """Its name in the harness, with the filter where there is one: `acc`, `exact_match,strict-match`."""
    value: float
    stderr: float | None
    """None where the harness knows none, as for one sample."""
    higher_is_better: bool
    samples: int


class Scores(BaseModel):
    """What `evaluate` found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cache: str
    """Spec of the strategy, or what else made the cache."""
    lm_eval: str
    """Version of the harness."""
    scores: tuple[Score, ...]
    predictions: tuple[dict[str, int | float | str | None], ...]
    """One line per sample, the same ones in the same order for every cache: `task`, `doc_id`, `target`, `prediction`
    (what was generated, or the index of the choice), `filter` (of answers, where there is one; each has its line),
    `log_likelihood` (`log_likelihood_0`, ... where there are choices), and each metric."""
    readings: dict[str, Reading]
    """How the scores came about, by task (or group of tasks) as it was given."""

    def value(self, task: str, metric: str) -> float:
        """One score. Raises KeyError, listing what there is."""
        for score in self.scores:
            if (score.task, score.metric) == (task, metric):
                return score.value
        known = ", ".join(f"{score.task} {score.metric}" for score in self.scores)
        raise KeyError(f"there is no {metric!r} of {task!r}; there are {known}")


def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    cache: str | CacheQuantizer | Callable[[PreTrainedModel], Cache] | None,
    tasks: Sequence[str | Path | dict[str, Any]],
    *,
    protocol: Protocol = "decode",
    limit: int | None = None,
    batch_size: int = 8,
    fewshot: int | None = None,
    options: dict[str, Any] | None = None,
    **arguments: Any,
) -> Scores:
    """Run tasks through a cache; the model is left as it was found, attached or not.

    cache: a strategy or its spec; a function that makes an empty cache for the model; None: `DynamicCache`.
    tasks: files as `local_task` reads them (a `Path`, or text that ends in `.jsonl`), configurations, or names of tasks
        of the harness, whose data it fetches from the hub or its cache.
    protocol: see `CacheQuantLM`.
    limit: samples per task; all when None.
    fewshot: examples before each question; the task's own number when None, 0 for files.
    options: those of `PackedCache`.
    arguments: others of the harness's model class, such as `max_length` and `add_bos_token`.

    Raises ImportError where the harness is not installed, and what `local_task` and `CacheQuantLM` raise.
    """
    require_harness()
    from lm_eval.tasks import TaskManager

    from .model import CacheQuantLM

    if not tasks:
        raise ValueError("no tasks were given; give files or names of tasks")
    chosen = [_configured(task, limit, fewshot or 0) for task in tasks]
    attached = is_attached(model)
    made = callable(cache) and not isinstance(cache, CacheQuantizer)
    source: dict[str, Any] = {"cache": cache} if made else {"strategy": cache}
    scores: list[Score] = []
    predictions: list[dict[str, int | float | str | None]] = []
    readings: dict[str, Reading] = {}
    try:
        with _quiet():
            lm = CacheQuantLM(
                model,
                tokenizer=tokenizer,
                protocol=protocol,
                batch_size=batch_size,
                **source,
                **(options or {}),
                **arguments,
            )
        # reading the thousands of tasks that come along takes seconds
        known = TaskManager(include_defaults=any(isinstance(task, str) for task in chosen))
        for task in chosen:
            lm.forget_reading()
            found = _run(lm, known, task, limit, fewshot)
            given = task if isinstance(task, str) else task["task"]
            if given in readings:
                raise ValueError(f"two tasks are called {given!r}; give one of them another name")
            readings[given] = lm.reading
            scores += _scores(found)
            predictions += [
                _prediction(name, sample, found["higher_is_better"][name])
                for name, samples in found["samples"].items()
                for sample in samples
            ]
    finally:
        if not attached:
            detach(model)
    return Scores(
        cache=_name(cache),
        lm_eval=version("lm_eval"),
        scores=tuple(scores),
        predictions=tuple(predictions),
        readings=readings,
    )


def _run(lm: Any, known: Any, task: str | dict[str, Any], limit: int | None, fewshot: int | None) -> dict[str, Any]:
    """What the harness finds. `simple_evaluate` does the same, and spends seconds on listing what is installed."""
    from lm_eval.evaluator import evaluate as run

    with _quiet():
        loaded = known.load([task])
    for each in loaded["tasks"].values():
        default = each.get_config("num_fewshot")
        if default is None or (fewshot is not None and default):
            each.set_config(key="num_fewshot", value=fewshot or 0)
        each.set_fewshot_seed(SEED)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        found: Any = run(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=RESAMPLINGS)
    if found is None:
        raise RuntimeError("this is not the first process of a distributed run, which alone has the scores")
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    levels = {name: logging.getLogger(name).level for name in CHATTER}
    for name in CHATTER:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _configured(task: str | Path | dict[str, Any], limit: int | None, fewshot: int) -> str | dict[str, Any]:
    if isinstance(task, Path) or (isinstance(task, str) and task.endswith(".jsonl")):
        return local_task(task, limit=limit, fewshot=fewshot)
    return task


def _name(cache: Any) -> str:
    if cache is None:
        return "DynamicCache"
    if isinstance(cache, str):
        return registry.spec(registry.parse(cache))
    if isinstance(cache, CacheQuantizer):
        return registry.spec(cache)
    return getattr(cache, "__name__", type(cache).__name__)


def _scores(found: Any) -> list[Score]:
    scores = []
    for task, results in found["results"].items():
        for key, value in results.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = results.get(f"{metric}_stderr,{kind}")
            scores.append(
                Score(
                    task=task,
                    metric=metric if kind == "none" else f"{metric},{kind}",
                    value=value,
                    stderr=stderr if isinstance(stderr, int | float) else None,
                    higher_is_better=bool(found["higher_is_better"].get(task, {}).get(metric, True)),
                    samples=int(found["n-samples"].get(task, {}).get("effective", 0)),
                )
            )
    return scores


def _prediction(task: str, sample: dict[str, Any], metrics: dict[str, Any]) -> dict[str, int | float | str | None]:
    """A sample of the harness, without what the task's file says anyway."""
    answers = sample["filtered_resps"]
    line: dict[str, int | float | str | None] = {
        "task": task,
        "doc_id": sample["doc_id"],
        "target": str(sample["target"]),
    }
    if sample.get("filter", "none") != "none":
        line["filter"] = sample["filter"]
    chances = [answer[0] for answer in answers if isinstance(answer, list | tuple)]
    if not chances:
        # generated text, or the log-likelihood of a whole text
        line["prediction"] = answers[0] if isinstance(answers[0], float | str) else str(answers[0])
    elif len(chances) == 1:
        line |= {"prediction": str(bool(answers[0][1])), "log_likelihood": float(chances[0])}
    else:
        line["prediction"] = str(chances.index(max(chances)))
        line |= {f"log_likelihood_{i}": float(chance) for i, chance in enumerate(chances)}
    scored = ((name, sample.get(name)) for name in metrics)
    return line | {name: float(value) for name, value in scored if isinstance(value, int | float)}
