"""Tiny random-weight models of the families that the tests run through, and their checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

ConfigFactory = Callable[..., PretrainedConfig]

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    # Some families' own special tokens lie outside so small a vocabulary.
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_GROUPED = {"num_key_value_heads": 2, "intermediate_size": 128}
_UNEVEN = {"vocab_size": 97}


def _factory(model_type: str, **settings: Any) -> ConfigFactory:
    def make(**changes: Any) -> PretrainedConfig:
        return CONFIG_MAPPING[model_type](**{**_SIZES, **settings, **changes})

    return make


FAMILIES: dict[str, ConfigFactory] = {
    "llama": _factory("llama", **_GROUPED, **_UNEVEN),
    "qwen3": _factory("qwen3", **_GROUPED, head_dim=16),
    "gpt2": _factory("gpt2", **_UNEVEN),
    "gpt_neox": _factory("gpt_neox", intermediate_size=128),
    "gemma2": _factory("gemma2", **_GROUPED, head_dim=16, query_pre_attn_scalar=16, sliding_window=8),
    "phi3": _factory("phi3", **_GROUPED),
    "opt": _factory("opt", ffn_dim=128, word_embed_proj_dim=64),
    "mixtral": _factory("mixtral", **_GROUPED, num_local_experts=4),
    "mistral": _factory("mistral", **_GROUPED, sliding_window=8),
    "qwen2": _factory("qwen2", **_GROUPED, use_sliding_window=True, sliding_window=8, max_window_layers=2),
    "starcoder2": _factory("starcoder2", **_GROUPED, sliding_window=8),
    "olmo2": _factory("olmo2", **_GROUPED),
    "stablelm": _factory("stablelm", **_GROUPED, use_qkv_bias=True),
}
"""Model type → its config; keyword arguments change single settings, as in `FAMILIES["llama"](vocab_size=128)`."""


def random_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model of `config` in float32 whose greedy tokens vary and to which every single tensor matters."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms are made all alike: a lost or shifted one would not show
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            else:  # layers that outweigh the embedding, lest a tied head repeats the last token for ever
                gain = 0.5 if parameter is embedding else 2.0
                parameter.normal_(std=gain * parameter.shape[-1] ** -0.5)
    return model


def save_random_model(
    folder: Path, config: PretrainedConfig, seed: int = 0, dtype: torch.dtype = torch.float32
) -> None:
    """The safetensors checkpoint of such a model."""
    random_model(config, seed).to(dtype).save_pretrained(folder)
