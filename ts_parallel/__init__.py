"""Serving of unmodified Hugging Face models over several ranks behind TorchServe: the names that programs import.

They are loaded when they are asked for, so that importing the package alone costs nothing. What is not here may move.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ts_parallel.engine.request import GenerationParams
    from ts_parallel.errors import RequestError, TSParallelError
    from ts_parallel.serving.batch_inference import BatchInferenceHandler
    from ts_parallel.serving.offline import num_ranks_started, open_model
    from ts_parallel.serving.torchserve.streaming import StreamingHandler
    from ts_parallel.step_plan import SamplingParams

__all__ = [
    "BatchInferenceHandler",
    "GenerationParams",
    "RequestError",
    "SamplingParams",
    "StreamingHandler",
    "TSParallelError",
    "num_ranks_started",
    "open_model",
]

_HOMES = {
    "BatchInferenceHandler": "ts_parallel.serving.batch_inference",
    "GenerationParams": "ts_parallel.engine.request",
    "RequestError": "ts_parallel.errors",
    "SamplingParams": "ts_parallel.step_plan",
    "StreamingHandler": "ts_parallel.serving.torchserve.streaming",
    "TSParallelError": "ts_parallel.errors",
    "num_ranks_started": "ts_parallel.serving.offline",
    "open_model": "ts_parallel.serving.offline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
