"""What choosing the tokens of a step costs, beside the step, and beside the version before, turn by turn.

    python examples/benchmarks/parts/sampling.py                        this checkout alone
    python examples/benchmarks/parts/sampling.py --before ../before     … and another one, whose kernels are compiled
    python examples/benchmarks/parts/sampling.py --dtype float32        by torch's backend in place of the kernels

Each version is a process that keeps its logits and sleeps while the other works. The step is a decode step of a Llama
with the sizes of `benchmarks/benchmark.py`, 125M parameters at a vocabulary of 32,000, and as many sequences as rows.
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

ROOT = Path(__file__).parents[3]
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
            step, *sides = [stack.enter_context(opened(root, arguments)) for root in (ROOT, *roots)]
            least = min(ask(step, "step", size, arguments.rows) for _ in range(30))
            print(f"\nvocabulary {size}, a step of {1e3 * least:.1f} ms at least\n")
            print("| logits | parameters | ms | least | of a step | of the least |", end="")
            print(" before, ms | ratio |" if arguments.before else "")
            print("|---|---|" + "---:|" * (4 + 2 * bool(arguments.before)))
            for shape in ("of a language model", "flat"):
                for case in CASES:
                    times = list(take_turns(step, sides, case, shape, size, arguments))
                    print(f"| {shape} | {case} | {in_columns(times, least)} |", flush=True)


def in_columns(times: list[list[float]], least_step: float) -> str:
    """Medians of each turn's milliseconds and ratios, for a step, this version, and the one before if there is one; and
    what was least, for others may use the machine."""
    _, own, *before = zip(*times, strict=True)
    shares = [turn[1] / turn[0] for turn in times]
    columns = [f"{1e3 * statistics.median(own):.2f}", f"{1e3 * min(own):.2f}"]
    columns += [f"{statistics.median(shares):.1%}", f"{min(own) / min(least_step, *(turn[0] for turn in times)):.1%}"]
    if before:
        ratio = statistics.median(turn[2] / turn[1] for turn in times)
        columns += [f"{1e3 * statistics.median(before[0]):.1f}", f"{ratio:.1f}"]
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


def ask(side: subprocess.Popen[str], *task: Any) -> float:
    assert side.stdin is not None and side.stdout is not None
    side.stdin.write(json.dumps(task) + "\n")
    side.stdin.flush()
    return float(side.stdout.readline())


def take_turns(
    step: subprocess.Popen[str],
    sides: list[subprocess.Popen[str]],
    case: str,
    shape: str,
    size: int,
    arguments: argparse.Namespace,
) -> Iterator[list[float]]:
    """Seconds of a step and of each side in each turn, the sides in another order each."""
    for turn in range(arguments.turns + 1):
        seconds = [ask(step, "step", size, arguments.rows), *[0.0] * len(sides)]
        for at in range(len(sides))[:: 1 if turn % 2 else -1]:
            seconds[at + 1] = ask(sides[at], "sample", case, shape, size, arguments.rows, turn)
        if turn:  # the first one warms up
            yield seconds


def serve(dtype: str, num_threads: int) -> None:
    """Answers tasks of standard input, a line each, until that ends. A line is a kind, what it is of, and the turn."""
    torch.set_num_threads(num_threads)
    of: list[Any] = []
    run: Callable[[int], object] = int
    for line in sys.stdin:
        kind, *task = json.loads(line)
        turn = task.pop() if kind == "sample" else 0
        if [kind, *task] != of:
            of = [kind, *task]
            run = (make_case if kind == "sample" else make_step)(*task, dtype, num_threads)
            run(0)
        started = time.perf_counter()
        run(turn)
        print(time.perf_counter() - started, flush=True)


def make_case(case: str, shape: str, size: int, num_rows: int, dtype: str, num_threads: int) -> Callable[[int], object]:
    """A step's sampling, by the step's number, with whichever version is imported."""
    from ts_parallel import step_plan
    from ts_parallel.runtime.backends.choose import choose_backend

    backend = choose_backend(torch.device("cpu"), getattr(torch, dtype), num_threads)
    if backend.name == "native":
        torch.set_num_threads(1)  # as `NativeBackend.settle` does
    generator = torch.Generator().manual_seed(0)
    logits = make_logits(shape, size, num_rows, generator).to(getattr(torch, dtype))
    fields, beside = CASES[case]
    pack: Any = getattr(step_plan, "pack", tuple)  # the version before had tuples
    history = torch.randperm(size, generator=generator)[:HISTORY].tolist() if beside == "history" else []
    mask = torch.randint(0, 256, (-(-size // 64) * 8,), generator=generator, dtype=torch.uint8).numpy().tobytes()

    params = [step_plan.SamplingParams(seed=row, **fields) for row in range(num_rows)]  # type: ignore[arg-type]
    prompt, output = pack(history[: HISTORY // 2]), pack(history[HISTORY // 2 :])
    allowed = mask if beside == "mask" else b""

    @torch.inference_mode()
    def sample(turn: int) -> list[int]:
        chunks = [step_plan.Chunk("", (1,), 100 + turn, (), True, own, prompt, output, (), allowed) for own in params]
        return backend.choose(logits, chunks)

    return sample


def make_logits(shape: str, size: int, num_rows: int, generator: torch.Generator) -> torch.Tensor:
    """Zipf's law with noise, as trained models have it, or what random weights give."""
    noise = torch.randn(num_rows, size, generator=generator)
    if shape == "flat":
        return noise * 0.5
    ranks = torch.stack([torch.randperm(size, generator=generator) + 1.0 for _ in range(num_rows)])
    return 12 - 1.5 * ranks.log() + 0.5 * noise


def make_step(size: int, num_rows: int, dtype: str, num_threads: int) -> Callable[[int], object]:
    sys.path.insert(0, str(Path(__file__).parents[1]))  # where benchmark.py lies
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
    step = one_step(runner, num_rows)
    return lambda turn: step()


if __name__ == "__main__":
    main()
