"""transformers' `generate_batch`: continuous batching over a paged cache, greedy, prefix sharing off.

Its manager is kept from call to call, with room for what is asked: by itself it takes nine tenths of the memory.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from peers.rounds import Answer, batches, serve_rounds

_ROOM = {"num_blocks": 64, "max_batch_tokens": 512, "max_requests_per_batch": 32}


class GenerateBatch:
    def __init__(self, folder: Path) -> None:
        started = time.perf_counter()
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="paged|sdpa"
        ).eval()
        self.about = {"version": transformers.__version__, "load_seconds": time.perf_counter() - started}

    def answer(self, prompts: list[list[int]], streams: int, num_tokens: int) -> list[Answer]:
        return [answer for batch in batches(prompts, streams) for answer in self._answer_batch(batch, num_tokens)]

    def _answer_batch(self, prompts: list[list[int]], num_tokens: int) -> list[Answer]:
        config = GenerationConfig(max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=2)
        outputs = self._model.generate_batch(
            inputs=prompts,
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(allow_block_sharing=False, **_ROOM),
            max_new_tokens=num_tokens,
            persistent_manager=True,
            record_timestamps=True,
        )
        return [Answer(output.generated_tokens, output.timestamps) for output in outputs.values()]


if __name__ == "__main__":
    serve_rounds(lambda: GenerateBatch(Path(sys.argv[1])))
