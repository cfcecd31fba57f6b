"""Models that are not causal language models behind TorchServe: what `handlers/batch_inference.py` calls."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, Protocol

import torch

from ts_parallel.checkpoint.index import read_index
from ts_parallel.config import BatchConfig, Seq2SeqConfig
from ts_parallel.errors import ConfigError, EngineError, NotFoundError
from ts_parallel.openapi import document as openapi
from ts_parallel.partition.load import load_program
from ts_parallel.partition.model.sentence_modules import transformer_folder
from ts_parallel.partition.prepared import prepare_program
from ts_parallel.partition.program import PipelinePlace, ProgramRequest
from ts_parallel.runtime.backends.choose import choose_backend, own_dtype
from ts_parallel.runtime.batch.batch_runner import BatchRunner
from ts_parallel.runtime.channel import StepChannel
from ts_parallel.runtime.stage import Stage
from ts_parallel.serving.batch.description import ALWAYS, description
from ts_parallel.serving.batch.jobs import Body, Job, Work, as_request_error
from ts_parallel.serving.batch.micro_batching import MicroBatcher, Runner
from ts_parallel.serving.batch.seq2seq import answer_runner, is_seq2seq, make_part_runner, make_seq2seq_task
from ts_parallel.serving.batch.tasks import Task, make_task
from ts_parallel.serving.exchange import JSON, RawRequest, Reply
from ts_parallel.serving.torchserve.front_end import exit_now
from ts_parallel.serving.torchserve.front_end_settings import message_sizes
from ts_parallel.serving.torchserve.streaming import ResponseStream, StreamJob, Streams
from ts_parallel.serving.torchserve.transports.plain_batching import PlainBatches
from ts_parallel.serving.torchserve.worker import follow_in_thread, log_loaded, log_ready, start_rank
from ts_parallel.topology import Topology

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_SIGNS_OF_LIFE = 20.0


class BatchInferenceHandler:
    """One worker process: rank 0 answers TorchServe's batches, the other ranks follow its micro-batches.

    For pre- or postprocessing of your own, override either method, which then is given every body of the model's own
    URL, and leaves the routes below it as they are; both run in several threads at once, beside the
    inference, and what they raise is the answer to their item alone: a `RequestError` with its status, anything else
    with 500. The file that is archived then reads:

        from dataclasses import replace

        from ts_parallel import BatchInferenceHandler, RequestError

        class ReviewHandler(BatchInferenceHandler):
            def preprocess(self, item):
                review = item.fields().get("review")
                if not isinstance(review, str):
                    raise RequestError("'review' must be a text", "review")
                return super().preprocess(replace(item, body={"text": review}))

            def postprocess(self, output):
                return {"stars": 1 + int(output.argmax())}

        _handler = ReviewHandler()

        def handle(data, context):
            return _handler.handle(data, context)
    """

    def __init__(self) -> None:
        self._task: Task | None = None
        self._runner: Ranks | None = None
        self._batcher: MicroBatcher | None = None
        self._streams = Streams()
        self._opened: list[_Item] = []
        self._name, self._models = "", ""
        self._inference = ThreadPoolExecutor(1, "inference")
        self._transport = PlainBatches(self._streams, self._open, self._begin, message_sizes().max_response_size)

    def preprocess(self, item: RawRequest) -> dict[str, torch.Tensor]:
        """One request → the model's inputs by name, without the dim of the batch. The default is the task's.

        Raises:
            RequestError: the request is refused, with this text.
        """
        assert self._task is not None
        return self._task.preprocess(item)

    def postprocess(self, output: torch.Tensor) -> Any:
        """One request's part of the model's output, on the CPU → what `json.dumps` takes. The default is the task's.

        `[num_labels]` logits of a classifier, `[hidden]` of an embedding, `[S, hidden]` of an encoder, the token ids
        `[N]` of a generated answer, a `Transcript` of speech.
        """
        assert self._task is not None
        return self._task.postprocess(output)

    def respond(self, output: torch.Tensor, stream: ResponseStream) -> None:
        """Answer one request, in a thread of postprocessing: the default sends what `postprocess` makes, as JSON.

        To answer in pieces, override this and `stream.send` each as it is ready; returning ends the answer.
        """
        stream.content_type = JSON
        stream.end(json.dumps(self.postprocess(output), allow_nan=False))

    def handle(self, data: list[dict[str, Any]] | None, context: Any) -> list[str]:
        """TorchServe's entry point. Called first with no data, to load."""
        if data is None:
            self._load(context)
            return []
        if self._batcher is None:  # a rank that follows: it acts on rank 0's turns alone
            return [""] * len(data)
        return self._transport.handle(data, context)

    def _load(self, context: Any) -> None:
        kind: type[BatchConfig | Seq2SeqConfig] = BatchConfig
        if is_seq2seq((context.model_yaml_config or {}).get("handler")):
            kind = Seq2SeqConfig

        def load(
            config: BatchConfig | Seq2SeqConfig, folder: Path, topology: Topology
        ) -> tuple[BatchConfig | Seq2SeqConfig, _Loaded]:
            refuse_continuous_batching(context.model_yaml_config)
            parts = _load_seq2seq if isinstance(config, Seq2SeqConfig) else _load_stages
            return config, parts(config, folder, topology, context.model_name)  # type: ignore[arg-type]  # of its own kind

        topology, watch, (config, loaded) = start_rank(context, kind, load)
        self._runner, self._task = loaded.ranks, loaded.task
        log_loaded(topology, loaded.what)
        if loaded.task is None or loaded.runner is None:
            follow_in_thread(loaded.ranks.follow, watch)
            return
        self._batcher = MicroBatcher(
            loaded.runner,
            lambda part: part.prepare(),
            lambda part, output: part.take(output),
            config.micro_batch_size,
            config.parallelism.preprocess,
            config.parallelism.postprocess,
            loaded.task.collator,
        )
        entry = {"id": context.model_name, "object": "model", "created": int(time.time()), "owned_by": "ts_parallel"}
        self._name = context.model_name
        entry["task"] = config.task  # by which those who ask know that it generates no text
        self._models = json.dumps({"object": "list", "data": [entry]})
        watch.begin(loaded.ranks)
        if topology.world_size > 1:
            signs = threading.Thread(target=give_signs_of_life, args=(loaded.ranks,), name="signs of life", daemon=True)
            signs.start()
        log_ready(topology, context.model_name)

    def _open(self, request_id: str, request: RawRequest) -> StreamJob | Reply:
        assert self._task is not None
        if request.route == "health":
            return Reply.whole('{"status": "ok"}')
        if request.route == "v1/models":
            return Reply.whole(self._models)
        if request.route == openapi.ROUTE:
            return Reply.whole(description(self._name, self._task))
        if request.route and request.route not in self._task.routes:
            known = ", ".join((*self._task.routes, *ALWAYS))
            return Reply.refusal(NotFoundError(f"no route {request.route!r}: there are {known}"))
        stream = self._streams.open(request_id)
        self._opened.append(_Item(request, stream))
        return StreamJob(stream)

    def _begin(self) -> Future[None]:
        items, self._opened = self._opened, []
        return self._inference.submit(self._answer, items)

    def _answer(self, items: list[_Item]) -> None:
        """End each item's stream; nothing is raised. Where the ranks are out of step, this process ends."""
        assert self._batcher is not None and self._runner is not None
        jobs = [(item, job) for item in items if (job := self._job(item)) is not None]
        parts = [part for _, job in jobs for part in job.parts]
        try:
            results = iter(self._batcher.run(parts))
        except Exception as error:
            logger.exception("the inference failed")
            if self._runner.is_broken:
                exit_now()
            results = repeat(EngineError(f"the inference failed: {error}"))
        for item, job in jobs:
            error_of_job = job.error_of([next(results) for _ in job.parts])
            if error_of_job is not None:
                item.stream.end(error=error_of_job)

    def _job(self, item: _Item) -> Job | None:
        """What a request brings to the model; None where it is refused already."""
        assert self._task is not None
        request, stream = item.request, item.stream
        try:
            work = None if request.route == "" and self._has_own_bodies() else self._task.open(request)
        except Exception as error:
            item.stream.end(error=as_request_error(error))
            return None
        if work is None:
            own = Work([lambda: self.preprocess(request)], lambda done: done[0].output)
            return Job(own, lambda output: self._respond(stream, output))
        return Job(work, lambda answer: _send(stream, answer))

    def _has_own_bodies(self) -> bool:
        """Whether a user's file has changed what goes in and comes out on the model's own URL."""
        names = ("preprocess", "postprocess", "respond")
        return any(getattr(type(self), name) is not getattr(BatchInferenceHandler, name) for name in names)

    def _respond(self, stream: ResponseStream, output: torch.Tensor) -> None:
        self.respond(output, stream)
        stream.end()


def _send(stream: ResponseStream, answer: Any) -> None:
    body = answer if isinstance(answer, Body) else Body(json.dumps(answer, allow_nan=False))
    stream.content_type = body.content_type
    stream.end(body.text)


@dataclass(frozen=True)
class _Item:
    request: RawRequest
    stream: ResponseStream


class Ranks(Protocol):
    """What the handler needs of the runner of its rank: `runtime.batch.batch_runner.BatchRunner`, or that of parts."""

    @property
    def is_broken(self) -> bool: ...

    @property
    def progress(self) -> int | None: ...

    def follow(self) -> None: ...

    def sign_of_life(self) -> None: ...


@dataclass(frozen=True)
class _Loaded:
    """This rank's part of the model; on rank 0, what runs micro-batches of which task."""

    ranks: Ranks
    what: str
    """Of which it is a part."""
    runner: Runner | None = None
    task: Task | None = None


def refuse_continuous_batching(settings: Mapping[str, Any]) -> None:
    """
    Raises:
        ConfigError: model-config.yaml asks for it.
    """
    if settings.get("continuousBatching"):
        raise ConfigError(
            "model-config.yaml key 'continuousBatching': batch inference answers whole batches, which batchSize and "
            "maxBatchDelay make: remove the key"
        )


def _load_stages(config: BatchConfig, folder: Path, topology: Topology, model: str) -> _Loaded:
    folder = transformer_folder(folder)
    runner = make_batch_runner(config, folder, topology)
    what = f"{config.virtual_stages} of {config.num_stages} stages"
    if topology.rank:
        return _Loaded(runner, what)
    dtype = own_dtype(config.dtype, config.device)
    task = make_task(config.task, folder, dtype, model, config.max_items, config.max_audio_seconds)
    return _Loaded(runner, what, runner, task)


def _load_seq2seq(config: Seq2SeqConfig, folder: Path, topology: Topology, model: str) -> _Loaded:
    ranks = make_part_runner(config, folder, topology)
    what = f"1 of {config.num_stages} stages of encoder and decoder"
    if topology.rank:
        return _Loaded(ranks, what)
    task, rules = make_seq2seq_task(config, folder)
    return _Loaded(ranks, what, answer_runner(ranks, rules), task)


def make_batch_runner(config: BatchConfig, folder: Path, topology: Topology) -> BatchRunner:
    """This rank's stages, loaded and ready to run."""
    group, index = topology.tensor_parallel, read_index(folder)
    place = PipelinePlace(topology.stage, topology.num_stages, config.virtual_stages, config.split_points)
    request = ProgramRequest(folder, own_dtype(config.dtype, config.device), group.rank, group.size, place, config.task)
    program = prepare_program(request, index)
    backend = choose_backend(topology.device, program.dtype, topology.num_threads)
    tensors = load_program(program, index, group, topology.device, backend.weights).tensors
    stages = [Stage(code, tensors, group, backend) for code in program.stages]
    return BatchRunner(stages, StepChannel(topology), topology, program.inputs_by_stage, program.outputs[0])


def give_signs_of_life(runner: Ranks) -> None:
    """Keep the ranks that follow patient while no request comes, for as long as they are in step."""
    pause = threading.Event()
    while not runner.is_broken:
        pause.wait(SECONDS_BETWEEN_SIGNS_OF_LIFE)
        try:
            runner.sign_of_life()
        except RuntimeError:
            logger.exception("another rank was lost")
            exit_now()
