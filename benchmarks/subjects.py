"""What a leaderboard measures: models, their outlier twins and the text they read."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ..core.hf.calibrate import cut
from ..core.hf.identity import digest
from . import reference
from .calibration import SAMPLES, CalibrationText, Calibrator
from .corpus import stdlib_text
from .errors import Unusable, message
from .sweep import parallel

REFERENCE, TWIN = "reference", "outlier twin"

# Where a model names no context, it has no positions to run out of.
UNLIMITED = 2**20

WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
# Weights beyond this are not read whole for the sake of naming them.
HASHED_BYTES = 2**30
SAMPLED_BYTES = 2**20


class ModelCard(BaseModel):
    """Which model was measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    panel: str
    """Short name of the model, the heading of its columns."""
    architecture: str
    parameters: int
    layers: int
    context: int
    dtype: str
    weights_sha256: str | None = None
    """Of the files the model was loaded from, beyond 1 GiB of their sizes and ends; a twin has its model's. Of a model
    from the hub its commit."""
    identity_sha256: str | None = None
    """Of the configuration, and of a sample of all attention weights."""


class TextCard(BaseModel):
    """Which text was read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    sha256: str
    tokens: int


@dataclass(frozen=True)
class Panel:
    """A model to measure on, the text it reads, and what calibrates strategies for it."""

    card: ModelCard
    model: Any
    tokenizer: Any
    text: TextCard
    ids: Sequence[int]
    """Token ids of the text, without BOS."""
    residual_length: int
    """Newest tokens that caches keep exact."""
    calibrator: Calibrator


def open_panels(
    model: str | None = None,
    text: Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    twin: bool = True,
    residual_length: int = 32,
    calibration_text: Path | None = None,
    calibration_samples: int = SAMPLES,
    calibrating: bool = False,
) -> tuple[list[Panel], list[str]]:
    """The models to measure on, and what is odd about them.

    model: a folder or hub name; the bundled reference when None.
    text: a UTF-8 file; the held-out standard library when None.
    twin: also make the model's outlier twin. Where that is impossible a note says why.
    calibration_text: what strategies learn from; the rest of the standard library when None.
    calibrating: whether some will, so that notes have to say what is odd about it.

    Raises Unusable.
    """
    notes: list[str] = []
    name, content = read_text(text, "heldout", "--text")
    learned = None if calibration_text is None else read_text(calibration_text, "train", "--calibration-text")
    if learned is not None and learned[1] == content:
        raise Unusable(f"{calibration_text} is the text that is measured; calibrate on another", "--calibration-text")
    if text is not None and learned is None and calibrating:
        notes.append(
            f"strategies are calibrated on Python's standard library, not on text like {name}; "
            "--calibration-text gives another"
        )
    panel, loaded, tokenizer = load_model(model, dtype, device)
    models = [(panel, loaded)]
    if twin and (parallel.world_size() > 1 or hasattr(loaded, "hf_device_map")):
        notes.append("no outlier twin: the model is spread over devices")
    elif twin:
        try:
            models.append((TWIN, _twin(model, loaded, dtype, device)))
        except ValueError as error:
            notes.append(f"no outlier twin: {message(error)}")
    ids = tokenizer(content, add_special_tokens=False, verbose=False).input_ids
    card = TextCard(name=name, sha256=hashlib.sha256(content.encode()).hexdigest(), tokens=len(ids))
    weights = _weights_hash(reference.FOLDER if model is None else Path(model).expanduser())
    weights = weights or getattr(loaded.config, "_commit_hash", None)
    learnable = CalibrationText(
        lambda: learned or read_text(None, "train", "--calibration-text"), tokenizer, calibration_samples
    )
    return [
        Panel(
            card=_card(panel, each, context_of(loaded), weights),
            model=each,
            tokenizer=tokenizer,
            text=card,
            ids=ids,
            residual_length=residual_length,
            calibrator=Calibrator(each, learnable),
        )
        for panel, each in models
    ], notes


def calibration_windows(
    model: Any, tokenizer: Any, text: str, samples: int, length: int | None, heldout: int
) -> torch.Tensor:
    """Token ids `[samples + heldout, length]`, as `core.hf.calibrate.calibrate` takes them.

    Raises Unusable.
    """
    context = context_of(model)
    if length is not None and not 2 <= length <= context:
        raise Unusable(f"windows of {length} tokens: use 2 to {context}, the model's context", "--length")
    try:
        return torch.cat(cut(model, tokenizer, text, samples, length, heldout))
    except ValueError as error:
        raise Unusable(message(error), "--text") from error


def load_model(name: str | None, dtype: torch.dtype, device: str) -> tuple[str, Any, Any]:
    """What to call the model, the model and its tokenizer; the bundled reference when `name` is None.

    Raises Unusable.
    """
    logging.disable_progress_bar()
    _require_device(device)
    try:
        if name is None:
            if parallel.world_size() > 1:
                raise ValueError("the bundled reference fits one device; name a model, or start one process")
            model, tokenizer = reference.load(dtype)
            return REFERENCE, model.to(_one(device)), tokenizer
        panel, source = _source(name)
        tokenizer = AutoTokenizer.from_pretrained(source)
        if parallel.world_size() > 1:
            return panel, parallel.load_sharded(source, dtype, _one(device)), tokenizer
        spread = {"device_map": "auto"} if device == "auto" else {}
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="sdpa", **spread)
        return panel, (loaded if spread else loaded.to(device)).eval(), tokenizer
    except Exception as error:
        # from_pretrained raises whatever the file formats' readers raise
        raise Unusable(f"cannot load the model: {message(error)}", "--model") from error


def read_text(path: Path | None, split: Literal["train", "heldout"], option: str) -> tuple[str, str]:
    """Name and content of a UTF-8 file; of a part of the standard library when `path` is None.

    Raises Unusable, naming `option`.
    """
    try:
        if path is not None:
            return path.name, path.read_text(encoding="utf-8")
        corpus = stdlib_text(split)
    except OSError as error:
        raise Unusable(f"cannot read {path}: {error.strerror}" if path else message(error), option) from error
    except UnicodeDecodeError as error:
        raise Unusable(f"cannot read {path} as UTF-8: {error}", option) from error
    kind = "held-out" if split == "heldout" else "training part of the"
    return f"{kind} standard library of Python {corpus.python}", corpus.text


def context_of(model: Any) -> int:
    """Tokens the model takes."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or UNLIMITED


def _twin(name: str | None, model: Any, dtype: torch.dtype, device: str) -> Any:
    # the reference's is made in float32 and rounded once
    return reference.outlier_twin(model) if name is not None else reference.load(dtype, twin=True)[0].to(_one(device))


def _require_device(device: str) -> None:
    """Raises Unusable for a device that is not here, before a model is blamed for it."""
    if device == "auto":
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise Unusable(f"cannot compute on {device!r}: {message(error)}; use cpu, cuda or auto", "--device") from error


def _one(device: str) -> str:
    """`auto` where a process takes one device."""
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _source(name: str) -> tuple[str, str | Path]:
    """What to call the model, and what to load."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        panel = folder.resolve().name
        # not the name of another panel
        return f"{panel} (model)" if panel == TWIN else panel, folder
    if name.count("/") != 1 or name[0] in "/.~":
        raise FileNotFoundError(f"there is no folder {name!r}; give a model's folder or its hub name, owner/model")
    return name, name


def _card(panel: str, model: Any, context: int, weights: str | None) -> ModelCard:
    return ModelCard(
        panel=panel,
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=model.config.get_text_config(decoder=True).num_hidden_layers,
        context=context,
        dtype=str(model.dtype).removeprefix("torch."),
        weights_sha256=weights,
        identity_sha256=digest(model),
    )


def _weights_hash(folder: Path) -> str | None:
    files = sorted(path for kind in WEIGHTS for path in folder.glob(kind)) if folder.is_dir() else []
    if not files:
        return None
    whole = sum(file.stat().st_size for file in files) <= HASHED_BYTES
    digest = hashlib.sha256()
    for file in files:
        if whole:
            digest.update(file.read_bytes())
            continue
        # names, sizes and both ends tell models apart
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            digest.update(content.read(SAMPLED_BYTES))
            content.seek(max(0, size - SAMPLED_BYTES))
            digest.update(content.read())
    return digest.hexdigest()
