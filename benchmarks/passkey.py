"""Passkey retrieval: can a model, reading through a given KV cache, repeat a number hidden far back in its context?

The test follows Mohtashami and Jaggi, https://arxiv.org/abs/2305.16300, with the interpreter's own text as filler.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .corpus import stdlib_text

NEEDLE = "\n\nThe pass key is {key}. Remember it.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is"
KEY_DIGITS = 5
# a space and five digits, in tokenizers that write each as one token; fewer in all others
ANSWER_TOKENS = KEY_DIGITS + 1
# The question is fed after the rest of the prompt, so that even the first answer digit is read from the stored cache.
TAIL_TOKENS = 16
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class PasskeyPrompt:
    """Token ids of a prompt, the key it hides and where: depth 0 is the beginning of the filler, 1 its end."""

    ids: list[int]
    key: str
    depth: float


@dataclass(frozen=True)
class PasskeyResult:
    """Share of keys repeated exactly, in all and by depth."""

    accuracy: float
    by_depth: dict[float, float]
    length: int
    samples: int

    def __float__(self) -> float:
        return self.accuracy


def filler_ids(tokenizer: Any) -> list[int]:
    """Tokenize the held-out corpus, the filler of every measured prompt."""
    return tokenizer(stdlib_text("heldout").text, add_special_tokens=False, verbose=False).input_ids


def passkey_prompt(
    tokenizer: Any, filler: Sequence[int], length: int, depth: float = 0.5, rng: random.Random | None = None
) -> PasskeyPrompt:
    """Hide a random key in a random stretch of `filler` and ask for it.

    The prompt has `length - ANSWER_TOKENS` tokens, so that prompt and answer together fill `length` positions.

    Raises:
        ValueError: `depth` is outside 0..1, or `length` or `filler` is too short.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth={depth} lies outside the text; use 0 (its beginning) to 1 (its end)")
    rng = rng or random.Random(0)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    question = _encode(tokenizer, QUESTION)
    key = "".join(rng.choices("0123456789", k=KEY_DIGITS))
    needle = _encode(tokenizer, NEEDLE.format(key=key))
    room = length - ANSWER_TOKENS - len(start) - len(needle) - len(question)
    if room < 0:
        raise ValueError(f"length={length} has no room for needle and question; use at least {length - room}")
    if len(filler) < room:
        raise ValueError(f"the filler has {len(filler)} tokens, length={length} needs {room}; pass a longer text")
    offset = rng.randint(0, len(filler) - room)
    text = list(filler[offset : offset + room])
    if key in tokenizer.decode(text):
        # the filler must not give the answer away; numbers this long are rare enough that drawing again ends
        return passkey_prompt(tokenizer, filler, length, depth, rng)
    cut = round(depth * room)
    return PasskeyPrompt([*start, *text[:cut], *needle, *text[cut:], *question], key, depth)


def passkey_accuracy(
    model: Any,
    tokenizer: Any,
    length: int,
    make_cache: Callable[[], Any] | None = None,
    *,
    samples: int = 20,
    depths: Sequence[float] = DEPTHS,
    seed: int = 0,
    batch_size: int = 1,
    filler: Sequence[int] | None = None,
) -> PasskeyResult:
    """Share of keys that greedy decoding repeats in full; sample i hides its key at `depths[i % len(depths)]`.

    Args:
        length: positions that prompt and answer fill together.
        make_cache: returns an empty transformers cache for one batch; the model's own exact cache when None.
        filler: token ids to hide the keys in; the held-out corpus when None.

    Raises:
        ValueError: `length` is beyond the model's context, or one of the other arguments is out of range.
    """
    context = model.config.max_position_embeddings
    if length > context:
        raise ValueError(f"length={length} is beyond the model's context; use at most {context}")
    if samples < 1 or batch_size < 1 or not depths:
        raise ValueError(f"got samples={samples}, batch_size={batch_size}, depths={depths}; use at least one of each")
    filler = filler_ids(tokenizer) if filler is None else filler
    rng = random.Random(seed)
    prompts = [passkey_prompt(tokenizer, filler, length, depths[i % len(depths)], rng) for i in range(samples)]
    hits: dict[float, list[bool]] = {}
    for i in range(0, samples, batch_size):
        batch = prompts[i : i + batch_size]
        answers = passkey_answers(model, tokenizer, batch, make_cache() if make_cache else None)
        for prompt, answer in zip(batch, answers, strict=True):
            hits.setdefault(prompt.depth, []).append(answer.startswith(prompt.key))
    by_depth = {depth: sum(hit) / len(hit) for depth, hit in sorted(hits.items())}
    return PasskeyResult(sum(map(sum, hits.values())) / samples, by_depth, length, samples)


def passkey_answers(model: Any, tokenizer: Any, prompts: Sequence[PasskeyPrompt], cache: Any) -> list[str]:
    """What greedy decoding answers to prompts of one length, one batch, read through the empty `cache`.

    A right answer begins with the key.

    Raises:
        ValueError: the model's logits are not finite.
    """
    answers = _greedy(model, torch.tensor([prompt.ids for prompt in prompts]), cache)
    return [tokenizer.decode(answer).strip() for answer in answers]


@torch.inference_mode()
def _greedy(model: Any, ids: torch.Tensor, cache: Any) -> list[list[int]]:
    """Continue `ids` [batch, seq] by ANSWER_TOKENS tokens through `cache`."""
    ids = ids.to(model.device)
    out = model(ids[:, :-TAIL_TOKENS], past_key_values=cache, use_cache=True, logits_to_keep=1)
    step, answer = ids[:, -TAIL_TOKENS:], []
    for _ in range(ANSWER_TOKENS):
        out = model(step, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        if not out.logits.isfinite().all():
            raise ValueError("the model's logits are not finite after reading this cache")
        step = out.logits[:, -1:].argmax(-1)
        answer.append(step)
    return torch.cat(answer, 1).tolist()


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids
