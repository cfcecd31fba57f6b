"""Models with random weights, made where they run, and the runners over them: nothing is read or fetched."""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ts_parallel.engine.block_manager import BlockManager
from ts_parallel.engine.engine import Engine
from ts_parallel.engine.scheduler import Scheduler
from ts_parallel.partition.build import all_tensors, cut_causal_lm, program_of, shard_causal_lm
from ts_parallel.partition.graph.trace import TracedGroup
from ts_parallel.partition.load import RankModel
from ts_parallel.partition.program import PipelinePlace
from ts_parallel.runtime.backends.base import Backend
from ts_parallel.runtime.runner import Runner
from ts_parallel.topology import Topology, open_topology

BLOCK_SIZE = 16

_COMMON: dict[str, Any] = {"max_position_embeddings": 8192, "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "llama_8b": {
        **{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 5e5},
    },
    "qwen3_0_6b": {
        **{"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28},
        **{"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
        **{"tie_word_embeddings": True},
    },
    "mixtral": {
        **{"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000},
        **{"num_local_experts": 8, "num_experts_per_tok": 2},
    },
}
_TOY = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 128},
}
_SMALL = {
    **{"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8},
    **{"num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen3": {"model_type": "qwen3"},
    "gemma2": {"model_type": "gemma2", "sliding_window": 40, "query_pre_attn_scalar": 64},
    "gpt_oss": {"model_type": "gpt_oss", "sliding_window": 40, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}


def config_of(shape: dict[str, Any], size: str, *, is_family: bool = False) -> Any:
    """transformers' configuration; `size` is `toy` or `whole`."""
    settings = {**_COMMON, **shape}
    if size == "toy":
        settings |= _TOY
    elif is_family:
        settings |= _SMALL
    kind = settings.pop("model_type")
    return AutoConfig.for_model(kind, pad_token_id=None, bos_token_id=None, eos_token_id=None, **settings)


def make_model(config: Any, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Any:
    """Whose greedy tokens vary, and to which every tensor matters."""
    torch.manual_seed(seed)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                gain = 0.5 if parameter is embedding else 2.0
                parameter.normal_(std=gain * parameter.shape[-1] ** -0.5)
    return model


def part_of(model: Any, dtype: torch.dtype, device: torch.device) -> RankModel:
    """The program of one rank, over the very weights of `model`."""
    started = time.perf_counter()
    config = deepcopy(model.config)  # which is told whose attention is called
    sharded = shard_causal_lm(config, dtype, TracedGroup(0, 1))
    program = program_of(cut_causal_lm(sharded, PipelinePlace()), PipelinePlace(), {})
    own = {name: tensor.detach() for name, tensor in all_tensors(model).items()}
    tensors: dict[str, Any] = {name: buffer.to(device) for name, buffer in program.buffers.items()}
    for name, entry in program.plan.parameters.items():
        tensors |= dict.fromkeys((name, *entry.aliases), own[name])
    return RankModel(program, tensors, time.perf_counter() - started)


_topologies: list[Topology] = []


def topology_on(device: torch.device) -> Topology:
    if not _topologies:
        _topologies.append(open_topology(1, device.type, environment={}))
    return _topologies[0]


def make_runner(part: RankModel, device: torch.device, backend: Backend, kv_bytes: int, length: int) -> Runner:
    return Runner(
        part, topology_on(device), backend, block_size=BLOCK_SIZE, kv_cache_bytes=kv_bytes, max_model_len=length
    )


def make_engine(runner: Runner, num_seqs: int, tokens_of_step: int = 8192) -> Engine:
    blocks = BlockManager(runner.num_blocks, runner.block_size, caches_prefixes=False)
    return Engine(runner, Scheduler(blocks, max_num_seqs=num_seqs, max_num_batched_tokens=tokens_of_step))


def prompts_of(lengths: Sequence[int], vocabulary: int, seed: int = 0) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(vocabulary, (length,), generator=generator).tolist()) for length in lengths]


def device_of(size: str) -> torch.device:
    return torch.device("cpu") if size == "toy" else torch.device("cuda", 0)
