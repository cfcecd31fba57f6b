"""Packed linears compute the same bits, and are packed only where that is worth it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, save_random_model
from whole_model import build_rank_model

from ts_parallel.runtime.linears import linear_layer, pack_weight
from ts_parallel.topology import TensorParallelGroup

CAN_PACK = torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
needs_packing = pytest.mark.skipif(not CAN_PACK, reason="this processor has no fast bfloat16")


@needs_packing
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 768), (1, 8, 768), (3, 768), (1, 130, 768), (1, 0, 768)])
def test_packed_linear_is_the_plain_one_bit_for_bit(shape: tuple[int, ...], has_bias: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(1000, 768, dtype=torch.bfloat16) / 28
    bias = torch.randn(1000, dtype=torch.bfloat16) if has_bias else None
    hidden = torch.randn(shape, dtype=torch.bfloat16)
    packed = pack_weight(weight)
    assert packed.is_mkldnn
    with torch.inference_mode():
        assert torch.equal(linear_layer(packed, bias)(hidden), F.linear(hidden, weight, bias))
        assert torch.equal(linear_layer(weight, bias)(hidden), F.linear(hidden, weight, bias))


def test_small_weights_and_float32_stay_plain() -> None:
    for weight in (torch.zeros(64, 64, dtype=torch.bfloat16), torch.zeros(1024, 1024)):
        assert pack_weight(weight) is weight


@needs_packing
@pytest.mark.parametrize("is_tied", [False, True])
def test_weight_is_packed_unless_the_embedding_needs_it(is_tied: bool, tmp_path: Path) -> None:
    config = FAMILIES["llama"](hidden_size=512, vocab_size=1024, tie_word_embeddings=is_tied)
    save_random_model(tmp_path, config, dtype=torch.bfloat16)
    alone, cpu = TensorParallelGroup(0, 1), torch.device("cpu")
    plain = build_rank_model(tmp_path, "auto", alone, cpu).tensors
    packed = build_rank_model(tmp_path, "auto", alone, cpu, pack=pack_weight).tensors
    assert not any(tensor.is_mkldnn for tensor in plain.values())
    kept = {"model.embed_tokens.weight"} | ({"lm_head.weight"} if is_tied else set())
    large = {name for name, tensor in plain.items() if tensor.numel() >= 2**18}
    assert {name for name, tensor in packed.items() if tensor.is_mkldnn} == large - kept
    for name, tensor in packed.items():
        assert torch.equal(tensor.to_dense() if tensor.is_mkldnn else tensor, plain[name]), name
