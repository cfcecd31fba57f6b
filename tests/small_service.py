"""A whole service over the demo model's weights in this process, with whatever tokenizer a test gives it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from http_client import events
from places import DEMO_MODEL

from ts_parallel.config import HandlerConfig, parse_config
from ts_parallel.engine.engine import EngineThread
from ts_parallel.serving import causal_lm
from ts_parallel.serving.exchange import RawRequest, Reply
from ts_parallel.serving.openai.generation_service import GenerationService
from ts_parallel.topology import open_topology

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def checkpoint_with(folder: Path, tokenizer: Any, **settings: Mapping[str, Any]) -> Path:
    """The demo model with another tokenizer.

    Args:
        settings: keys of `config` and `generation_config` that are to be others, by the name of their file.
    """
    shutil.copytree(DEMO_MODEL, folder, ignore=shutil.ignore_patterns(*_TOKENIZER_FILES))
    tokenizer.save_pretrained(folder)
    for name, keys in settings.items():
        file = folder / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    return folder


@dataclass
class SmallService:
    service: GenerationService
    tokenizer: Any
    numbers: Iterator[int] = field(default_factory=count)

    def open(self, route: str, body: Any, content_type: str = "application/json") -> tuple[str, Any]:
        name = f"s{next(self.numbers)}"
        return name, self.service.open_job(name, RawRequest(route, body, content_type))

    def read(self, name: str, opened: Any) -> tuple[int, list[str]]:
        """Status and pieces of all that an open job says."""
        if isinstance(opened, Reply):
            return opened.status, [opened.body]
        status, pieces, deadline = 0, list[str](), time.monotonic() + 60
        while time.monotonic() < deadline:
            self.service.engine.router.wait(0.1)
            reply = opened.advance(self.service.engine.router.take(name))
            if reply is None:
                time.sleep(0.001)  # the news is another reader's: the engine's thread goes on meanwhile
            else:
                status, pieces = status or reply.status, [*pieces, reply.body]
                if reply.is_last:
                    self.service.engine.abort(name)
                    return status, pieces
        raise AssertionError(f"no end after {pieces!r}")

    def send(self, route: str, **body: Any) -> tuple[int, Any]:
        """Status and JSON of a whole answer."""
        status, pieces = self.read(*self.open(route, body))
        return status, json.loads("".join(pieces))

    def complete(self, prompt: str | Sequence[int], **body: Any) -> dict[str, Any]:
        """The only choice of a greedy completion, which is the same when it is streamed."""
        fields = {"prompt": prompt, "temperature": 0, **body}
        status, answer = self.send("v1/completions", **fields)
        assert status == 200, answer
        (choice,) = answer["choices"]
        status, pieces = self.read(*self.open("v1/completions", {**fields, "stream": True}))
        *chunks, _ = events("".join(pieces))
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]
        own: dict[str, Any] = {**choice, "usage": answer["usage"]}
        return own

    def refuse(self, route: str = "v1/completions", **body: Any) -> dict[str, Any]:
        status, answer = self.send(route, **body)
        assert status == 400, answer
        error: dict[str, Any] = answer["error"]
        return error

    def forced(self, *tokens: str) -> dict[str, Any]:
        """Fields by which an answer has one of these tokens at each place."""
        return {"logit_bias": {str(token_id): 100 for token_id in self.ids(*tokens)}}

    def ids(self, *tokens: str) -> list[int]:
        ids: list[int] = self.tokenizer.convert_tokens_to_ids(list(tokens))
        return ids


@contextmanager
def small_service(folder: Path, tokenizer: Any, **section: Any) -> Iterator[SmallService]:
    settings = {"model_path": str(folder), "dtype": "float32", "kv_cache_memory": "16MiB", "max_num_seqs": 8}
    config: HandlerConfig = parse_config({**settings, "max_num_waiting": 8, **section})
    topology = open_topology(1, "cpu", environment={}, num_threads=1)
    thread = EngineThread(causal_lm.make_engine(causal_lm.make_runner(config, folder, topology), config), lambda: None)
    service = GenerationService(folder, "demo", thread, config)
    thread.start()
    try:
        yield SmallService(service, tokenizer)
    finally:
        thread._inbox.put(None)  # type: ignore[arg-type]  # which ends the engine's thread
        thread._thread.join(10)
        topology.close()
