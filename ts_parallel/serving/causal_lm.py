"""A causal language model on one rank, and the engine over it: for TorchServe's worker as for a program of yours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ts_parallel.checkpoint.adapter import read_adapter
from ts_parallel.checkpoint.index import read_index
from ts_parallel.config import HandlerConfig
from ts_parallel.engine.block_manager import BlockManager
from ts_parallel.engine.engine import Engine
from ts_parallel.engine.pacing import PrefillPacer
from ts_parallel.engine.scheduler import Scheduler
from ts_parallel.machine import this_machine
from ts_parallel.partition.load import RankModel, load_program
from ts_parallel.partition.prepared import prepare_program
from ts_parallel.partition.program import PipelinePlace, ProgramRequest
from ts_parallel.runtime.backends.base import Backend
from ts_parallel.runtime.backends.choose import choose_backend, describe_choice, own_dtype
from ts_parallel.runtime.kv_budget import bytes_beside_weights, room_on
from ts_parallel.runtime.runner import Runner
from ts_parallel.topology import Topology


def make_runner(config: HandlerConfig, folder: Path, topology: Topology) -> Runner:
    """This rank's model, loaded and ready to step."""
    load = load_eager_model if config.eager else load_model
    with room_on(topology.device):
        part, backend = load(config, folder, topology)
        max_model_len = config.resolve_max_model_len(part.program.max_positions)
        share, weights = config.gpu_memory_utilization, part.program.bytes_of_ranks
        return Runner(
            part,
            topology,
            backend,
            block_size=config.block_size,
            kv_cache_bytes=config.kv_cache_memory if share is None else bytes_beside_weights(share, weights),
            max_model_len=max_model_len,
        )


def load_model(config: HandlerConfig, folder: Path, topology: Topology) -> tuple[RankModel, Backend]:
    """The way of a weight from file to device: find the rank's program, and who computes it, then its bytes."""
    group = topology.tensor_parallel
    place = PipelinePlace(topology.stage, topology.num_stages, split_points=config.split_points)
    index = read_index(folder, config.config_folder)
    program = prepare_program(program_request(config, folder, group.rank, place), index)
    backend = choose_backend(topology.device, program.dtype, topology.num_threads, config.quantization)
    names = program.stored_names
    merge = read_adapter(Path(config.adapter_path), index, names).merge if config.adapter_path else None
    quantization, stage = config.quantization, topology.stage
    part = load_program(program, index, group, topology.device, backend.weights, merge, quantization, stage)
    return part, backend


def program_request(config: HandlerConfig, folder: Path, rank: int, place: PipelinePlace) -> ProgramRequest:
    return ProgramRequest(
        folder,
        own_dtype(config.dtype, config.device),
        rank,
        config.tensor_parallel_size,
        place,
        settings=config.config_folder,
        expert_parallel=config.enable_expert_parallel,
    )


def load_eager_model(config: HandlerConfig, folder: Path, topology: Topology) -> tuple[RankModel, Backend]:
    from ts_parallel.partition.build import build_eager_model  # and with it transformers and the tracer

    part = build_eager_model(
        folder,
        own_dtype(config.dtype, config.device),
        topology.tensor_parallel,
        topology.device,
        settings=config.config_folder,
        expert_parallel=config.enable_expert_parallel,
    )
    return part, choose_backend(topology.device, part.program.dtype, topology.num_threads)


def describe_computing(runner: Runner, topology: Topology) -> dict[str, Any]:
    """By what this rank computes, for clients who measure it: the fields of `computed_by` in `v1/models`."""
    machine, choice = this_machine(), describe_choice(topology.device, runner.dtype)
    return {
        "processor": machine.processor,
        "num_cores": machine.num_cores,
        "device": topology.device.type,
        "backend": choice.backend,
        "instruction_set": choice.instruction_set,
        "dtype": str(runner.dtype).removeprefix("torch."),
    }


def make_engine(runner: Runner, config: HandlerConfig) -> Engine:
    blocks = BlockManager(runner.num_blocks, runner.block_size, caches_prefixes=config.enable_prefix_caching)
    scheduler = Scheduler(
        blocks,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        num_stages=runner.num_stages,
        pacer=PrefillPacer(config.max_prefill_slowdown),
    )
    return Engine(runner, scheduler)
