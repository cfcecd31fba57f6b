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

_TINY: dict[str, Any] = {
    **_SIZES,
    **_GROUPED,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "head_dim": 16,
}
_WINDOW = {"sliding_window": 8}
_EXPERTS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    **{"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
}
_LATENT = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16},
    "num_key_value_heads": 4,
}
_BOTH_KINDS = {"layer_types": ["sliding_attention", "full_attention"]}

_SHARED_KEYS = {
    **_WINDOW,
    **{"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    "num_kv_shared_layers": 1,
    **{"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16},
}
_LONG_ROPE = {
    **{"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32},
    **{"short_factor": [1.0] * 8, "long_factor": [4.0] * 8},
}


def tiny(model_type: str, *without: str, **settings: Any) -> ConfigFactory:
    """Settings `without` are left at the family's own default."""
    return _factory(model_type, **{key: value for key, value in {**_TINY, **settings}.items() if key not in without})


def _rope(kind: str, **settings: Any) -> ConfigFactory:
    return tiny("llama", rope_parameters={"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, **settings})


TINY_FAMILIES: dict[str, ConfigFactory] = {
    **{
        name: tiny(name)
        for name in (
            *("apertus", "arcee", "bamba", "biogpt", "bitnet", "bloom", "cohere", "ctrl", "diffllama", "ernie4_5"),
            *("falcon_h1", "gemma", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_neox_japanese", "granite"),
            *("helium", "hunyuan_v1_dense", "hyperclovax", "jais2", "llama", "mamba", "mpt", "nanochat"),
            *("nemotron", "nemotron_h", "olmo", "olmo2", "openai-gpt", "opt", "persimmon", "phi", "qwen3"),
            *("recurrent_gemma", "rwkv", "seed_oss", "stablelm", "xglm"),
        )
    },
    **{
        name: tiny(name, **_WINDOW)
        for name in (
            *("beam", "cwm", "doge", "flint", "gemma2", "granite_swa", "ministral", "ministral3", "mistral", "phi3"),
            *("smollm3", "starcoder2", "vaultgemma"),
        )
    },
    **{name: tiny(name, **_WINDOW, **_BOTH_KINDS) for name in ("cohere2", "exaone4", "gemma3_text", "olmo3")},
    **{
        name: tiny(name, **_EXPERTS)
        for name in (
            *("ernie4_5_moe", "glm4_moe", "granitemoe", "jamba", "jetmoe", "llama4_text", "minimax", "minimax_m2"),
            *("olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next"),
        )
    },
    **{
        name: tiny(name, **_EXPERTS, **_WINDOW)
        for name in (
            *("afmoe", "cohere2_moe", "deepseek_v4", "dots1", "gpt_oss", "granitemoe_swa", "mimo_v2_flash"),
            *("mixtral", "phimoe"),
        )
    },
    **{name: tiny(name, "head_dim", **_EXPERTS, **_LATENT) for name in ("deepseek_v2", "deepseek_v3", "deepseek_v32")},
    **{name: tiny(name, "head_dim", **_LATENT) for name in ("minicpm3", "youtu")},
    "aria_text": tiny("aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
    "codegen": tiny("codegen", rotary_dim=8),
    "falcon": tiny("falcon", "head_dim"),
    "gemma3n_text": tiny("gemma3n_text", laurel_rank=8, altup_num_inputs=2, **_SHARED_KEYS),
    "gemma4_text": tiny("gemma4_text", global_head_dim=16, **_SHARED_KEYS),
    "gpt_neo": tiny("gpt_neo", num_layers=2, attention_types=[[["global", "local"], 1]]),
    "gptj": tiny("gptj", rotary_dim=8),
    "granitemoehybrid": tiny("granitemoehybrid", **_EXPERTS, layer_types=["full_attention"] * 2),
    "lfm2": tiny("lfm2", layer_types=["conv", "full_attention"]),
    "mamba2": tiny("mamba2", num_heads=8),
    "modernbert-decoder": tiny("modernbert-decoder", pad_token_id=0),
    "qwen2": tiny("qwen2", **_WINDOW, use_sliding_window=True, max_window_layers=1),
    "gemma3_text (rope longrope)": tiny(
        "gemma3_text",
        **_WINDOW,
        **_BOTH_KINDS,
        rope_parameters={
            "full_attention": _LONG_ROPE,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "llama (one key/value head)": tiny("llama", num_key_value_heads=1),
    "llama (rope dynamic)": _rope("dynamic"),
    "llama (rope linear)": _rope("linear"),
    "llama (rope llama3)": _rope(
        "llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    ),
    "llama (rope longrope)": tiny("llama", rope_parameters=_LONG_ROPE),
    "llama (rope yarn)": _rope("yarn", original_max_position_embeddings=64),
}
"""Families and variants of two layers, one for each row of the table that `family_table.py` writes."""


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
