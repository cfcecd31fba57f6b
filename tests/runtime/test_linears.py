"""Packed linears compute the same bits, and are packed only where that is worth it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, save_random_model

from ts_parallel.partition.build import build_rank_model
from ts_parallel.runtime.linears import pack_linear
from ts_parallel.runtime.stage import Stage
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
    linear = pack_linear(weight, bias)
    assert linear is not None
    with torch.inference_mode():
        assert torch.equal(linear(hidden), F.linear(hidden, weight, bias))


def test_small_weights_and_float32_stay_plain() -> None:
    assert pack_linear(torch.zeros(64, 64, dtype=torch.bfloat16), None) is None
    assert pack_linear(torch.zeros(1024, 1024), None) is None


@needs_packing
@pytest.mark.parametrize("is_tied", [False, True])
def test_plain_weight_is_given_up_unless_the_embedding_needs_it(is_tied: bool, tmp_path: Path) -> None:
    config = FAMILIES["llama"](hidden_size=512, vocab_size=1024, tie_word_embeddings=is_tied)
    save_random_model(tmp_path, config, dtype=torch.bfloat16)
    alone = TensorParallelGroup(0, 1)
    part = build_rank_model(tmp_path, "auto", alone, torch.device("cpu"))
    kept = {"model.embed_tokens.weight"} | ({"lm_head.weight"} if is_tied else set())
    large = {name for name, tensor in part.tensors.items() if tensor.numel() >= 2**18}
    Stage(part.stages[0], part.tensors, alone, release=part.release)
    assert large - part.tensors.keys() == large - kept
    for name in large - kept:
        assert part.model.get_parameter(name).is_meta


def test_nothing_is_packed_where_nobody_gives_the_weights_up(tmp_path: Path) -> None:
    save_random_model(tmp_path, FAMILIES["llama"](hidden_size=512), dtype=torch.bfloat16)
    alone = TensorParallelGroup(0, 1)
    part = build_rank_model(tmp_path, "auto", alone, torch.device("cpu"))
    stage = Stage(part.stages[0], part.tensors, alone)
    assert "_packed" not in stage.source
