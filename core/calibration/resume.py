"""What a calibration has gathered so far, on disk, so that an interrupted one goes on where it stopped."""

import json
import os
import time
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FILE = "unfinished.safetensors"
SECONDS_BETWEEN = 10.0


class Unresumable(ValueError):
    """The folder holds the intermediate file of another calibration, or a damaged one."""


class Unfinished:
    """The intermediate file in `folder`; None keeps nothing."""

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self._path = None if folder is None else Path(folder).expanduser() / FILE
        self._saved = time.monotonic()

    def load(self, job: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """State and tensors of an earlier run of the same job, a hash of all that decides the result; None if none.

        Raises Unresumable when the file belongs to another job, or is damaged.
        """
        if self._path is None or not self._path.exists():
            return None
        try:
            with safe_open(self._path, framework="pt") as file:
                state = json.loads((file.metadata() or {})["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise Unresumable(f"{self._path} is damaged ({error!r}); remove it to begin anew") from error
        if state.pop("job", None) != job:
            raise Unresumable(
                f"{self._path} is from a calibration of another model, text or settings that was interrupted; "
                "repeat that one to finish it, remove the file, or choose another folder"
            )
        return state, tensors

    def save(self, job: str, state: dict[str, Any], tensors: dict[str, Tensor], *, now: bool = False) -> None:
        """Write, if the last time was long enough ago or `now` is set; the file is replaced only when complete."""
        if self._path is None or (not now and time.monotonic() - self._saved < SECONDS_BETWEEN):
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        named = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(named, partial, {"state": json.dumps({**state, "job": job})})
        partial.replace(self._path)
        self._saved = time.monotonic()

    def remove(self) -> None:
        """The calibration is finished."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
