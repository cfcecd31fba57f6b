"""Where each family calls its attention, and which families are refused because they mix tokens some other way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES
from transformers import CONFIG_MAPPING

from ts_parallel.errors import PlanError
from ts_parallel.partition.model.attention_sites import AttentionSite, find_attention_sites
from ts_parallel.partition.model.deferred import build_deferred

WINDOWS = {
    "mistral": [8, 8, 8, 8],
    "starcoder2": [8, 8, 8, 8],
    "gemma2": [8, None, 8, None],
    "qwen2": [None, None, 8, 8],  # the first max_window_layers see everything
}
MULTI_HEAD = {"gpt2", "gpt_neox", "opt"}


def sites_of(model_type: str, **settings: Any) -> tuple[AttentionSite, ...]:
    make = FAMILIES.get(model_type)
    config = make(**settings) if make else CONFIG_MAPPING[model_type](**settings)
    return find_attention_sites(build_deferred(config, torch.bfloat16))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_is_one_site_with_its_heads_window_and_scale(family: str) -> None:
    sites = sites_of(family)
    assert len(sites) == 4
    assert len({site.module_name for site in sites}) == 4
    assert [site.window for site in sites] == WINDOWS.get(family, [None] * 4)
    for site in sites:
        assert (site.num_heads, site.num_kv_heads) == (4, 4 if family in MULTI_HEAD else 2)
        assert (site.head_dim, site.value_dim) == (16, 16)
        # OPT scales its queries before it calls the attention.
        assert site.scaling == (1.0 if family == "opt" else 0.25)
        assert site.softcap == (50.0 if family == "gemma2" else None)
        assert not site.has_sinks


def test_site_is_named_after_the_module_that_calls() -> None:
    assert [site.module_name for site in sites_of("gpt2")] == [f"transformer.h.{layer}.attn" for layer in range(4)]


def test_scale_and_softcap_are_those_of_the_config() -> None:
    site, *_ = sites_of("gemma2", query_pre_attn_scalar=64, attn_logit_softcapping=30.0)
    assert (site.scaling, site.softcap) == (0.125, 30.0)


def test_head_dim_may_differ_from_hidden_size_over_heads() -> None:
    site, *_ = sites_of("qwen3", head_dim=24)
    assert (site.head_dim, site.value_dim, site.kv_elements_per_token) == (24, 24, 2 * 48)


def test_window_that_is_switched_off_is_not_there() -> None:
    assert [site.window for site in sites_of("mistral", sliding_window=None)] == [None] * 4
    assert [site.window for site in sites_of("qwen2", use_sliding_window=False)] == [None] * 4


def test_window_that_the_mask_alone_tells_is_found() -> None:
    """PhiMoE hands no window to its attention; the others above do as well."""
    sites = sites_of(
        "phimoe",
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        num_local_experts=4,
        sliding_window=8,
    )
    assert [site.window for site in sites] == [8, 8]


def test_two_calls_in_a_layer_are_two_sites() -> None:
    """DiffLlama subtracts one attention from another: KV memory is keyed by call, not by layer."""
    sites = sites_of("diffllama", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    assert [site.module_name for site in sites] == [f"model.layers.{layer}.self_attn" for layer in (0, 0, 1, 1)]


def test_sinks_are_told() -> None:
    sites = sites_of("gpt_oss", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16)
    assert [site.has_sinks for site in sites] == [True, True]


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        ("bloom", {"n_layer": 2, "n_head": 4, "hidden_size": 64}, "BloomForCausalLM"),  # ignores the interface
        ("openai-gpt", {"n_layer": 2, "n_head": 4, "n_embd": 64}, "OpenAIGPTLMHeadModel sends 0 attention calls"),
        ("mamba", {"num_hidden_layers": 2, "hidden_size": 64}, "MambaForCausalLM"),
        (
            "lfm2",
            {"num_hidden_layers": 2, "hidden_size": 64, "layer_types": ["conv", "full_attention"]},
            r"Lfm2ForCausalLM has layers of type \['conv'\]",
        ),
        (
            "bert",
            {"num_hidden_layers": 2, "hidden_size": 48, "is_decoder": False},
            "BertLMHeadModel .*bidirectional_mask_function",
        ),
        (
            "gpt_neo",
            {"num_layers": 2, "num_heads": 4, "hidden_size": 64, "attention_types": [[["global", "local"], 1]]},
            "model type 'gpt_neo' cannot be served: its attention does not go through transformers' interface",
        ),
        ("gptj", {"n_layer": 2, "n_head": 4, "n_embd": 64, "rotary_dim": 8}, "model type 'gptj' .* interface"),
        (
            "falcon",
            {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64},
            "model type 'falcon' .* interface",
        ),
        ("git", {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}, "model type 'git' .* interface"),
    ],
)
def test_model_whose_attention_cannot_be_paged_is_refused_by_name(
    model_type: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        sites_of(model_type, vocab_size=128, **settings)


def test_convolution_is_refused_even_where_the_config_does_not_tell() -> None:
    model = build_deferred(FAMILIES["llama"](), torch.float32)
    with torch.device("meta"):
        model.model.layers[1].mix = torch.nn.Conv1d(64, 64, 3)
    with pytest.raises(PlanError, match=r"LlamaForCausalLM mixes tokens by convolution in 'model\.layers\.1\.mix'"):
        find_attention_sites(model)


def test_layer_that_skips_the_interface_is_refused() -> None:
    """It would answer, from this step's tokens alone."""
    model = build_deferred(FAMILIES["llama"](), torch.float32)
    model.model.layers[2].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(PlanError, match=r"LlamaForCausalLM sends 3 attention calls .* 4 layers were expected"):
        find_attention_sites(model)


def test_mask_of_later_tokens_is_refused() -> None:
    model = build_deferred(FAMILIES["llama"](), torch.float32)
    model.config.is_causal = False
    with pytest.raises(PlanError, match=r"LlamaForCausalLM cannot be served: .*bidirectional_mask_function"):
        find_attention_sites(model)


def test_mixture_of_experts_is_walked_through_in_float32() -> None:
    model = build_deferred(FAMILIES["mixtral"](), torch.float32)
    assert len(find_attention_sites(model)) == 4


def test_experts_that_the_walk_skips_run_as_before_once_it_is_over() -> None:
    model = build_deferred(FAMILIES["mixtral"](), torch.float32)
    before = model.get_experts_implementation()
    find_attention_sites(model)
    assert model.get_experts_implementation() == before
    model.config.is_causal = False
    with pytest.raises(PlanError):
        find_attention_sites(model)
    assert model.get_experts_implementation() == before
