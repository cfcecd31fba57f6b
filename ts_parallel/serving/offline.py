"""The engine in a program of yours: no TorchServe, no HTTP. `examples/offline.py` is a whole one."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from ts_parallel.checkpoint.folders.located import checkpoint_folder
from ts_parallel.checkpoint.settings import settings_folder
from ts_parallel.config import HandlerConfig, parse_config
from ts_parallel.engine.engine import SECONDS_BETWEEN_SIGNS_OF_LIFE, Engine
from ts_parallel.engine.request import FinishReason, GenerationParams, Request, make_request
from ts_parallel.errors import StartupError
from ts_parallel.runtime.runner import Runner
from ts_parallel.serving.causal_lm import make_engine, make_runner
from ts_parallel.serving.torchserve.rank_watch import patience_beside
from ts_parallel.topology import Topology, open_topology


@dataclass(frozen=True)
class Generation:
    """The answer to one prompt."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


class OfflineModel:
    """A model on the ranks that work for it: rank 0 generates, the others follow it until the block of `open_model`
    ends."""

    is_leader = False

    def generate(self, prompts: Sequence[str | Sequence[int]], params: GenerationParams) -> list[Generation]:
        """Answers in the order of the prompts, which run together; on ranks other than 0 an empty list, at once.

        Args:
            prompts: texts, or token ids.

        Raises:
            RequestError: a prompt is empty or too long, `max_tokens` is more than the room it leaves, or a token id,
                a tokenizer's too, is none of the model's.
            EngineError: the model's logits for one of them hold NaN, or leave no token. It can be asked again.
        """
        return []

    def close(self) -> None:
        """Nothing is generated any more."""


class _Leader(OfflineModel):
    """Owns the engine and the tokenizer, and a thread that keeps the ranks that follow patient between two calls."""

    is_leader = True

    def __init__(self, engine: Engine, config: HandlerConfig, folder: Path) -> None:
        # Not above: the ranks that follow need no transformers, and save its memory.
        from ts_parallel.partition.model.model_config import max_positions_of, read_model_config
        from ts_parallel.serving.text.detokenizer import TextDecoder
        from ts_parallel.serving.text.model_files import read_eos_ids, read_tokenizer, vocabulary_of

        settings = settings_folder(folder, config.config_folder)
        model_config = read_model_config(settings)
        self._engine = engine
        self._tokenizer = read_tokenizer(settings)
        self._decoder = TextDecoder(self._tokenizer)
        self._eos_ids = read_eos_ids(settings, model_config, self._tokenizer)
        self._vocabulary = vocabulary_of(model_config, self._tokenizer)
        self._max_model_len = config.resolve_max_model_len(max_positions_of(model_config))
        self._names = map(str, count())
        self._engine_free = threading.Lock()
        self._is_over = threading.Event()
        if config.num_ranks > 1:
            threading.Thread(target=self._give_signs_of_life, name="signs of life", daemon=True).start()

    def close(self) -> None:
        with self._engine_free:
            self._is_over.set()

    def _give_signs_of_life(self) -> None:
        while not self._is_over.wait(SECONDS_BETWEEN_SIGNS_OF_LIFE):
            with self._engine_free:
                if not self._is_over.is_set():
                    self._engine.sign_of_life()

    def generate(self, prompts: Sequence[str | Sequence[int]], params: GenerationParams) -> list[Generation]:
        requests = [self._request(prompt, params) for prompt in prompts]
        with self._engine_free:
            self._engine.generate(requests)
        return [self._generation(request) for request in requests]

    def _request(self, prompt: str | Sequence[int], params: GenerationParams) -> Request:
        return make_request(
            next(self._names),
            self._token_ids(prompt),
            params,
            eos_ids=self._eos_ids,
            max_model_len=self._max_model_len,
            vocabulary=self._vocabulary,
        )

    def _token_ids(self, prompt: str | Sequence[int]) -> Sequence[int]:
        """None for an empty text, though a tokenizer may begin each with a token of its own."""
        if isinstance(prompt, str):
            return list(self._tokenizer(prompt).input_ids) if prompt else []
        return prompt

    def _generation(self, request: Request) -> Generation:
        reason = request.finish_reason()
        assert reason is not None
        text = self._decoder.text_after(request.prompt_ids, request.output_ids)
        return Generation(text, tuple(request.output_ids), reason)


@contextmanager
def open_model(folder: str | Path, **settings: Any) -> Iterator[OfflineModel]:
    """The checkpoint in `folder`, loaded on all ranks that torchrun has started, or in this process alone.

    Args:
        settings: further keys of the `handler:` section, such as `tensor_parallel_size`.

    Raises:
        StartupError: the model cannot be loaded on some rank, or the ranks are not as many as it needs.
        RuntimeError: from `generate`: another rank has ended, or has not answered for eleven times
            `max_step_seconds` (120 s at least).
    """
    config = parse_config({"model_path": str(folder), **settings})
    topology = open_topology(
        config.tensor_parallel_size,
        config.device,
        num_threads=config.num_threads,
        pipeline_parallel_size=config.pipeline_parallel_size,
        patience=patience_beside(config.max_step_seconds),
    )
    try:
        runner, model = _load(config, checkpoint_folder(Path(folder)), topology)
        try:
            yield model
        finally:
            model.close()
            if model.is_leader:
                runner.stop_followers()
            else:
                runner.follow()
    finally:
        topology.close()


def _load(config: HandlerConfig, folder: Path, topology: Topology) -> tuple[Runner, OfflineModel]:
    failure, loaded = None, None
    try:
        runner = make_runner(config, folder, topology)
        leads = topology.rank == 0
        loaded = runner, _Leader(make_engine(runner, config), config, folder) if leads else OfflineModel()
    except StartupError as refused:
        failure = str(refused)
    errors = topology.gather_errors(failure)  # else the others would wait for the one that failed
    if errors:
        raise StartupError(errors[0])
    assert loaded is not None
    return loaded


def num_ranks_started() -> int:
    """As many as torchrun says; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))
