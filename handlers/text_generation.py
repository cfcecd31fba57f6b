"""TorchServe entry file for causal language models: continuous batching, tensor parallel, streaming.

torch-model-archiver --handler handlers/text_generation.py --config-file model-configs/tp2-cpu.yaml …
"""

from typing import Any

from ts_parallel.serving.text_generation import TextGenerationService

_service = TextGenerationService()


def handle(data: list[dict[str, Any]] | None, context: Any) -> list[str]:
    """Called once without data to load the model, then for every batch."""
    return _service.handle(data, context)
