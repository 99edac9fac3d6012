"""Where transformers versions from 5.13 on differ, and where accelerate hides what a model does."""

import torch
import transformers
from packaging.version import Version
from torch import nn

# before 5.15 a positive `crop` argument was the length to keep, and 0 emptied the cache
CROP_IS_RELATIVE = Version(transformers.__version__) >= Version("5.15.0.dev0")


def tokens_to_keep(length: int, argument: int) -> int:
    """Length after `crop(argument)` on a cache of `length` tokens, as the installed transformers means it.

    Raises ValueError for a positive argument where it no longer has a meaning.
    """
    if argument < 0:
        return max(0, length + argument)
    if not CROP_IS_RELATIVE:
        return min(argument, length)
    if argument > 0:
        raise ValueError(
            f"crop({argument}): pass a negative number of tokens to remove, or use cache.truncate(length) to keep some"
        )
    return length


def tokens_to_remove(length: int, keep: int) -> int:
    """The argument of the installed transformers' `crop` that keeps `keep` of `length` tokens."""
    return keep - length if CROP_IS_RELATIVE or keep == 0 else keep


def computes_on(module: nn.Module) -> torch.device:
    """The device of a module's states: that of its weights, unless they are brought there only to compute."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            found = getattr(each, "execution_device", None)
            if found is not None:
                return torch.device(found)
    return device
