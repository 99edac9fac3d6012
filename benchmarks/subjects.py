"""What a leaderboard measures: models, their outlier twins and the text they read."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from . import reference
from .corpus import stdlib_text
from .environment import Environment
from .leaderboard import Leaderboard, ModelCard, Subject, TextCard, message
from .streaming import Protocol, cut_windows

REFERENCE, TWIN = "reference", "outlier twin"

# Weights beyond this are not read for the sake of naming them.
HASHED_BYTES = 2**30


class Unusable(ValueError):
    """A model, text or protocol that cannot be measured; `option` is the command-line option that would mend it."""

    def __init__(self, text: str, option: str) -> None:
        super().__init__(text)
        self.option = option


def prepare(
    model: str | None = None,
    text: Path | None = None,
    *,
    windows: int = 6,
    window_length: int | None = None,
    residual_length: int = 32,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    twin: bool = True,
) -> tuple[Leaderboard, list[Subject]]:
    """An empty leaderboard, and the models with their exact runs.

    model: a folder or hub name; the bundled reference when None.
    text: a UTF-8 file; the held-out standard library when None.
    twin: also make the model's outlier twin. Where that is impossible a note says why.

    Raises Unusable.
    """
    models, tokenizer, notes = _models(model, dtype, device, twin)
    name, content = _text(text)
    ids = tokenizer(content, add_special_tokens=False, verbose=False).input_ids
    # a model that names no context has no positions to run out of
    context = getattr(models[0][1].config.get_text_config(decoder=True), "max_position_embeddings", 2**20)
    try:
        protocol = Protocol.fitting(context, windows, window_length, residual_length)
    except ValueError as error:
        raise Unusable(message(error), "--window-length") from error
    try:
        cut = cut_windows(ids, protocol, tokenizer.bos_token_id)
    except ValueError as error:
        raise Unusable(message(error), "--text") from error
    weights = _weights_hash(reference.FOLDER if model is None else Path(model).expanduser())
    cards = tuple(_card(panel, each, context, weights) for panel, each in models)
    board = Leaderboard(
        protocol=protocol,
        environment=Environment.current(str(models[0][1].device)),
        text=TextCard(name=name, sha256=hashlib.sha256(content.encode()).hexdigest(), tokens=len(ids)),
        models=cards,
        notes=tuple(notes),
    )
    return board, [Subject.of(card, each, cut, protocol) for card, (_, each) in zip(cards, models, strict=True)]


def _models(name: str | None, dtype: torch.dtype, device: str, twin: bool) -> tuple[list[tuple[str, Any]], Any, list]:
    """Models by panel, their tokenizer, and notes."""
    logging.disable_progress_bar()
    notes: list[str] = []
    try:
        if name is None:
            model, tokenizer = reference.load(dtype)
            models = [(REFERENCE, model)]
            if twin:
                models.append((TWIN, reference.load(dtype, twin=True)[0]))
        else:
            panel, source = _source(name)
            tokenizer = AutoTokenizer.from_pretrained(source)
            loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="sdpa")
            model = loaded.eval()
            models = [(panel, model)]
            if twin:
                try:
                    models.append((TWIN, reference.outlier_twin(model)))
                except ValueError as error:
                    notes.append(f"no outlier twin: {message(error)}")
        return [(panel, each.to(device)) for panel, each in models], tokenizer, notes
    except Exception as error:
        # from_pretrained raises whatever the file formats' readers raise
        raise Unusable(f"cannot load the model: {message(error)}", "--model") from error


def _source(name: str) -> tuple[str, str | Path]:
    """What to call the model, and what to load."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve().name, folder
    if name.count("/") != 1:
        raise FileNotFoundError(f"there is no folder {name!r}; give a model's folder or its hub name, owner/model")
    return name, name


def _text(path: Path | None) -> tuple[str, str]:
    """Name and content."""
    try:
        if path is not None:
            return path.name, path.read_text(encoding="utf-8")
        corpus = stdlib_text("heldout")
    except OSError as error:
        raise Unusable(f"cannot read {path}: {error.strerror}" if path else message(error), "--text") from error
    except UnicodeDecodeError as error:
        raise Unusable(f"cannot read {path} as UTF-8: {error}", "--text") from error
    return f"held-out standard library of Python {corpus.python}", corpus.text


def _card(panel: str, model: Any, context: int, weights: str | None) -> ModelCard:
    return ModelCard(
        panel=panel,
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=model.config.get_text_config(decoder=True).num_hidden_layers,
        context=context,
        dtype=str(model.dtype).removeprefix("torch."),
        weights_sha256=weights,
    )


def _weights_hash(folder: Path) -> str | None:
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files or sum(file.stat().st_size for file in files) > HASHED_BYTES:
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
