"""Causal language models behind TorchServe: what `handlers/text_generation.py` calls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ts_parallel.checkpoint.adapter import read_adapter
from ts_parallel.checkpoint.index import read_index
from ts_parallel.checkpoint.settings import settings_folder
from ts_parallel.config import HandlerConfig
from ts_parallel.engine.block_manager import BlockManager
from ts_parallel.engine.engine import Engine, EngineThread
from ts_parallel.engine.pacing import PrefillPacer
from ts_parallel.engine.router import Delivery
from ts_parallel.engine.scheduler import Scheduler
from ts_parallel.partition.load import RankModel, load_program
from ts_parallel.partition.prepared import prepare_program
from ts_parallel.partition.program import PipelinePlace, ProgramRequest
from ts_parallel.runtime.kv_memory import bytes_beside_weights
from ts_parallel.runtime.runner import Runner
from ts_parallel.serving.front_end import discard
from ts_parallel.serving.keep_open import has_replicas, keep_one_open
from ts_parallel.serving.metrics import MetricsReporter, labels_of, torchserve_meters
from ts_parallel.serving.streaming import Transport, make_transport
from ts_parallel.serving.worker import exit_soon, follow_in_thread, log_loaded, log_ready, start_rank
from ts_parallel.topology import Topology

if TYPE_CHECKING:
    from ts_parallel.serving.generation_service import GenerationService


class TextGenerationService:
    """One worker process: rank 0 answers requests, the other ranks follow its steps."""

    def __init__(self) -> None:
        self._transport: Transport[Delivery] | None = None

    def handle(self, data: list[dict[str, Any]] | None, context: Any) -> list[str]:
        """TorchServe's entry point. Called first with no data, to load."""
        if data is None:
            self._load(context)
            return []
        if self._transport is None:  # a rank that follows: it acts on rank 0's steps alone
            discard(context.cl_socket)
        return self._transport.handle(data, context)

    def _load(self, context: Any) -> None:
        def load(config: HandlerConfig, folder: Path, topology: Topology) -> tuple[Runner, GenerationService | None]:
            runner = make_runner(config, folder, topology)
            if topology.rank != 0:
                return runner, None  # and without transformers, which the service needs for its tokenizer
            from ts_parallel.serving.generation_service import GenerationService

            engine = EngineThread(make_engine(runner, config), exit_soon, config.stream_interval)
            settings = settings_folder(folder, config.config_folder)
            return runner, GenerationService(settings, context.model_name, engine, config)

        topology, watch, (runner, service) = start_rank(context, HandlerConfig, load)
        log_loaded(topology, runner.weights)
        if service is None:
            follow_in_thread(runner.follow, watch)
            return
        service.engine.start()
        watch.begin(service.engine)
        meters, labels = torchserve_meters(context.metrics), labels_of(context.model_name)
        MetricsReporter(service.engine.figures, meters, labels).report_for_ever()
        self._transport = make_transport(context.model_yaml_config, service.engine, service.open_job)
        if has_replicas(context.model_yaml_config):
            keep_one_open(context.model_name, context.manifest["model"]["modelVersion"])
        log_ready(topology, context.model_name)


def make_runner(config: HandlerConfig, folder: Path, topology: Topology) -> Runner:
    """This rank's model, loaded and ready to step."""
    part = load_eager_model(config, folder, topology) if config.eager else load_model(config, folder, topology)
    max_model_len = config.resolve_max_model_len(part.program.max_positions)
    share, weights = config.gpu_memory_utilization, part.program.bytes_of_ranks
    return Runner(
        part,
        topology,
        block_size=config.block_size,
        kv_cache_bytes=config.kv_cache_memory if share is None else bytes_beside_weights(share, weights),
        max_model_len=max_model_len,
    )


def load_model(config: HandlerConfig, folder: Path, topology: Topology) -> RankModel:
    """The way of a weight from file to device: find the rank's program, then its bytes."""
    group = topology.tensor_parallel
    place = PipelinePlace(topology.stage, topology.num_stages, split_points=config.split_points)
    index = read_index(folder)
    program = prepare_program(program_request(config, folder, group.rank, place), index)
    merge = read_adapter(Path(config.adapter_path), index).merge if config.adapter_path else None
    return load_program(
        program, index, group, topology.device, packs=True, merge=merge, quantization=config.quantization
    )


def program_request(config: HandlerConfig, folder: Path, rank: int, place: PipelinePlace) -> ProgramRequest:
    return ProgramRequest(
        folder,
        config.dtype,
        rank,
        config.tensor_parallel_size,
        place,
        settings=config.config_folder,
        expert_parallel=config.enable_expert_parallel,
    )


def load_eager_model(config: HandlerConfig, folder: Path, topology: Topology) -> RankModel:
    from ts_parallel.partition.build import build_eager_model  # and with it transformers and the tracer

    return build_eager_model(
        folder,
        config.dtype,
        topology.tensor_parallel,
        topology.device,
        settings=config.config_folder,
        expert_parallel=config.enable_expert_parallel,
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
