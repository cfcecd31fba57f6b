"""Which families are served, bit for bit as the plain model computes them, and which are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES
from transformers import CONFIG_MAPPING, PretrainedConfig
from whole_model import plain_logits, plain_model, run_stages, sequence, stage_model, tensors_of

from ts_parallel.errors import PlanError
from ts_parallel.partition.model.causal_lm import trace_causal_lm
from ts_parallel.partition.model.deferred import build_deferred
from ts_parallel.partition.program import TOKEN_IDS

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}


def config_of(model_type: str, **settings: Any) -> PretrainedConfig:
    return CONFIG_MAPPING[model_type](**{**SIZES, **settings})


SERVED: dict[str, dict[str, Any]] = {
    "phi": {},  # a head with a bias
    "cohere": {},
    "cohere2": {"sliding_window": 8},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8},
    "glm": {"head_dim": 16},
    "gpt_bigcode": {},
    "persimmon": {},
    "biogpt": {},  # an embedding that scales
    "nemotron": {},
    "exaone4": {"sliding_window": 8},
    "diffllama": {},  # two attention calls in a layer
    "granitemoe": EXPERTS,
    "qwen3_moe": {**EXPERTS, "head_dim": 16},
    "deepseek_v3": {**LATENT, **EXPERTS, "n_group": 2, "topk_group": 1},  # keys longer than values
}


@pytest.mark.parametrize("model_type", SERVED)
def test_other_families_are_the_plain_model_bit_for_bit(model_type: str) -> None:
    plain = plain_model(config_of(model_type, **SERVED[model_type]))
    inputs = sequence(20)
    staged = stage_model(config_of(model_type, **SERVED[model_type]), num_stages=2)
    expected = plain_logits(plain, inputs[TOKEN_IDS])
    assert expected.std() > 0.001
    assert torch.equal(run_stages(staged.stages, tensors_of(plain), inputs), expected)


LEGACY = r"cannot be served: its attention does not go through transformers' interface"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": ({}, "BloomForCausalLM cannot run without data"),
    "codegen": (
        {"n_layer": 2, "n_head": 4, "n_embd": 64, "rotary_dim": 8},
        "CodeGenForCausalLM cannot run without data",
    ),
    "mpt": ({"d_model": 64, "n_heads": 4, "n_layers": 2}, "MptForCausalLM cannot run without data"),
    "gpt_neo": (
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        f"model type 'gpt_neo' {LEGACY}",
    ),
    "gptj": ({"n_layer": 2, "n_head": 4, "n_embd": 64, "rotary_dim": 8}, f"model type 'gptj' {LEGACY}"),
    "falcon": ({}, f"model type 'falcon' {LEGACY}"),
    "xglm": ({"d_model": 64, "attention_heads": 4, "num_layers": 2}, "XGLMForCausalLM cannot run without data"),
    "mamba": ({}, r"MambaForCausalLM has layers of type \['linear_attention'\]"),
    "mamba2": (
        {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1},
        r"Mamba2ForCausalLM has layers of type \['linear_attention'\]",
    ),
    "jamba": ({"attn_layer_period": 2, "attn_layer_offset": 1}, "JambaForCausalLM has layers of type"),
    "bamba": ({}, "BambaForCausalLM has layers of type"),
    "falcon_h1": ({}, r"FalconH1ForCausalLM has layers of type \['hybrid'\]"),
    "nemotron_h": ({}, "NemotronHForCausalLM has layers of type"),
    "qwen3_next": ({"head_dim": 16}, "Qwen3NextForCausalLM has layers of type"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, r"Lfm2ForCausalLM has layers of type \['conv'\]"),
    "recurrent_gemma": ({"lru_width": 64}, "RecurrentGemmaForCausalLM has layers of type"),
    "rwkv": ({"attention_hidden_size": 64}, "RwkvForCausalLM sends 0 attention calls .* 2 layers were expected"),
    "llama4_text": ({"num_local_experts": 2}, r"Llama4ForCausalLM has layers of type \['chunked_attention'\]"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", REFUSED)
def test_family_that_would_answer_wrongly_is_refused_by_name(model_type: str) -> None:
    settings, message = REFUSED[model_type]
    with pytest.raises(PlanError, match=message):
        stage_model(config_of(model_type, **settings))


Mixer = Callable[[torch.Tensor], torch.Tensor]
MIXERS: dict[str, Mixer] = {  # hidden states [1, T, 64] → one number or more that another token has a part in
    "cumsum": lambda hidden: hidden.cumsum(1),
    "cumprod": lambda hidden: hidden.cumprod(1),
    "mean.dim": lambda hidden: hidden.mean(-2, keepdim=True),
    "mean.default": lambda hidden: hidden.mean(),
    "sum.dim_IntList": lambda hidden: hidden.sum((0, 1)),
    "max.dim": lambda hidden: hidden.max(1, keepdim=True).values,
    "max.default": lambda hidden: hidden.max(),
    "amax": lambda hidden: hidden.amax(1, keepdim=True),
    "std": lambda hidden: hidden.std(1, keepdim=True),
    "linalg_vector_norm": lambda hidden: F.normalize(hidden, dim=1),
    "logsumexp": lambda hidden: hidden.logsumexp(1, keepdim=True),
    "softmax": lambda hidden: hidden.softmax(1),
    "sort": lambda hidden: hidden.sort(1).values,
    "roll": lambda hidden: hidden.roll(3, 1),
    "flip": lambda hidden: hidden.flip(1),
    "pad": lambda hidden: F.pad(hidden, (0, 0, 1, -1)),
    "slice": lambda hidden: hidden[:, :1],
    "select": lambda hidden: hidden[:, -1],
    "matmul": lambda hidden: (hidden @ hidden.mT) @ hidden,
    "bmm": lambda hidden: torch.bmm(torch.bmm(hidden, hidden.mT), hidden),
    "einsum": lambda hidden: torch.einsum("bsd,btd,bte->bse", hidden, hidden, hidden),
    "conv1d": lambda hidden: F.conv1d(hidden.mT, torch.ones(64, 64, 3), padding=1).mT,
    "scaled_dot_product_attention": lambda hidden: F.scaled_dot_product_attention(hidden, hidden, hidden),
    "layer_norm": lambda hidden: F.layer_norm(hidden.mT, [hidden.shape[1]]).mT,
}
HARMLESS: dict[str, Mixer] = {
    "over the hidden size": lambda hidden: hidden.softmax(-1) + hidden.sum(-1, keepdim=True) + hidden.std(2)[..., None],
    "slices of the hidden size": lambda hidden: torch.cat([hidden[..., 32:], hidden[..., :32]], -1) + hidden[..., :1],
    "whole slices": lambda hidden: hidden[:, :] + hidden[:, 0:],
    "pads of the hidden size": lambda hidden: F.pad(hidden[..., 1:], (1, 0)).flip(-1).roll(2, -1),
    "einsum of each token": lambda hidden: torch.einsum("...d,...e,e->...d", hidden, hidden, torch.ones(64)),
    "products of each token": lambda hidden: (hidden[0].unsqueeze(-1) @ hidden[0].unsqueeze(-2)).sum(-1)[None],
}


def trace_with(change: Mixer) -> None:
    """Trace a model whose last norm is given `change` to add to its input."""
    model = build_deferred(FAMILIES["llama"](num_hidden_layers=1), torch.float32)
    norm = model.model.norm.forward
    model.model.norm.forward = lambda hidden: norm(hidden + change(hidden))
    trace_causal_lm(model, num_calls=1)


@pytest.mark.parametrize("name", MIXERS)
def test_operation_that_mixes_tokens_is_refused_with_its_module(name: str) -> None:
    """The tokens of several requests lie side by side in a step: one would see another's."""
    with pytest.raises(PlanError, match=rf"LlamaForCausalLM mixes tokens by aten\.{name}.* in 'model\.norm'"):
        trace_with(MIXERS[name])


@pytest.mark.parametrize("name", HARMLESS)
def test_operation_on_each_token_alone_is_not_refused(name: str) -> None:
    trace_with(HARMLESS[name])


def test_attention_call_whose_result_is_not_used_is_refused() -> None:
    model = build_deferred(FAMILIES["llama"](num_hidden_layers=2), torch.float32)
    attention = model.model.layers[0].self_attn.forward
    model.model.layers[0].self_attn.forward = lambda hidden_states, **options: (
        hidden_states,
        attention(hidden_states, **options)[1],
    )
    with pytest.raises(PlanError, match="LlamaForCausalLM makes 2 attention calls, of which 1 are in its trace"):
        trace_causal_lm(model, num_calls=2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_only_the_wanted_rows_reach_the_head(family: str) -> None:
    """The head is the largest linear: its product has as many rows as logits are wanted."""
    (stage,) = stage_model(FAMILIES[family](num_hidden_layers=1)).stages
    head = [node for node in stage.nodes if node.target is torch.ops.aten.linear.default][-1]
    (rows,) = (node for node, name in stage.inputs.items() if name == "rows")
    assert head.meta["val"].shape[1] == rows.meta["val"].shape[0]
