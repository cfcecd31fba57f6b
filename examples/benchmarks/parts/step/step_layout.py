"""What a decode step costs before its first kernel: its plan on the way to another rank, and its layout.

    python examples/benchmarks/parts/step/step_layout.py      32 sequences of 1,000 tokens, and 128 of 4,000

No model, no attention: only their plan, as the scheduler makes it, step after step with one more token of each. Prints
medians in milliseconds and the bytes that are sent of a step.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from array import array
from collections.abc import Callable
from datetime import date
from typing import Any

import torch

from ts_parallel.partition.program import AttentionSite
from ts_parallel.runtime.backends.choose import choose_backend
from ts_parallel.runtime.plan_codec import PlanDecoder, PlanEncoder
from ts_parallel.step_plan import Chunk, StepPlan

BLOCK_SIZE = 16
SITE = AttentionSite("attention", 12, 4, 64, 64, None, 0.125, None, False)
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", default=["32x1000", "128x4000"], help="sequences x tokens of each")
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    attentions = [
        choose_backend(CPU, dtype).make_attention([SITE], 1, BLOCK_SIZE, dtype, CPU)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    print(f"{date.today()}, {platform.machine()}, one thread, {arguments.steps} steps, medians\n")
    print("| sequences x tokens | layout in float32, ms | in bfloat16, ms | encoding, ms | decoding, ms | bytes sent |")
    print("|---|---|---|---|---|---|")
    for batch in arguments.batches:
        num_sequences, num_tokens = map(int, batch.split("x"))
        encoder, decoder = PlanEncoder(), PlanDecoder()
        rows = []
        for step in range(arguments.steps + 1):
            plan = make_plan(num_sequences, num_tokens + step)
            row = [timed(attention.lay_out, plan)[0] for attention in attentions]
            encoding, numbers = timed(encoder.encode, plan)
            rows.append((*row, encoding, timed(decoder.decode, numbers)[0], numbers.nbytes))
        own = [statistics.median(column) for column in zip(*rows[1:], strict=True)]  # the first sends all there is
        print(f"| {batch} | {' | '.join(f'{number:.3f}' for number in own[:-1])} | {own[-1]:.0f} |")


def make_plan(num_sequences: int, num_tokens: int) -> StepPlan:
    """One more token of each sequence that has `num_tokens`; each block has the sequence's number and its own."""
    num_blocks = num_tokens // BLOCK_SIZE + 1
    return StepPlan(
        tuple(
            Chunk(
                str(own),
                (7,),
                num_tokens,
                array("q", range(own, own + num_blocks * num_sequences, num_sequences)),
                True,
            )
            for own in range(num_sequences)
        )
    )


def timed(call: Callable[[Any], Any], argument: Any) -> tuple[float, Any]:
    """Milliseconds, and what came of it."""
    started = time.perf_counter()
    result = call(argument)
    return 1e3 * (time.perf_counter() - started), result


if __name__ == "__main__":
    main()
