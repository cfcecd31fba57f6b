"""Models that are not causal language models behind TorchServe: what `handlers/batch_inference.py` calls."""

from __future__ import annotations

import json
import logging
import threading
from http import HTTPStatus
from pathlib import Path
from typing import Any

import torch

from ts_parallel.checkpoint.index import read_index
from ts_parallel.config import BatchConfig
from ts_parallel.errors import EngineError, NotFoundError, RequestError
from ts_parallel.partition.load import load_program
from ts_parallel.partition.prepared import prepare_program
from ts_parallel.partition.program import PipelinePlace, ProgramRequest
from ts_parallel.runtime.batch_runner import BatchRunner
from ts_parallel.runtime.channel import StepChannel
from ts_parallel.runtime.linears import pack_weight
from ts_parallel.runtime.stage import Stage
from ts_parallel.serving.answers import JSON, error_body
from ts_parallel.serving.bodies import RawRequest
from ts_parallel.serving.continuous_batching import end_grpc, raw_request
from ts_parallel.serving.micro_batching import MicroBatcher
from ts_parallel.serving.tasks import Task, make_task
from ts_parallel.serving.worker import exit_now, follow_in_thread, log_loaded, log_ready, start_rank
from ts_parallel.topology import Topology

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_SIGNS_OF_LIFE = 20.0


class BatchInferenceHandler:
    """One worker process: rank 0 answers TorchServe's batches, the other ranks follow its micro-batches.

    For pre- or postprocessing of your own, override either method; both run in several threads at once, beside the
    inference, and what they raise is the answer to their item alone: a `RequestError` with its status, anything else
    with 500. The file that is archived then reads:

        from dataclasses import replace

        from ts_parallel.errors import RequestError
        from ts_parallel.serving.batch_inference import BatchInferenceHandler

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
        self._runner: BatchRunner | None = None
        self._batcher: MicroBatcher | None = None

    def preprocess(self, item: RawRequest) -> dict[str, torch.Tensor]:
        """One request → the model's inputs by name, without the dim of the batch. The default is the task's.

        Raises:
            RequestError: the request is refused, with this text.
        """
        assert self._task is not None
        return self._task.preprocess(item)

    def postprocess(self, output: torch.Tensor) -> Any:
        """One request's part of the model's output, on the CPU → what `json.dumps` takes. The default is the task's.

        `[num_labels]` logits of a classifier, `[hidden]` of an embedding, `[S, hidden]` of an encoder.
        """
        assert self._task is not None
        return self._task.postprocess(output)

    def handle(self, data: list[dict[str, Any]] | None, context: Any) -> list[str]:
        """TorchServe's entry point. Called first with no data, to load."""
        if data is None:
            self._load(context)
            return []
        if self._batcher is None:  # a rank that follows: it acts on rank 0's turns alone
            return [""] * len(data)
        answers = self._answer([raw_request(element, context, index) for index, element in enumerate(data)])
        for index, (status, _) in enumerate(answers):
            context.set_response_status(status, HTTPStatus(status).phrase, index)
            context.set_response_content_type(index, JSON)
            end_grpc(context, index)
        return [body for _, body in answers]

    def _load(self, context: Any) -> None:
        def load(config: BatchConfig, folder: Path, topology: Topology) -> tuple[BatchConfig, BatchRunner, Task | None]:
            runner = make_batch_runner(config, folder, topology)
            return config, runner, make_task(config.task, folder, config.dtype) if topology.rank == 0 else None

        topology, (config, runner, self._task) = start_rank(context, BatchConfig, load)
        log_loaded(topology, f"{config.virtual_stages} of {config.num_stages} stages")
        if self._task is None:
            follow_in_thread(runner.follow)
            return
        self._runner = runner
        self._batcher = MicroBatcher(
            runner,
            self.preprocess,
            lambda output: json.dumps(self.postprocess(output), allow_nan=False),
            config.micro_batch_size,
            config.parallelism.preprocess,
            config.parallelism.postprocess,
            self._task.collator,
        )
        if topology.world_size > 1:
            threading.Thread(target=give_signs_of_life, args=(runner,), name="signs of life", daemon=True).start()
        log_ready(topology, context.model_name)

    def _answer(self, requests: list[RawRequest]) -> list[tuple[int, str]]:
        """Status and body of each; nothing is raised. Where the ranks are out of step, this process ends."""
        assert self._batcher is not None and self._runner is not None
        answers = {index: _answer_to_route(request.route) for index, request in enumerate(requests) if request.route}
        items = [request for request in requests if not request.route]
        try:
            results = self._batcher.run(items)
        except Exception as error:
            logger.exception("the inference failed")
            if self._runner.is_broken:
                exit_now()
            results = [EngineError(f"the inference failed: {error}")] * len(items)
        waiting = iter(results)
        return [answers[index] if index in answers else _answer_of(next(waiting)) for index in range(len(requests))]


def make_batch_runner(config: BatchConfig, folder: Path, topology: Topology) -> BatchRunner:
    """This rank's stages, loaded and ready to run."""
    group, index = topology.tensor_parallel, read_index(folder)
    place = PipelinePlace(topology.stage, topology.num_stages, config.virtual_stages, config.split_points)
    request = ProgramRequest(folder, config.dtype, group.rank, group.size, place, config.task)
    program = prepare_program(request, index)
    tensors = load_program(program, index, group, topology.device, pack_weight).tensors
    stages = [Stage(code, tensors, group) for code in program.stages]
    return BatchRunner(stages, StepChannel(topology), topology, program.inputs_by_stage, program.outputs[0])


def give_signs_of_life(runner: BatchRunner) -> None:
    """Keep the ranks that follow patient while no request comes, for as long as they are in step."""
    pause = threading.Event()
    while not runner.is_broken:
        pause.wait(SECONDS_BETWEEN_SIGNS_OF_LIFE)
        try:
            runner.sign_of_life()
        except RuntimeError:
            logger.exception("another rank was lost")
            exit_now()


def _answer_to_route(route: str) -> tuple[int, str]:
    if route == "health":
        return 200, '{"status": "ok"}'
    return _answer_of(NotFoundError(f"no route {route!r}: there is health"))


def _answer_of(result: str | Exception) -> tuple[int, str]:
    if isinstance(result, str):
        return 200, result
    if isinstance(result, RequestError):
        return result.status, error_body(result)
    logger.error("a request failed", exc_info=result)
    return _answer_of(EngineError(f"{type(result).__name__}: {result}"))
