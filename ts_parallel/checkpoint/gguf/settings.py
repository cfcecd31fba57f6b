"""A GGUF file's keys → config.json and generation_config.json of a model that transformers knows.

Every key of an architecture is either understood or refused by its name: one that is passed over may change the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ts_parallel.checkpoint.codes.blocks import read_whole
from ts_parallel.checkpoint.gguf.blocks import BLOCKS, PLAIN
from ts_parallel.checkpoint.gguf.header import GgufHeader
from ts_parallel.checkpoint.gguf.names import ROPE_FREQUENCIES, architecture_of
from ts_parallel.checkpoint.stored import stored_whole
from ts_parallel.errors import CheckpointError

_Config = dict[str, Any]

_SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "vocab_size": "vocab_size",
}
_RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
_GPT2 = {
    **{"context_length": "n_positions", "embedding_length": "n_embd", "block_count": "n_layer"},
    **{"attention.head_count": "n_head", "feed_forward_length": "n_inner"},
    **{"attention.layer_norm_epsilon": "layer_norm_epsilon", "vocab_size": "vocab_size"},
}
_SOFTCAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window",
}
_KEYS: Mapping[str, Mapping[str, str]] = {
    "llama": {**_SIZES, **_RMS, "expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    "qwen2": {**_SIZES, **_RMS},
    "qwen2moe": {**_SIZES, **_RMS, **_EXPERTS},
    "qwen3": {**_SIZES, **_RMS},
    "qwen3moe": {**_SIZES, **_RMS, **_EXPERTS},
    "gemma2": {**_SIZES, **_RMS, **_SOFTCAPS},
    "gemma3": {**_SIZES, **_RMS, **_SOFTCAPS},
    "gpt2": _GPT2,
    "phi3": {**_SIZES, **_RMS, "attention.sliding_window": "sliding_window"},
    "starcoder2": {**_SIZES, "attention.layer_norm_epsilon": "norm_epsilon"},
}
_ROPE = ("rope.freq_base", "rope.dimension_count", "attention.key_length", "attention.value_length")
_SCALING = (
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
)
# Llama 3.1 and 3.2 stretch their frequencies by these factors, of which a GGUF file holds what comes out.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LLAMA3_FACTORS = (8.0, 32.0, 16.0, 4.0)
_MODEL_TYPES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gemma3": "gemma3_text"}
_EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_LAYERS_OF_LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}  # whose queries are scaled by another size, as llama.cpp knows


def config_of(header: GgufHeader) -> tuple[_Config, _Config]:
    """The content of config.json, and of generation_config.json.

    Raises:
        CheckpointError: the architecture is not known here, a key is missing, or one is there that is not understood.
    """
    architecture_of(header)
    values = _Values(header)
    config: _Config = {"model_type": _MODEL_TYPES.get(header.architecture, header.architecture)}
    for key, name in _KEYS[header.architecture].items():
        if (value := values.take(key)) is not None:
            config[name] = value
    config.setdefault("vocab_size", len(header.values.get("tokenizer.ggml.tokens", ())) or None)
    names = {tensor.name for tensor in header.tensors}
    config["tie_word_embeddings"] = "output.weight" not in names
    config |= _rope(header, values, config) if header.architecture != "gpt2" else {}
    config |= _OWN.get(header.architecture, _nothing)(header, config, names)
    values.refuse_others()
    config["dtype"] = _dtype(header)
    config |= {f"{own}_token_id": header.values.get(f"tokenizer.ggml.{key}_token_id") for own, key in _TOKENS.items()}
    ends = [header.values[f"tokenizer.ggml.{key}"] for key in _EOS_KEYS if f"tokenizer.ggml.{key}" in header.values]
    return config, {"eos_token_id": list(dict.fromkeys(ends))} if ends else {}


_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}


class _Values:
    """The architecture's own keys. Knows which were asked for."""

    def __init__(self, header: GgufHeader) -> None:
        self._file, self._prefix = header.file, f"{header.architecture}."
        self._own = {
            key.removeprefix(self._prefix): value
            for key, value in header.values.items()
            if key.startswith(self._prefix)
        }
        self._taken: set[str] = set()

    def take(self, key: str) -> Any:
        self._taken.add(key)
        value = self._own.get(key)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise CheckpointError(f"{self._file} says {self._prefix}{key} {value}: layers that differ are not read")
            value = value[0]
        return value

    def need(self, key: str) -> Any:
        if (value := self.take(key)) is None:
            raise CheckpointError(f"{self._file} has no {self._prefix}{key}")
        return value

    def refuse_others(self) -> None:
        for key in self._own.keys() - self._taken:
            raise CheckpointError(
                f"{self._file} says {self._prefix}{key} {self._own[key]!r}, and what it does is not known here: serve "
                "the safetensors checkpoint that the file was made of"
            )


def _rope(header: GgufHeader, values: _Values, config: _Config) -> _Config:
    heads = config["num_attention_heads"]
    width = values.take("attention.key_length") or config["hidden_size"] // heads
    turned, other = values.take("rope.dimension_count"), values.take("attention.value_length")
    if turned not in (None, width) or other not in (None, width):
        raise CheckpointError(
            f"{header.file} says that of {width} numbers of a head {turned or width} are turned and {other or width} "
            "are values: heads of several sizes are not read"
        )
    found: _Config = {"head_dim": width, "num_key_value_heads": config.get("num_key_value_heads", heads)}
    if (base := values.take("rope.freq_base")) is not None:
        found["rope_theta"] = base
    kind, factor, original, _ = (values.take(key) for key in _SCALING)
    if kind == "linear":
        found["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn" and original:
        found["rope_scaling"] = {
            **{"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        }
    elif kind not in (None, "none"):
        raise CheckpointError(f"{header.file} says {header.architecture}.rope.scaling.type {kind!r}, which is not read")
    frequencies = _frequencies(header)
    if frequencies is not None:
        if header.architecture != "llama" or kind not in (None, "none"):
            raise CheckpointError(
                f"{header.file} holds {ROPE_FREQUENCIES!r}, which {header.architecture} has no use for"
            )
        found |= _llama3(header, frequencies, found.get("rope_theta", 10000.0))
    return found


def _frequencies(header: GgufHeader) -> torch.Tensor | None:
    tensor = next((tensor for tensor in header.tensors if tensor.name == ROPE_FREQUENCIES), None)
    if tensor is None:
        return None
    if tensor.kind != 0 or len(tensor.shape) != 1 or tensor.shape[0] > 2**16:
        raise CheckpointError(f"{header.file} holds {ROPE_FREQUENCIES!r} of shape {list(tensor.shape)}, not numbers")
    numbers = read_whole(stored_whole(tensor.name, header.file, PLAIN[0], tensor.shape, tensor.offset))
    return None if bool((numbers == 1).all()) else numbers


def _llama3(header: GgufHeader, frequencies: torch.Tensor, base: float) -> _Config:
    """The factors that have made these divisors of the frequencies."""
    count = len(frequencies)
    lengths = 2 * math.pi * base ** (torch.arange(count, dtype=torch.float64) / count)
    original, low, high = (
        _LLAMA3[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    for factor in _LLAMA3_FACTORS:
        smooth = ((original / lengths - low) / (high - low)).clamp(0, 1)
        if torch.allclose(1 / ((1 - smooth) / factor + smooth), frequencies.double(), rtol=1e-4):
            return {"rope_scaling": {"rope_type": "llama3", "factor": factor, **_LLAMA3}}
    raise CheckpointError(
        f"{header.file} holds {ROPE_FREQUENCIES!r}, which stretch rotary frequencies in a way that is not known here: "
        "serve the safetensors checkpoint that the file was made of"
    )


def _dtype(header: GgufHeader) -> str:
    """That of most numbers, where they are not in blocks."""
    counts: dict[int, int] = {}
    for tensor in header.tensors:
        counts[tensor.kind] = counts.get(tensor.kind, 0) + math.prod(tensor.shape)
    most = max(counts, key=lambda kind: counts[kind], default=0)
    return "bfloat16" if most in BLOCKS else str(PLAIN.get(most, torch.float32)).removeprefix("torch.")


def _nothing(header: GgufHeader, config: _Config, names: set[str]) -> _Config:
    return {}


def _own_llama(header: GgufHeader, config: _Config, names: set[str]) -> _Config:
    biased = {"attention_bias": "blk.0.attn_q.bias" in names}
    if not config.get("num_local_experts"):
        config.pop("num_local_experts", None), config.pop("num_experts_per_tok", None)
        return biased
    return {"model_type": "mixtral"}


def _own_qwen3(header: GgufHeader, config: _Config, names: set[str]) -> _Config:
    return {"attention_bias": "blk.0.attn_q.bias" in names}


def _own_moe(header: GgufHeader, config: _Config, names: set[str]) -> _Config:
    return {"norm_topk_prob": header.architecture == "qwen3moe", "decoder_sparse_step": 1, "mlp_only_layers": []}


def _own_gemma(header: GgufHeader, config: _Config, names: set[str]) -> _Config:
    is_largest = config["num_hidden_layers"] == _LAYERS_OF_LARGEST_GEMMA[header.architecture]
    scaled = config["hidden_size"] // config["num_attention_heads"] if is_largest else config["head_dim"]
    own: _Config = {"query_pre_attn_scalar": scaled}
    if header.architecture == "gemma3":
        own |= {"rope_theta": config.get("rope_theta", 1e6), "rope_local_base_freq": 10000.0}
    return own


def _own_gpt2(header: GgufHeader, config: _Config, names: set[str]) -> _Config:
    return {"n_ctx": config["n_positions"]}


_OWN: Mapping[str, Callable[[GgufHeader, _Config, set[str]], _Config]] = {
    "llama": _own_llama,
    "qwen3": _own_qwen3,
    "qwen2moe": _own_moe,
    "qwen3moe": _own_moe,
    "gemma2": _own_gemma,
    "gemma3": _own_gemma,
    "gpt2": _own_gpt2,
}
