"""What this machine could do at most: how fast its cores read memory and multiply in bfloat16, measured now.

    python examples/benchmarks/roofline.py            both figures as JSON

From them follows a limit of tokens/s that no program can pass while it reads the weights once a step, 16 bits of each:
one that keeps them in fewer could, where memory is the limit. With n streams, P prompt tokens and T output tokens each,
W bytes of weights that a step reads (every linear and the head; of the embedding a token reads one row), F
multiply-adds × 2 of one token in the layers and H in the head, bandwidth B and rate G:

    step(m, r) = max(W / B, (m·F + r·H) / G)          m tokens through the layers, r of them through the head
    seconds(n) = step(n·P, n) + (T - 1) · step(n, n)
    limit(n)   = n·T / seconds(n)

Reading and computing overlap without loss, prompts are computed in one step, and attention, the KV cache and everything
else cost nothing: so it lies above what is possible. Knows no peers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

_BYTES_READ = 2**29  # many times what a cache holds
_BYTES_OF_A_PARAMETER = 2
_SIZES_OF_GEMM = ((1024, 2048, 2048), (4096, 2048, 768), (4096, 4096, 4096))
_TURNS = 10


@dataclass(frozen=True)
class Machine:
    """Bytes/s that all cores read, FLOP/s of their best bfloat16 matrix product."""

    bandwidth: float
    flops: float


def measure() -> Machine:
    """The best of some turns each, with torch's threads, one for each core."""
    import torch

    numbers = torch.ones(_BYTES_READ // 4)
    bandwidth = _BYTES_READ / _best_seconds(numbers.max)  # faster than their sum: less to compute for each byte
    flops = 0.0
    for rows, columns, inner in _SIZES_OF_GEMM:
        a, b = torch.randn(rows, inner).bfloat16(), torch.randn(columns, inner).bfloat16()
        seconds = _best_seconds(partial(torch.nn.functional.linear, a, b))
        flops = max(flops, 2 * rows * columns * inner / seconds)
    return Machine(bandwidth, flops)


def _best_seconds(work: Callable[[], object]) -> float:
    """Of some turns after one that does not count."""
    work()
    taken = []
    for _ in range(_TURNS):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)


@dataclass(frozen=True)
class Work:
    """What one token costs a model: parameters of its layers' linears and of its head, tied or not."""

    layer_parameters: int
    head_parameters: int

    @property
    def weight_bytes(self) -> int:
        return (self.layer_parameters + self.head_parameters) * _BYTES_OF_A_PARAMETER

    def step_seconds(self, machine: Machine, num_tokens: int, num_sampled: int) -> float:
        flop = 2 * (num_tokens * self.layer_parameters + num_sampled * self.head_parameters)
        return max(self.weight_bytes / machine.bandwidth, flop / machine.flops)

    def limit(self, machine: Machine, streams: int, prompt_tokens: int, output_tokens: int) -> dict[str, float]:
        """Tokens/s (`rate`), and the seconds to the `first` token of one prompt and to the `next` of all streams."""
        following = self.step_seconds(machine, streams, streams)
        prompts = self.step_seconds(machine, streams * prompt_tokens, streams)
        seconds = prompts + (output_tokens - 1) * following
        return {
            "rate": streams * output_tokens / seconds,
            "first": self.step_seconds(machine, prompt_tokens, 1),
            "next": following,
        }


def work_of_llama(config: Mapping[str, Any]) -> Work:
    """From the fields of a Llama's config.json."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_width = hidden // heads * config["num_key_value_heads"]
    attention = 2 * hidden * hidden + 2 * hidden * kv_width
    layer = attention + 3 * hidden * config["intermediate_size"]
    return Work(config["num_hidden_layers"] * layer, hidden * config["vocab_size"])


if __name__ == "__main__":
    print(json.dumps(vars(measure())))
