"""Tiny GGUF files as llama.cpp's converters write them, and the plain checkpoints that transformers makes of them.

Names come from the `gguf` package, blocks from its `quants`. Which rows lie where, and what is added to norms, is
llama.cpp's `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from families import ConfigFactory, random_model, tiny
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

_SIZES: dict[str, Any] = {"intermediate_size": 96, "tie_word_embeddings": False}
_WIDE: dict[str, Any] = {**_SIZES, "hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}


@dataclass(frozen=True)
class GgufKind:
    type: Type
    """Of matrices; vectors are float32."""
    architecture: str = "llama"
    config: ConfigFactory = tiny("llama", **_SIZES)


GGUF_KINDS: dict[str, GgufKind] = {
    **{f"GGUF {kind.name}": GgufKind(kind) for kind in (Type.F16, Type.BF16, Type.F32)},
    **{f"GGUF {kind.name}": GgufKind(kind) for kind in (Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0)},
    **{
        f"GGUF {kind.name}": GgufKind(kind, config=tiny("llama", **_WIDE))
        for kind in (Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K)
    },
    "GGUF Q8_0, qwen2": GgufKind(Type.Q8_0, "qwen2", tiny("qwen2", "head_dim", **_SIZES)),
    "GGUF Q4_0, qwen3": GgufKind(Type.Q4_0, "qwen3", tiny("qwen3", **_SIZES, attention_bias=False)),
    "GGUF Q4_0, qwen3moe": GgufKind(Type.Q4_0, "qwen3moe", tiny("qwen3_moe", **_SIZES, **_EXPERTS)),
    "GGUF F16, gpt2": GgufKind(Type.F16, "gpt2", tiny("gpt2", n_inner=96)),
    "GGUF Q8_0, gemma2": GgufKind(
        Type.Q8_0,
        "gemma2",
        tiny("gemma2", **{**_SIZES, "tie_word_embeddings": True}, sliding_window=8, query_pre_attn_scalar=16),
    ),
}


def write_gguf(folder: Path, plain: Path, kind: GgufKind) -> None:
    """`model.gguf` in `folder`, and in `plain` what transformers reads of it, in float32."""
    folder.mkdir()
    config = kind.config()
    model = random_model(config)
    writer = gguf.GGUFWriter(folder / "model.gguf", kind.architecture)
    _write_keys(writer, config, kind.architecture)
    names = gguf.get_tensor_name_map(_architecture(kind.architecture), config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for own, part in _as_stored(name, tensor.float(), config, kind.architecture):
            named = names.get_name(own, try_suffixes=(".weight", ".bias"))
            assert named is not None, own
            _add(writer, named, part, kind.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _write_plain(folder / "model.gguf", plain, config)


def _architecture(name: str) -> gguf.MODEL_ARCH:
    return next(arch for arch, own in gguf.MODEL_ARCH_NAMES.items() if own == name)


def _write_keys(writer: gguf.GGUFWriter, config: Any, architecture: str) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or config.n_inner)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if architecture == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if architecture == "llama":
        writer.add_rope_dimension_count(head)
    elif head * config.num_attention_heads != config.hidden_size or architecture in ("gemma2", "qwen3moe"):
        writer.add_key_length(head)
        writer.add_value_length(head)
    if architecture == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_sliding_window(config.sliding_window)


def _as_stored(name: str, tensor: torch.Tensor, config: Any, architecture: str) -> list[tuple[str, torch.Tensor]]:
    """The tensor as llama.cpp's converter has it, under names that the `gguf` package knows."""
    if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        return [(name, tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape))]
    if architecture == "gemma2" and "norm" in name:
        return [(name, tensor + 1)]
    if architecture == "gpt2" and tensor.ndim == 2 and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return [(name, tensor.T)]
    if name.endswith("experts.gate_up_proj"):
        gate, up = tensor.chunk(2, dim=1)
        stem = name.removesuffix("gate_up_proj")
        return [(f"{stem}gate_proj.weight", gate), (f"{stem}up_proj.weight", up)]
    if name.endswith("experts.down_proj"):
        return [(f"{name}.weight", tensor)]
    return [(name, tensor)]


@dataclass(frozen=True)
class _Halves:
    """Where in a block float16 numbers stand, of the types whose codes the package cannot write."""

    step: int
    size: float
    """Of the step, so that random codes are as large as weights."""
    low: int | None = None
    ratio: float = 0.0
    """What the lows' number is times the step, so that random codes are about nought."""


_HALVES: dict[Type, _Halves] = {
    Type.IQ4_NL: _Halves(0, 2e-3),
    Type.Q2_K: _Halves(80, 1e-2, 82, 1.5),
    Type.Q3_K: _Halves(108, 3e-3),
    Type.Q4_K: _Halves(0, 8e-4, 2, 7.5),
    Type.Q5_K: _Halves(0, 4e-4, 2, 15.5),
    Type.Q6_K: _Halves(208, 1e-4),
}


def _add(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, kind: Type) -> None:
    numbers = tensor.contiguous().numpy()
    if tensor.ndim == 1:
        writer.add_tensor(name, numbers)
    elif kind in _HALVES:
        writer.add_tensor(name, _any_blocks(numbers.shape, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)


def _any_blocks(shape: tuple[int, ...], kind: Type) -> Any:
    """Random codes with scales of a size that weights have: what they stand for is as good as any weight."""
    size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(shape[0])
    octets = generator.integers(0, 256, (*shape[:-1], shape[-1] // size, num_bytes), dtype=np.uint8)
    own = _HALVES[kind]
    steps = generator.uniform(0.5, 1.0, octets.shape[:-1]) * own.size
    for place, numbers in ((own.step, steps), (own.low, steps * own.ratio)):
        if place is not None:
            octets[..., place : place + 2] = numbers.astype(np.float16)[..., None].view(np.uint8)
    return octets.reshape(*shape[:-1], -1)


def _write_plain(file: Path, plain: Path, config: Any) -> None:
    """Of what transformers reads of a file, its tensors alone: some architectures' configurations lack a part."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    model.save_pretrained(plain)
