"""Small random models, and token ids to calibrate them on."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 97

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="session")
def build() -> Callable[..., PreTrainedModel]:
    """`build(model_type="llama", seed=0, dtype=torch.float32, **config)`: equal arguments give equal weights."""

    def model_of(
        model_type: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any
    ) -> PreTrainedModel:
        config = AutoConfig.for_model(model_type, **{**SMALL, **settings})
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 or name.endswith("bias"):
                    # sharper than the default: attention that differs between tokens
                    parameter.normal_(std=0.12)
        return model.to(dtype)

    return model_of


@pytest.fixture(scope="session")
def windows() -> Callable[..., Tensor]:
    """`windows(count, length, seed=1)`: token ids `[count, length]`, none of them padding."""

    def sample(count: int, length: int, seed: int = 1) -> Tensor:
        return torch.randint(2, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))

    return sample


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def quiet_transformers() -> Iterator[None]:
    """No advice about random models."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(verbosity)
