"""Packed caches for code that cannot be edited."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from ..protocol import CacheQuantizer
from .attach import detach, is_attached
from .cache import PackedCache


@contextmanager
def automatic(model: PreTrainedModel, strategy: CacheQuantizer, **options: Any) -> Iterator[PreTrainedModel]:
    """Every `generate` without a cache gets a fresh `PackedCache(model, strategy, **options)` while this is open.

    For pipelines, evaluation harnesses and scripts that cannot be edited. A cache the caller passes, a
    `cache_implementation` and `use_cache=False` are respected. On leaving, the model is as it was before.
    """
    attached_before = is_attached(model)
    PackedCache(model, strategy, **options)  # complain now, not in the first generate
    prepare: Any = model._prepare_cache_for_generation

    def prepare_packed(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        free = model_kwargs.get("past_key_values") is None and generation_config.cache_implementation is None
        if free and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = PackedCache(model, strategy, **options)
        return prepare(generation_config, model_kwargs, *args, **kwargs)

    overridden = model.__dict__.get("_prepare_cache_for_generation")
    model.__dict__["_prepare_cache_for_generation"] = prepare_packed
    try:
        yield model
    finally:
        if overridden is None:
            del model.__dict__["_prepare_cache_for_generation"]
        else:
            model.__dict__["_prepare_cache_for_generation"] = overridden
        if not attached_before:
            detach(model)
