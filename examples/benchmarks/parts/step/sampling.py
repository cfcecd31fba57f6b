"""What choosing the tokens of a step costs, beside the step, and beside the version before, turn by turn.

    python examples/benchmarks/parts/step/sampling.py                        this checkout alone
    python examples/benchmarks/parts/step/sampling.py --before ../before   … and another one, whose kernels are compiled
    python examples/benchmarks/parts/step/sampling.py --dtype float32        by torch's backend in place of the kernels

Each version is a process that sleeps while the other works. Before it samples it computes a decode step of as many
sequences as rows, so that caches and threads are as they are then: of a Llama with the sizes of
`benchmarks/benchmark.py`, 125M parameters at a vocabulary of 32,000. What is sampled are other logits, for a step with
random weights has flat ones.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

ROOT = Path(__file__).parents[4]
HISTORY = 1000  # distinct tokens that penalties are about
# Name, the fields of `SamplingParams`, and whether there is a history or a mask beside them.
CASES: dict[str, tuple[dict[str, float], str]] = {
    "greedy": ({}, ""),
    "temperature 1": ({"temperature": 1.0}, ""),
    "temperature 0.7, top_p 0.95": ({"temperature": 0.7, "top_p": 0.95}, ""),
    "temperature 1, top_k 50": ({"temperature": 1.0, "top_k": 50}, ""),
    "temperature 1, min_p 0.05": ({"temperature": 1.0, "min_p": 0.05}, ""),
    "greedy, repetition_penalty": ({"repetition_penalty": 1.1}, "history"),
    "top_p 0.95, three penalties": (
        {
            "temperature": 0.7,
            "top_p": 0.95,
            "repetition_penalty": 1.1,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.1,
        },
        "history",
    ),
    "top_p 0.95, a mask": ({"temperature": 0.7, "top_p": 0.95}, "mask"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="checkout of the version before")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[49_152, 128_000])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.dtype, arguments.threads)
        return
    print(f"{date.today()}, {platform.machine()}, {arguments.rows} rows, {arguments.dtype}, medians of", end=" ")
    print(f"{arguments.turns} turns, {arguments.threads} threads")
    roots = [ROOT, *([arguments.before.resolve()] if arguments.before else [])]
    for size in arguments.vocabulary:
        with ExitStack() as stack:
            sides = [stack.enter_context(opened(root, arguments)) for root in roots]
            print(f"\nvocabulary {size}\n\n| logits | parameters | ms | step, ms | of a step |", end="")
            print(" before, ms | ratio |" if arguments.before else "")
            print("|---|---|" + "---:|" * (3 + 2 * bool(arguments.before)))
            for shape in ("of a language model", "flat"):
                for case in CASES:
                    times = list(take_turns(sides, case, shape, size, arguments))
                    print(f"| {shape} | {case} | {in_columns(times)} |", flush=True)


Times = tuple[float, float]
"""Seconds of a step, and of sampling after it."""


def in_columns(turns: list[list[Times]]) -> str:
    """Medians of the turns' milliseconds and ratios, for this version and the one before if there is one."""
    own, *before = (list(column) for column in zip(*turns, strict=True))
    columns = [f"{1e3 * statistics.median(sampling for _, sampling in own):.2f}"]
    columns += [f"{1e3 * statistics.median(step for step, _ in own):.1f}"]
    columns += [f"{statistics.median(sampling / step for step, sampling in own):.1%}"]
    if before:
        ratios = [other / sampling for (_, sampling), (_, other) in zip(own, before[0], strict=True)]
        columns += [f"{1e3 * statistics.median(other for _, other in before[0]):.1f}"]
        columns += [f"{statistics.median(ratios):.1f}"]
    return " | ".join(columns)


@contextmanager
def opened(root: Path, arguments: argparse.Namespace) -> Iterator[subprocess.Popen[str]]:
    """A process that samples with the version of `root`."""
    command = [sys.executable, __file__, "--serve", "--dtype", arguments.dtype, "--threads", str(arguments.threads)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_WAIT_POLICY": "passive"}
    side = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield side
    finally:
        assert side.stdin is not None
        side.stdin.close()
        side.wait()


def ask(side: subprocess.Popen[str], *task: Any) -> Times:
    assert side.stdin is not None and side.stdout is not None
    side.stdin.write(json.dumps(task) + "\n")
    side.stdin.flush()
    step, sampling = json.loads(side.stdout.readline())
    return step, sampling


def take_turns(
    sides: list[subprocess.Popen[str]], case: str, shape: str, size: int, arguments: argparse.Namespace
) -> Iterator[list[Times]]:
    """What each side took in each turn, in another order each."""
    for turn in range(arguments.turns + 1):
        order = range(len(sides))[:: 1 if turn % 2 else -1]
        times = {at: ask(sides[at], case, shape, size, arguments.rows, turn) for at in order}
        if turn:  # the first one warms up
            yield [times[at] for at in range(len(sides))]


def serve(dtype: str, num_threads: int) -> None:
    """Answers tasks of standard input, a line each, until that ends."""
    torch.set_num_threads(num_threads)
    made: list[Any] = []
    step: Callable[[], object] | None = None
    sample: Callable[[int], object] = int
    for line in sys.stdin:
        *task, turn = json.loads(line)
        step = step or make_step(*task[2:], dtype, num_threads)
        if task != made:
            made, sample = task, make_case(*task, dtype)
        started = time.perf_counter()
        step()
        stepped = time.perf_counter()
        print(json.dumps((stepped - started, sample(turn))), flush=True)


def make_case(case: str, shape: str, size: int, num_rows: int, dtype: str) -> Callable[[int], float]:
    """Seconds of a step's sampling, by the step's number, with whichever version is imported."""
    from ts_parallel import step_plan
    from ts_parallel.runtime.backends.choose import choose_backend

    backend = choose_backend(torch.device("cpu"), getattr(torch, dtype))
    generator = torch.Generator().manual_seed(0)
    source = make_logits(shape, size, num_rows, generator).to(getattr(torch, dtype))
    logits = torch.empty_like(source)
    fields, beside = CASES[case]
    pack: Any = getattr(step_plan, "pack", tuple)  # the version before had tuples
    history = torch.randperm(size, generator=generator)[:HISTORY].tolist() if beside == "history" else []
    mask = torch.randint(0, 256, (-(-size // 64) * 8,), generator=generator, dtype=torch.uint8).numpy().tobytes()

    params = [step_plan.SamplingParams(seed=row, **fields) for row in range(num_rows)]  # type: ignore[arg-type]
    prompt, output = pack(history[: HISTORY // 2]), pack(history[HISTORY // 2 :])
    allowed = mask if beside == "mask" else b""

    @torch.inference_mode()
    def seconds(turn: int) -> float:
        chunks = [step_plan.Chunk("", (1,), 100 + turn, (), True, own, prompt, output, (), allowed) for own in params]
        logits.copy_(source)  # a step has just written them
        started = time.perf_counter()
        backend.choose(logits, chunks)
        return time.perf_counter() - started

    return seconds


def make_logits(shape: str, size: int, num_rows: int, generator: torch.Generator) -> torch.Tensor:
    """Zipf's law with noise, as trained models have it, or what random weights give."""
    noise = torch.randn(num_rows, size, generator=generator)
    if shape == "flat":
        return noise * 0.5
    ranks = torch.stack([torch.randperm(size, generator=generator) + 1.0 for _ in range(num_rows)])
    return 12 - 1.5 * ranks.log() + 0.5 * noise


def make_step(size: int, num_rows: int, dtype: str, num_threads: int) -> Callable[[], object]:
    sys.path.insert(0, str(Path(__file__).parents[2]))  # where benchmark.py lies
    from benchmark import MODEL, make_model
    from decode_step import BLOCK_SIZE, MOST_TOKENS, one_step

    from ts_parallel.config import parse_config
    from ts_parallel.runtime.runner import Runner
    from ts_parallel.serving.causal_lm import load_model
    from ts_parallel.topology import open_topology

    topology = open_topology(1, "cpu", num_threads=num_threads)
    with TemporaryDirectory(prefix="ts-parallel-benchmark-") as folder:
        make_model(Path(folder), {**MODEL, "vocab_size": size})
        config = parse_config({"model_path": folder, "device": "cpu", "dtype": dtype})
        part, backend = load_model(config, Path(folder), topology)
    runner = Runner(part, topology, backend, block_size=BLOCK_SIZE, kv_cache_bytes=2**29, max_model_len=MOST_TOKENS)
    return one_step(runner, num_rows)


if __name__ == "__main__":
    main()
