"""Causal language models behind TorchServe: what `handlers/text_generation.py` calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ts_parallel.config import HandlerConfig
from ts_parallel.engine.block_manager import BlockManager
from ts_parallel.engine.engine import Engine, EngineThread
from ts_parallel.engine.pacing import PrefillPacer
from ts_parallel.engine.scheduler import Scheduler
from ts_parallel.partition.build import PipelinePlace, build_rank_model
from ts_parallel.partition.deferred import read_model_config
from ts_parallel.runtime.runner import Runner
from ts_parallel.serving.continuous_batching import ContinuousBatchingDrain
from ts_parallel.serving.generation_service import GenerationService
from ts_parallel.serving.keep_open import has_replicas, keep_one_open
from ts_parallel.serving.model_files import resolve_max_model_len
from ts_parallel.serving.worker import exit_soon, follow_in_thread, log_loaded, log_ready, start_rank
from ts_parallel.topology import Topology


class TextGenerationService:
    """One worker process: rank 0 answers requests, the other ranks follow its steps."""

    def __init__(self) -> None:
        self._drain: ContinuousBatchingDrain | None = None

    def handle(self, data: list[dict[str, Any]] | None, context: Any) -> list[str]:
        """TorchServe's entry point. Called first with no data, to load."""
        if data is None:
            self._load(context)
            return []
        if self._drain is None:  # a rank that follows: it acts on rank 0's steps alone
            return [""] * len(data)
        return self._drain.handle(data, context)

    def _load(self, context: Any) -> None:
        def load(config: HandlerConfig, folder: Path, topology: Topology) -> tuple[Runner, GenerationService | None]:
            runner = make_runner(config, folder, topology)
            leads = topology.rank == 0
            if not leads:
                return runner, None
            engine = EngineThread(make_engine(runner, config), on_failure=exit_soon)
            return runner, GenerationService(folder, context.model_name, engine, config)

        topology, (runner, service) = start_rank(context, HandlerConfig, load)
        log_loaded(topology, runner.weights)
        if service is None:
            follow_in_thread(runner.follow)
            return
        service.engine.start()
        replicas = has_replicas(context.model_yaml_config)
        self._drain = ContinuousBatchingDrain(service.engine, service.open_job, replicas)
        if replicas:
            keep_one_open(context.model_name, context.manifest["model"]["modelVersion"])
        log_ready(topology, context.model_name)


def make_runner(config: HandlerConfig, folder: Path, topology: Topology) -> Runner:
    """This rank's model, loaded and ready to step."""
    max_model_len = resolve_max_model_len(config.max_model_len, read_model_config(folder))
    place = PipelinePlace(topology.stage, topology.num_stages, split_points=config.split_points)
    part = build_rank_model(
        folder, config.dtype, topology.tensor_parallel, topology.device, None if config.eager else place
    )
    return Runner(
        part,
        topology,
        block_size=config.block_size,
        kv_cache_bytes=config.kv_cache_memory,
        max_model_len=max_model_len,
    )


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
