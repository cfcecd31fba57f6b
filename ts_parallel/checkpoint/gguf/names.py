"""What each architecture's tensors are called in a GGUF file, and in a checkpoint that transformers reads.

llama.cpp's converters also change some: rows of queries and keys lie so that rotary pairs are neighbours, Gemma's norms
have one added, GPT-2's matrices are transposed. What they did is undone here, as transformers undoes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from ts_parallel.checkpoint.gguf.header import GgufHeader
from ts_parallel.errors import CheckpointError


class Change(Enum):
    """What has to be undone."""

    NONE = "none"
    QUERY_ROWS = "query rows"
    KEY_ROWS = "key rows"
    ONE_ADDED = "one added"
    TRANSPOSED = "transposed"
    EXPERTS = "experts in one tensor"
    ONE_ROW = "a row without its dim"


@dataclass(frozen=True)
class Named:
    name: str
    """With `{expert}` in it, where the tensor is a stack of experts."""
    change: Change = Change.NONE


_Names = Mapping[str, str]
"""A tensor's name in the file without `.weight` or `.bias`, `N` for a layer's number → that in transformers."""

_ENDS: _Names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION: _Names = {
    **{f"blk.N.attn_{own}": f"model.layers.N.self_attn.{own}_proj" for own in "qkv"},
    "blk.N.attn_output": "model.layers.N.self_attn.o_proj",
}
_NORMS: _Names = {
    "blk.N.attn_norm": "model.layers.N.input_layernorm",
    "blk.N.ffn_norm": "model.layers.N.post_attention_layernorm",
}
_HEAD_NORMS: _Names = {f"blk.N.attn_{own}_norm": f"model.layers.N.self_attn.{own}_norm" for own in "qk"}
_GATED: _Names = {f"blk.N.ffn_{own}": f"model.layers.N.mlp.{own}_proj" for own in ("gate", "up", "down")}
_DENSE: _Names = {**_ENDS, **_ATTENTION, **_NORMS, **_GATED}
_QWEN_EXPERTS: _Names = {
    "blk.N.ffn_gate_inp": "model.layers.N.mlp.gate",
    **{f"blk.N.ffn_{own}_exps": f"model.layers.N.mlp.experts.{{expert}}.{own}_proj" for own in ("gate", "up", "down")},
    "blk.N.ffn_gate_inp_shexp": "model.layers.N.mlp.shared_expert_gate",
    **{f"blk.N.ffn_{own}_shexp": f"model.layers.N.mlp.shared_expert.{own}_proj" for own in ("gate", "up", "down")},
}
_MIXTRAL: _Names = {
    "blk.N.ffn_gate_inp": "model.layers.N.block_sparse_moe.gate",
    **{
        f"blk.N.ffn_{own}_exps": f"model.layers.N.block_sparse_moe.experts.{{expert}}.{mixtral}"
        for own, mixtral in (("gate", "w1"), ("down", "w2"), ("up", "w3"))
    },
}
_GEMMA: _Names = {
    **_DENSE,
    **_HEAD_NORMS,
    "blk.N.ffn_norm": "model.layers.N.pre_feedforward_layernorm",
    "blk.N.post_attention_norm": "model.layers.N.post_attention_layernorm",
    "blk.N.post_ffw_norm": "model.layers.N.post_feedforward_layernorm",
}
_GPT2: _Names = {
    **{"token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f"},
    **{"output": "lm_head", "blk.N.attn_norm": "transformer.h.N.ln_1", "blk.N.ffn_norm": "transformer.h.N.ln_2"},
    **{"blk.N.attn_qkv": "transformer.h.N.attn.c_attn", "blk.N.attn_output": "transformer.h.N.attn.c_proj"},
    **{"blk.N.ffn_up": "transformer.h.N.mlp.c_fc", "blk.N.ffn_down": "transformer.h.N.mlp.c_proj"},
}
_PHI3: _Names = {
    **{**_ENDS, **_NORMS, "blk.N.attn_qkv": "model.layers.N.self_attn.qkv_proj"},
    **{"blk.N.attn_output": _ATTENTION["blk.N.attn_output"], "blk.N.ffn_up": "model.layers.N.mlp.gate_up_proj"},
    "blk.N.ffn_down": "model.layers.N.mlp.down_proj",
}
_STARCODER2: _Names = {
    **{**_ENDS, **_ATTENTION, **_NORMS, "blk.N.ffn_up": "model.layers.N.mlp.c_fc"},
    "blk.N.ffn_down": "model.layers.N.mlp.c_proj",
}


def _unchanged(own: str, named: str) -> Change:
    return Change.NONE


def _of_llama(own: str, named: str) -> Change:
    return {"blk.N.attn_q": Change.QUERY_ROWS, "blk.N.attn_k": Change.KEY_ROWS}.get(own, Change.NONE)


def _of_gemma(own: str, named: str) -> Change:
    return Change.ONE_ADDED if "norm" in named else Change.NONE


def _of_gpt2(own: str, named: str) -> Change:
    return Change.TRANSPOSED if re.search(r"\.c_(attn|proj|fc)\.weight", named) else Change.NONE


@dataclass(frozen=True)
class Architecture:
    names: _Names
    change: Callable[[str, str], Change] = _unchanged
    """Told the tensor's name in the file, and the one that it has elsewhere, `.weight` or `.bias` included."""


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture({**_DENSE, **_MIXTRAL}, _of_llama),
    "qwen2": Architecture(_DENSE),
    "qwen2moe": Architecture({**_DENSE, **_QWEN_EXPERTS}),
    "qwen3": Architecture({**_DENSE, **_HEAD_NORMS}),
    "qwen3moe": Architecture({**_DENSE, **_HEAD_NORMS, **_QWEN_EXPERTS}),
    "gemma2": Architecture(_GEMMA, _of_gemma),
    "gemma3": Architecture(_GEMMA, _of_gemma),
    "gpt2": Architecture(_GPT2, _of_gpt2),
    "phi3": Architecture(_PHI3),
    "starcoder2": Architecture(_STARCODER2),
}

_LAYER = re.compile(r"blk\.(\d+)\.")
ROPE_FREQUENCIES = "rope_freqs.weight"
"""Is no weight: the configuration says the same (`settings.py`)."""


def architecture_of(header: GgufHeader) -> Architecture:
    """
    Raises:
        CheckpointError: it is none whose names are known here.
    """
    found = ARCHITECTURES.get(header.architecture)
    if found is None:
        raise CheckpointError(
            f"{header.file} says general.architecture {header.architecture!r}; of GGUF files "
            f"{', '.join(ARCHITECTURES)} are read: serve the safetensors checkpoint that it was made of"
        )
    return found


def name_of(own: str, architecture: Architecture, file: object) -> Named:
    """
    Raises:
        CheckpointError: the architecture has no such tensor.
    """
    stem, _, end = own.rpartition(".")
    layer = _LAYER.match(own)
    pattern = _LAYER.sub("blk.N.", stem)
    base = architecture.names.get(pattern)
    if base is None or end not in ("weight", "bias"):
        raise CheckpointError(
            f"{file} holds {own!r}, for which no name is known here, and what it changes would be lost"
        )
    name = f"{base.replace('.N.', f'.{layer[1]}.') if layer else base}.{end}"
    if "{expert}" in name:
        return Named(name, Change.EXPERTS)
    if pattern.endswith("ffn_gate_inp_shexp"):
        return Named(name, Change.ONE_ROW)
    return Named(name, architecture.change(pattern, name))
