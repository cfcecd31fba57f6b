"""Causal language models behind TorchServe: what `handlers/text_generation.py` calls."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig

from ts_parallel.config import HandlerConfig
from ts_parallel.engine.block_manager import BlockManager
from ts_parallel.engine.engine import Engine, EngineThread
from ts_parallel.engine.request import GenerationParams, make_request
from ts_parallel.engine.scheduler import Scheduler
from ts_parallel.errors import CheckpointError, ConfigError, NotFoundError, RequestError
from ts_parallel.partition.build import PipelinePlace, build_rank_model
from ts_parallel.partition.deferred import read_model_config
from ts_parallel.runtime.runner import Runner
from ts_parallel.serving.answers import Answer, Completion, CompletionStream, TextStream, WholeText, model_list
from ts_parallel.serving.bodies import RawRequest, parse_completion, parse_native
from ts_parallel.serving.continuous_batching import ContinuousBatchingDrain, Job, Reply
from ts_parallel.serving.detokenizer import Detokenizer
from ts_parallel.serving.keep_open import has_replicas, keep_one_open
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
            return runner, GenerationService(folder, context.model_name, runner, config) if leads else None

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


class GenerationService:
    """Turns raw requests into running jobs. Owns the engine's thread and the tokenizer."""

    def __init__(self, folder: Path, name: str, runner: Runner, config: HandlerConfig) -> None:
        model_config = read_model_config(folder)
        self._name = name
        self._max_model_len = resolve_max_model_len(config.max_model_len, model_config)
        self._started_at = int(time.time())
        self._tokenizer = read_tokenizer(folder)
        self._eos_ids = read_eos_ids(folder, model_config)
        self.engine = EngineThread(make_engine(runner, config), on_failure=exit_soon)

    def open_job(self, request_id: str, request: RawRequest) -> Job | Reply:
        """Route one request. What cannot be served becomes a reply of its own; nothing is raised."""
        try:
            if request.route == "health":
                return Reply.whole('{"status": "ok"}' if self.engine.is_alive else '{"status": "failed"}')
            if request.route == "v1/models":
                return Reply.whole(model_list(self._name, self._started_at, self._max_model_len))
            if request.route == "v1/completions":
                return self._open_completion(request_id, request)
            if request.route == "":
                return self._open_native(request_id, request)
            raise NotFoundError(f"no route {request.route!r}: there are v1/completions, v1/models and health")
        except RequestError as error:
            return Reply.refusal(error)

    def _open_native(self, request_id: str, request: RawRequest) -> Job:
        body = parse_native(request)
        params = body.generation_params(body.temperature, random.getrandbits(64))
        return self._run(request_id, body.prompt, params, TextStream() if body.stream else WholeText())

    def _open_completion(self, request_id: str, request: RawRequest) -> Job:
        body = parse_completion(request)
        temperature = 1.0 if body.temperature is None else body.temperature
        params = body.generation_params(temperature, random.getrandbits(64), body.ignore_eos)
        answer: Answer = Completion(request_id, self._name)
        if body.stream:
            options = body.stream_options
            answer = CompletionStream(
                request_id,
                self._name,
                include_usage=options is not None and (options.include_usage or options.continuous_usage_stats),
                has_usage_in_each=options is not None and options.continuous_usage_stats,
            )
        return self._run(request_id, body.single_prompt(), params, answer)

    def _run(self, request_id: str, prompt: str | list[int], params: GenerationParams, answer: Answer) -> Job:
        prompt_ids = self._prompt_ids(prompt)
        request = make_request(request_id, prompt_ids, params, eos_ids=self._eos_ids, max_model_len=self._max_model_len)
        self.engine.submit(request)
        return Job(answer, Detokenizer(self._tokenizer), len(prompt_ids))

    def _prompt_ids(self, prompt: str | list[int]) -> list[int]:
        if not prompt:
            raise RequestError("the prompt is empty", "prompt")
        if isinstance(prompt, str):
            return list(self._tokenizer(prompt).input_ids)
        vocabulary = len(self._tokenizer)
        for token_id in prompt:
            if not 0 <= token_id < vocabulary:
                raise RequestError(f"token id {token_id} is outside the vocabulary of {vocabulary}", "prompt")
        return prompt


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
    blocks = BlockManager(runner.num_blocks, runner.block_size)
    scheduler = Scheduler(
        blocks,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        num_stages=runner.num_stages,
    )
    return Engine(runner, scheduler)


def resolve_max_model_len(wanted: int | None, model_config: PretrainedConfig) -> int:
    """The configured length, or all that the model was trained for.

    Raises:
        ConfigError: the model has fewer positions than were asked for.
    """
    positions: int | None = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    wanted = wanted or positions
    if wanted is None:
        raise ConfigError("config.json names no max_position_embeddings: set max_model_len")
    if positions is not None and wanted > positions:
        raise ConfigError(f"max_model_len {wanted} is more than the model's max_position_embeddings {positions}")
    return wanted


def read_tokenizer(folder: Path) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no usable tokenizer in {folder}: {str(error).splitlines()[0]}") from None
    names = sorted(tokenizer.vocab_files_names.values())
    if names and not any((folder / name).is_file() for name in names):
        # transformers makes a tokenizer with an empty vocabulary then.
        raise CheckpointError(f"no usable tokenizer in {folder}: it has none of {names}")
    return tokenizer


def read_eos_ids(folder: Path, model_config: PretrainedConfig) -> frozenset[int]:
    """The tokens that end an answer: generation_config.json's where there is one, else config.json's."""
    eos: int | list[int] | None = model_config.get_text_config().eos_token_id
    if (folder / "generation_config.json").is_file():
        eos = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id or eos
    return frozenset([eos] if isinstance(eos, int) else eos or [])
