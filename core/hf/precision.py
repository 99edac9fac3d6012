"""What autocast must not touch."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Context in which autocast leaves products alone: scores rounded to 16 bits would spoil attention."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    # made anew each time: threads must not share one
    return torch.autocast(device.type, enabled=False)
