"""transformers' `generate`: a static batch at a time, greedy, with its own choice of attention."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from peers.rounds import Answer, batches, serve_rounds


class Generate:
    def __init__(self, folder: Path) -> None:
        started = time.perf_counter()
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.about = {"version": transformers.__version__, "load_seconds": time.perf_counter() - started}

    def answer(self, prompts: list[list[int]], streams: int, num_tokens: int) -> list[Answer]:
        return [answer for batch in batches(prompts, streams) for answer in self._answer_batch(batch, num_tokens)]

    def _answer_batch(self, prompts: list[list[int]], num_tokens: int) -> list[Answer]:
        ids = torch.tensor(prompts)
        moments: list[float] = []

        def is_over(ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
            moments.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        output = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=2,
            stopping_criteria=[is_over],
        )
        return [Answer(row, moments) for row in output[:, ids.shape[1] :].tolist()]


if __name__ == "__main__":
    serve_rounds(lambda: Generate(Path(sys.argv[1])))
