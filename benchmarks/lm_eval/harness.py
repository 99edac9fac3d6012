"""lm-evaluation-harness, which is optional."""

from importlib import import_module


def require_harness() -> None:
    """Raise ImportError, naming the extra that brings it, where lm-evaluation-harness is not installed."""
    try:
        import_module("lm_eval.models.huggingface")
    except ModuleNotFoundError as error:
        raise ImportError(
            f'lm-evaluation-harness cannot be imported ({error}); pip install "cachequant[lm-eval]" brings it'
        ) from error
