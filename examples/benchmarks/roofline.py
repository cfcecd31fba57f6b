"""What this machine could do at most: how fast its cores read memory and multiply matrices, measured now.

    python examples/benchmarks/roofline.py            both figures as JSON, and which product was the best

A machine may multiply one dtype many times as fast as another: so float32 and bfloat16 by torch, and bfloat16 by this
package's kernels where they run, have some seconds each, and the best of them counts.

From both follows a limit of tokens/s that no program can pass while it reads the weights once a step, 16 bits of each:
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
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

_BYTES_READ = 2**29  # many times what a cache holds
_BYTES_OF_A_PARAMETER = 2
# Rows, columns, inner size; the least work first, by which it is known whether there is time for the next.
_SIZES_OF_GEMM = ((64, 2048, 768), (1024, 2048, 2048), (4096, 2048, 768), (4096, 4096, 4096))
_TURNS = 10
_SECONDS_OF_READING = 3.0
_MOST_TURNS_OF_READING = 100  # where others want the cores too, few of them have both
_SECONDS_OF_A_PRODUCT = 4.0

Product = Callable[[int, int, int], Callable[[], object]]
"""Rows, columns and inner size → what multiplies matrices of these once."""


@dataclass(frozen=True)
class Machine:
    """Bytes/s that all cores read, FLOP/s of their best matrix product."""

    bandwidth: float
    flops: float
    product: str = ""
    """Which of `products` that is."""
    products: Mapping[str, float] = field(default_factory=dict)
    """FLOP/s of each that there is."""


def measure() -> Machine:
    """The best of some turns each, with a thread for each core."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    numbers = torch.ones(_BYTES_READ // 4)
    # The maximum is faster than the sum: less to compute for each byte.
    seconds = best_seconds(numbers.max, time.perf_counter() + _SECONDS_OF_READING, _MOST_TURNS_OF_READING)
    bandwidth = _BYTES_READ / seconds
    del numbers
    products = {name: best_rate(product, _SECONDS_OF_A_PRODUCT) for name, product in find_products().items()}
    best = max(products, key=products.__getitem__)
    return Machine(bandwidth, products[best], best, products)


def find_products() -> dict[str, Product]:
    """Those that this machine has, by name."""
    import torch

    from ts_parallel.runtime.backends.choose import choose_backend

    def by_torch(dtype: torch.dtype, rows: int, columns: int, inner: int) -> Callable[[], object]:
        hidden, weight = (torch.randn(count, inner).to(dtype) for count in (rows, columns))
        return partial(torch.nn.functional.linear, hidden, weight)

    def by_kernels(rows: int, columns: int, inner: int) -> Callable[[], object]:
        from ts_parallel.partition.program import LinearLayer

        assert backend.weights is not None
        weight = backend.weights.allocate((columns, inner), torch.bfloat16, None)
        weight.put(0, torch.randn(columns, inner).bfloat16())
        linear = backend.make_linears(LinearLayer("weight", None), {"weight": weight})
        return partial(linear, torch.randn(1, rows, inner).bfloat16())

    backend = choose_backend(torch.device("cpu"), torch.bfloat16, len(os.sched_getaffinity(0)))
    products: dict[str, Product] = {
        f"{name} by torch": partial(by_torch, getattr(torch, name)) for name in ("float32", "bfloat16")
    }
    if backend.weights is not None:
        products["bfloat16 by the kernels"] = by_kernels
    return products


def best_rate(product: Product, seconds: float) -> float:
    """FLOP/s of the best of some turns of each size that `seconds` leave time for; at least one turn of the first."""
    deadline, best = time.perf_counter() + seconds, 0.0
    for rows, columns, inner in _SIZES_OF_GEMM:
        work = 2 * rows * columns * inner
        if best and 2 * work / best > deadline - time.perf_counter():  # a turn to warm up, and one that counts
            break
        best = max(best, work / best_seconds(product(rows, columns, inner), deadline))
    return best


def best_seconds(work: Callable[[], object], deadline: float, most_turns: int = _TURNS) -> float:
    """Of some turns after one that does not count; at least one, and none that begins after `deadline`."""
    work()
    best = float("inf")
    for _ in range(most_turns):
        started = time.perf_counter()
        work()
        now = time.perf_counter()
        best = min(best, now - started)
        if now > deadline:
            break
    return best


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

    def rates(
        self, tokens_a_second: float, streams: int, prompt_tokens: int, output_tokens: int
    ) -> tuple[float, float]:
        """Bytes/s of weights at 16 bits, and FLOP/s, that somebody who makes so many output tokens/s must have done at
        least: as the limit counts, each prompt's part included."""
        bytes_a_token = self.weight_bytes / streams
        positions = prompt_tokens + output_tokens - 1  # that each stream's layers compute for its output tokens
        flop_a_token = 2 * (self.layer_parameters * positions / output_tokens + self.head_parameters)
        return tokens_a_second * bytes_a_token, tokens_a_second * flop_a_token

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
    print(json.dumps(asdict(measure())))
