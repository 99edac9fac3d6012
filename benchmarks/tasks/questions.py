"""Multiple-choice questions: from a file, with solved examples before them, or about a text."""

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import message
from .endings import Item

BETWEEN = "\n\n"
"""Ends a solved example."""

DISTRACTORS = 3
"""Wrong choices about a text."""

STRETCH, CUE = 8, 8
"""Tokens of a choice about a text, and of what is repeated before it."""

SHORTEST = 2 * (CUE + 2 * STRETCH * (DISTRACTORS + 1)) + CUE + 1
"""Context about a text, in which the choices find room however they lie."""


class Row(BaseModel):
    """A question as a line of a file has it; further fields are left alone."""

    model_config = ConfigDict(frozen=True)

    query: str = Field(min_length=1)
    choices: tuple[str, ...] = Field(min_length=2)
    gold: int = Field(ge=0, strict=True)

    @model_validator(mode="after")
    def _can_be_scored(self) -> Self:
        if self.gold >= len(self.choices):
            raise ValueError(f"gold is {self.gold}, but there are {len(self.choices)} choices, counted from 0")
        if not all(choice.strip() for choice in self.choices):
            raise ValueError("a choice is empty")
        return self


@dataclass(frozen=True)
class Question:
    """What is scored."""

    item: Item
    gold: int
    sizes: tuple[int, ...]
    """UTF-8 bytes of each choice."""
    place: str
    """Line of the file, or token of the text."""


def read_rows(file: Path) -> dict[int, Row]:
    """The questions of a file with one JSON object per line, by line number.

    Raises ValueError, naming file, line and what is missing.
    """
    try:
        lines = file.expanduser().read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}; give a file with one JSON object per line") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {file} as UTF-8: {error}") from error
    rows = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows[number] = Row.model_validate_json(line)
        except ValidationError as error:
            raise ValueError(
                f"{file}, line {number}: {message(error)}; each line is a JSON object with query (a text), "
                "choices (a list of at least two) and gold (the index of the right one)"
            ) from error
    if not rows:
        raise ValueError(f"{file} has no line; write one JSON object per line, with query, choices and gold")
    return rows


def hash_of(file: Path) -> str:
    """Of its contents. Raises ValueError where it cannot be read."""
    try:
        return hashlib.sha256(file.expanduser().read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error


class FileQuestions:
    """Questions of a file, each after other rows of it with their answers.

    samples: how many are asked, drawn with `seed`; the examples are drawn from the others where there are others.

    Raises ValueError where the file has fewer.
    """

    def __init__(self, tokenizer: Any, file: Path, samples: int, seed: int) -> None:
        self._tokenizer, self._file = tokenizer, file
        rows = read_rows(file)
        if len(rows) < samples:
            raise ValueError(f"{file} has {len(rows)} questions; use samples={len(rows)} or fewer")
        rng = random.Random(seed)
        asked = sorted(rng.sample(list(rows), samples))
        self._asked = {number: rows[number] for number in asked}
        others = [number for number in rows if number not in self._asked]
        rng.shuffle(others)
        self._rows, self._others = rows, others
        self._examples: dict[int, list[int]] = {}

    @property
    def longest_ending(self) -> int:
        """Tokens of the longest choice."""
        return max(len(ending) for _, endings in self._encoded.values() for ending in endings)

    @property
    def longest_query(self) -> int:
        """Tokens of the longest question itself, BOS included."""
        return len(_start(self._tokenizer)) + max(len(query) for query, _ in self._encoded.values())

    def filled(self, length: int) -> list[Question]:
        """After as many examples as give contexts of `length` tokens; the oldest is cut to that.

        Raises ValueError where a question alone is longer, or the file has too few examples.
        """
        if self.longest_query > length:
            raise ValueError(
                f"length={length} has no room for the longest question of {self._file}; use at least "
                f"{self.longest_query}, or shots=0"
            )
        start = _start(self._tokenizer)
        found = []
        for number, (query, _) in self._encoded.items():
            room = length - len(start) - len(query)
            before: list[int] = []
            for other in self._examples_for(number):
                if len(before) >= room:
                    break
                before = [*self._solved(other), *before]
            if len(before) < room:
                raise ValueError(
                    f"all other questions of {self._file} give {length - room + len(before)} tokens of context, "
                    f"length={length}; use a smaller length or a longer file"
                )
            found.append(self._question(number, [*start, *before[len(before) - room :]]))
        return found

    def after(self, shots: int) -> list[Question]:
        """After `shots` whole examples. Raises ValueError where the file has fewer."""
        found = []
        for number in self._encoded:
            examples = self._examples_for(number)
            if len(examples) < shots:
                raise ValueError(
                    f"{self._file} has {len(examples)} other questions; use shots={len(examples)} or fewer"
                )
            before = [token for other in examples[:shots] for token in self._solved(other)]
            found.append(self._question(number, [*_start(self._tokenizer), *before]))
        return found

    @cached_property
    def _encoded(self) -> dict[int, tuple[list[int], list[list[int]]]]:
        """Tokens of each question, and of its choices. They part where the texts of all choices still share tokens."""
        found = {}
        for number, row in self._asked.items():
            query = self._encode(row.query)
            whole = [self._encode(row.query + choice) for choice in row.choices]
            shared = min(_common(query, each) for each in whole)
            endings = [each[shared:] for each in whole]
            if not all(endings) or not shared + len(_start(self._tokenizer)):
                raise ValueError(f"{self._file}, line {number}: the tokenizer finds no token in the query or a choice")
            found[number] = (query[:shared], endings)
        return found

    def _question(self, number: int, before: list[int]) -> Question:
        query, endings = self._encoded[number]
        row = self._asked[number]
        return Question(
            item=Item((*before, *query), tuple(map(tuple, endings))),
            gold=row.gold,
            sizes=tuple(len(choice.encode()) for choice in row.choices),
            place=f"line {number}",
        )

    def _examples_for(self, number: int) -> list[int]:
        return self._others or [other for other in self._rows if other != number]

    def _solved(self, number: int) -> list[int]:
        if number not in self._examples:
            row = self._rows[number]
            self._examples[number] = self._encode(row.query + row.choices[row.gold] + BETWEEN)
        return self._examples[number]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def recollections(tokenizer: Any, ids: Sequence[int], samples: int, length: int, seed: int) -> list[Question]:
    """Passages of a text that are begun again at their end: which of four stretches came next?

    All choices, of `STRETCH` tokens, stand in the older half of the passage, and one of them right after the `CUE`
    tokens that are repeated: neither the newest tokens nor what the passage is about tell which.
    Contexts have `length` tokens and are spread evenly over the text without overlap.

    Raises ValueError where the text is too short, or a passage says the same over and over.
    """
    start = _start(tokenizer)
    taken = length - len(start) - CUE
    fitting = len(ids) // taken
    if fitting < samples:
        remedy = f"use samples={fitting} or fewer" if fitting else "use a longer text or a smaller length"
        raise ValueError(
            f"the text has {len(ids)} tokens, samples={samples} passages of {taken} need {samples * taken}; {remedy}"
        )
    rng = random.Random(seed)
    found = []
    for number in range(samples):
        begin = number * (len(ids) - taken) // max(1, samples - 1)
        passage = tuple(ids[begin : begin + taken])
        place, others = _places(passage, rng, begin)
        gold = rng.randrange(DISTRACTORS + 1)
        chosen = [*others[:gold], place, *others[gold:]]
        endings = tuple(passage[each : each + STRETCH] for each in chosen)
        found.append(
            Question(
                item=Item((*start, *passage, *passage[place - CUE : place]), endings, after=CUE),
                gold=gold,
                sizes=tuple(max(1, len(tokenizer.decode(each).encode())) for each in endings),
                place=f"token {begin + place}",
            )
        )
    return found


def _places(passage: tuple[int, ...], rng: random.Random, begin: int) -> tuple[int, list[int]]:
    """Where the stretch that is asked for begins, and where the wrong ones do."""
    places = list(range(CUE, len(passage) // 2 - STRETCH + 1))
    rng.shuffle(places)
    cues = Counter(passage[i : i + CUE] for i in range(len(passage) - CUE + 1))
    asked = next((place for place in places if cues[passage[place - CUE : place]] == 1), None)
    chosen = [] if asked is None else [asked]
    for place in places:
        apart = all(abs(place - other) >= STRETCH for other in chosen)
        new = passage[place : place + STRETCH] not in [passage[each : each + STRETCH] for each in chosen]
        if chosen and apart and new and len(chosen) <= DISTRACTORS:
            chosen.append(place)
    if len(chosen) <= DISTRACTORS:
        raise ValueError(
            f"the passage at token {begin} of the text says the same over and over: no {DISTRACTORS + 1} stretches of "
            f"{STRETCH} tokens in it differ; use a longer length, fewer samples or another text"
        )
    return chosen[0], chosen[1:]


def _start(tokenizer: Any) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _common(one: list[int], other: list[int]) -> int:
    """Tokens that both begin with."""
    differing = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))
