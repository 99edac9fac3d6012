"""Tasks of lm-evaluation-harness from local files: no hub, no network, no dataset cache.

A file has one JSON object per line, all of one of these kinds:

- multiple choice (PIQA, MathQA, HellaSwag): `query`, `choices`, `gold` (index of the right one). Scored by the
  likeliest choice.
- continuation (LAMBADA): `context`, `continuation`. Scored by whether the continuation is what greedy decoding gives,
  and by its log-likelihood.
- generation: `context`, `answer`. Scored by whether the first line of what is generated is the answer, and whether it
  contains it.
- reasoning (GSM8K): `context`, `chain_of_thought`, `answer`. As generation, where the answer is the last number.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

# tokens that an answer may take, without and with reasoning before it
ANSWER_TOKENS, REASONING_TOKENS = 32, 256

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")

Kind = Literal["multiple choice", "continuation", "generation", "reasoning"]


class _Field(NamedTuple):
    name: str
    kind: type
    wanted: str


_TEXT = "a text that is not empty"
FIELDS: dict[Kind, tuple[_Field, ...]] = {
    "multiple choice": (
        _Field("query", str, _TEXT),
        _Field("choices", list, "a list of at least two texts that are not empty"),
        _Field("gold", int, "the index of the right choice"),
    ),
    "continuation": (_Field("context", str, _TEXT), _Field("continuation", str, _TEXT)),
    "reasoning": (
        _Field("context", str, _TEXT),
        _Field("chain_of_thought", str, _TEXT),
        _Field("answer", str, _TEXT),
    ),
    "generation": (_Field("context", str, _TEXT), _Field("answer", str, _TEXT)),
}


def local_task(path: str | Path, name: str | None = None, limit: int | None = None, fewshot: int = 0) -> dict[str, Any]:
    """The configuration of a task, for `simple_evaluate(tasks=[...])`; its rows are read now.

    name: the file's, without the ending, when None.
    limit: score this many rows at most; all when None.
    fewshot: the first rows of the file, which are not scored, stand as examples before every question.

    Raises OSError for a file that cannot be read, and ValueError, naming file, line and field, for rows of no or of
    different kinds.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} scores nothing; use at least 1, or None for all rows")
    if fewshot < 0:
        raise ValueError(f"fewshot={fewshot} is negative; use 0 for no examples")
    kind, rows = _read(path, None if limit is None else limit + fewshot)
    if len(rows) <= fewshot:
        raise ValueError(
            f"{path}: fewshot={fewshot} examples leave none of {len(rows)} rows to score; use at most {len(rows) - 1}"
        )
    docs = [_DOCUMENTS[kind](row) for row in rows]
    splits = {"test": docs[fewshot:], "examples": docs[:fewshot]} if fewshot else {"test": docs}
    examples: dict[str, Any] = {"fewshot_split": "examples", "fewshot_config": {"sampler": "first_n"}}
    return {
        "task": name or path.stem,
        "custom_dataset": lambda **metadata: _datasets(splits),
        "test_split": "test",
        "num_fewshot": fewshot,
        "doc_to_text": "{{text}}",
        "target_delimiter": "",
        "fewshot_delimiter": "\n\n",
        "metadata": {"version": 1},
        **(examples if fewshot else {}),
        **_scoring(kind),
    }


def _datasets(splits: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    from datasets import Dataset  # of the harness, which is optional

    return {name: Dataset.from_list(docs) for name, docs in splits.items()}


# ---- rows ------------------------------------------------------------------------------------------------------------


def _read(path: Path, limit: int | None) -> tuple[Kind, list[dict[str, Any]]]:
    kind: Kind | None = None
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if limit is not None and len(rows) >= limit:
                break
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: not JSON ({error}); one object per line is expected") from error
            if not isinstance(row, dict):
                raise ValueError(f"{place}: {type(row).__name__} where an object is expected")
            kind = kind or _kind_of(row, place)
            _require_fields(row, kind, place)
            rows.append(row)
    if kind is None:
        raise ValueError(f"{path} has no rows; give a file with one JSON object per line")
    return kind, rows


def _kind_of(row: dict[str, Any], place: str) -> Kind:
    """The kind whose fields are all there, else the one that lacks the least is asked for."""
    for kind, fields in FIELDS.items():
        if all(field.name in row for field in fields):
            return kind
    shares: dict[Kind, float] = {
        kind: sum(field.name in row for field in fields) / len(fields) for kind, fields in FIELDS.items()
    }
    nearest: Kind = max(shares, key=lambda kind: shares[kind])
    if shares[nearest]:
        missing = ", ".join(field.name for field in FIELDS[nearest] if field.name not in row)
        raise ValueError(f"{place}: {missing} missing for a row of {nearest}; it has {', '.join(row)}")
    kinds = "; ".join(f"{kind}: {', '.join(field.name for field in fields)}" for kind, fields in FIELDS.items())
    raise ValueError(f"{place}: fields {', '.join(row) or 'none'} are those of no kind of row. {kinds}")


def _require_fields(row: dict[str, Any], kind: Kind, place: str) -> None:
    for field in FIELDS[kind]:
        if field.name not in row:
            raise ValueError(f"{place}: {field.name} is missing; the rows before are of {kind}")
        value = row[field.name]
        # numbers are answers too
        value = str(value) if field.name == "answer" and isinstance(value, int | float) else value
        if not isinstance(value, field.kind) or isinstance(value, bool) or value in ("", []):
            raise ValueError(f"{place}: {field.name} is {row[field.name]!r}, it must be {field.wanted}")
    if kind == "multiple choice":
        choices = row["choices"]
        if len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
            raise ValueError(f"{place}: choices is {choices!r}, it must be {FIELDS[kind][1].wanted}")
        if not 0 <= row["gold"] < len(choices):
            raise ValueError(
                f"{place}: gold is {row['gold']}, with {len(choices)} choices it is 0 to {len(choices) - 1}"
            )


# ---- documents -------------------------------------------------------------------------------------------------------


def _joint(text: str) -> tuple[str, str]:
    """A text without the spaces at its end, and what stands between it and what follows.

    Tokenizers write a space with the word it precedes, so it belongs to what is scored.
    """
    bare = text.rstrip(" ")
    return bare, "" if bare == text and text[-1:].isspace() else " "


def _choice_document(row: dict[str, Any]) -> dict[str, Any]:
    text, joint = _joint(row["query"])
    return {"text": text, "choices": [joint + choice for choice in row["choices"]], "gold": row["gold"]}


def _continuation_document(row: dict[str, Any]) -> dict[str, Any]:
    text, joint = _joint(row["context"])
    continuation = row["continuation"]
    return {"text": text, "target": continuation if continuation[:1].isspace() else joint + continuation}


def _generation_document(row: dict[str, Any]) -> dict[str, Any]:
    text, joint = _joint(row["context"])
    answer = str(row["answer"]).strip()
    return {"text": text, "target": joint + answer, "answer": answer}


def _reasoning_document(row: dict[str, Any]) -> dict[str, Any]:
    answer = str(row["answer"]).strip()
    return {
        "text": f"Question: {row['context'].strip()}\nAnswer:",
        "target": f" {row['chain_of_thought'].strip()}\n#### {answer}",
        "answer": answer,
    }


_DOCUMENTS: dict[Kind, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "multiple choice": _choice_document,
    "continuation": _continuation_document,
    "generation": _generation_document,
    "reasoning": _reasoning_document,
}


# ---- scores ----------------------------------------------------------------------------------------------------------


def _scoring(kind: Kind) -> dict[str, Any]:
    if kind == "multiple choice":
        return {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [_mean("acc"), _mean("acc_norm")],
        }
    if kind == "continuation":
        return {
            "output_type": "loglikelihood",
            "doc_to_target": "{{target}}",
            "process_results": _continuation_scores,
            "metric_list": [_mean("acc"), _mean("log_likelihood")],
        }
    reasons = kind == "reasoning"
    return {
        "output_type": "generate_until",
        "doc_to_target": "{{target}}",
        "generation_kwargs": {
            "until": ["Question:", "\n\n"] if reasons else ["\n"],
            "max_gen_toks": REASONING_TOKENS if reasons else ANSWER_TOKENS,
            "do_sample": False,
        },
        "process_results": _reasoning_scores if reasons else _generation_scores,
        "metric_list": [_mean("exact_match"), *([] if reasons else [_mean("contains")])],
    }


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def _continuation_scores(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    ((log_likelihood, greedy),) = results
    return {"acc": float(greedy), "log_likelihood": log_likelihood}


def _generation_scores(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    line, answer = _plain((results[0].strip().splitlines() or [""])[0]), _plain(doc["answer"])
    return {"exact_match": float(line == answer), "contains": float(answer in line)}


def _reasoning_scores(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    numbers = NUMBER.findall(results[0])
    found = numbers[-1].replace(",", "") if numbers else ""
    return {"exact_match": float(found == doc["answer"].replace(",", ""))}


def _plain(text: str) -> str:
    """Without what answers may differ in: case, space, a full stop at the end."""
    return " ".join(text.lower().split()).rstrip(".")
