"""Causal language models behind TorchServe: what `handlers/text_generation.py` calls."""

from __future__ import annotations

import gc
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ts_parallel.checkpoint.settings import settings_folder
from ts_parallel.config import API_KEY_VARIABLE, HandlerConfig, parse_api_keys
from ts_parallel.engine.engine import EngineThread
from ts_parallel.engine.router import Delivery
from ts_parallel.runtime.runner import Runner
from ts_parallel.serving.causal_lm import describe_computing, make_engine, make_runner
from ts_parallel.serving.metrics import labels_of
from ts_parallel.serving.torchserve.front_end import discard
from ts_parallel.serving.torchserve.front_end_settings import message_sizes
from ts_parallel.serving.torchserve.keep_open import has_replicas, keep_one_open
from ts_parallel.serving.torchserve.metrics import MetricsReporter, torchserve_meters
from ts_parallel.serving.torchserve.streaming import Transport, make_transport
from ts_parallel.serving.torchserve.worker import (
    exit_soon,
    follow_in_thread,
    log_loaded,
    log_ready,
    start_rank,
    tell_clients,
)
from ts_parallel.topology import Topology

if TYPE_CHECKING:
    from ts_parallel.serving.openai.generation_service import GenerationService

# TorchServe's switch. Bodies are parsed where it holds up no stream, and small ones as fast as by TorchServe.
_PARSES_BODIES = "TS_DECODE_INPUT_REQUEST"


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
            from ts_parallel.serving.openai.generation_service import GenerationService

            os.environ[_PARSES_BODIES] = "false"
            engine = EngineThread(make_engine(runner, config), exit_soon, config.stream_interval)
            settings = settings_folder(folder, config.config_folder)
            return runner, GenerationService(
                settings,
                context.model_name,
                engine,
                config,
                describe_computing(runner, topology),
                asdict(message_sizes()),
                parse_api_keys(os.environ.get(API_KEY_VARIABLE)),
            )

        topology, watch, (runner, service) = start_rank(context, HandlerConfig, load)
        log_loaded(topology, runner.weights)
        if service is None:
            follow_in_thread(runner.follow, watch)
            return
        service.engine.start()
        router = service.engine.router
        watch.begin(service.engine, partial(tell_clients, router.fail_all, lambda: router.num_open))
        meters, labels = torchserve_meters(context.metrics), labels_of(context.model_name)
        MetricsReporter(service.engine.figures, meters, labels).report_for_ever()
        self._transport = make_transport(context.model_yaml_config, service.engine, service.open_job)
        if has_replicas(context.model_yaml_config):
            keep_one_open(context.model_name, context.manifest["model"]["modelVersion"])
        gc.collect()
        gc.freeze()  # what stays for ever: to look through it took 0.2 s, now and then, and every stream waited
        log_ready(topology, context.model_name)
