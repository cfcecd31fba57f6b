"""One decode step of the traced stage beside transformers' own forward pass, in one process, turn by turn.

The model is that of `benchmarks/benchmark.py`: 125M parameters, random weights, in bfloat16 or `--dtype`. Each sequence
has 128 tokens in its cache and adds one. Prints medians in milliseconds, their ratio, and how far the logits differ.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from ts_parallel.config import parse_config
from ts_parallel.runtime.backends.choose import describe_choice
from ts_parallel.runtime.runner import Runner
from ts_parallel.serving.causal_lm import load_model
from ts_parallel.step_plan import Chunk, StepPlan
from ts_parallel.topology import Topology, open_topology

sys.path.insert(0, str(Path(__file__).parents[1]))  # where benchmark.py lies
from benchmark import PROMPT_TOKENS, make_model, make_prompts

MOST_TOKENS = 2048
BLOCK_SIZE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    arguments = parser.parse_args()
    topology = open_topology(1, "cpu", num_threads=arguments.threads)
    with TemporaryDirectory(prefix="ts-parallel-benchmark-") as folder:
        make_model(Path(folder))
        runner = make_runner(Path(folder), topology, arguments.dtype)
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, arguments.dtype)).eval()
    choice = describe_choice(torch.device("cpu"), getattr(torch, arguments.dtype))
    print(f"{date.today()}, {platform.machine()}, {arguments.threads} thread(s), {arguments.steps} steps, medians")
    print(f"{arguments.dtype} by the {choice.backend} backend, {choice.instruction_set}\n")
    print("| sequences | traced stage, ms | transformers, ms | ratio | largest difference of logits | their scale |")
    print("|---|---|---|---|---|---|")
    for count in arguments.sequences:
        ours, theirs = one_step(runner, count), one_plain_step(plain, count)
        logits, plain_logits = ours(), theirs()
        difference, scale = float((logits - plain_logits).abs().max()), float(plain_logits.abs().max())
        times = [(seconds(ours), seconds(theirs)) for _ in range(arguments.steps)]
        own, other = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
        print(f"| {count} | {own:.1f} | {other:.1f} | {own / other:.2f} | {difference:.3f} | {scale:.2f} |")
    topology.close()


def make_runner(folder: Path, topology: Topology, dtype: str = "auto") -> Runner:
    config = parse_config({"model_path": str(folder), "device": "cpu", "dtype": dtype})
    part, backend = load_model(config, folder, topology)
    return Runner(part, topology, backend, block_size=BLOCK_SIZE, kv_cache_bytes=2**28, max_model_len=MOST_TOKENS)


def one_step(runner: Runner, count: int) -> Callable[[], torch.Tensor]:
    """A decode step of `count` sequences that can be repeated; its logits `[count, vocabulary]`."""
    num_blocks = -(-(PROMPT_TOKENS + 1) // BLOCK_SIZE)
    blocks = [tuple(range(index * num_blocks, (index + 1) * num_blocks)) for index in range(count)]
    prompts = make_prompts(count)
    for prompt, own in zip(prompts, blocks, strict=True):
        runner.logits(StepPlan((Chunk("", tuple(prompt), 0, own, is_sampled=True),)))
    chunks = [
        Chunk("", (prompt[0],), PROMPT_TOKENS, own, is_sampled=True)
        for prompt, own in zip(prompts, blocks, strict=True)
    ]
    return lambda: runner.logits(StepPlan(tuple(chunks)))


@torch.inference_mode()
def one_plain_step(model: torch.nn.Module, count: int) -> Callable[[], torch.Tensor]:
    cache = DynamicCache()
    prompts = torch.tensor(make_prompts(count))
    model(prompts, past_key_values=cache, use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def step() -> torch.Tensor:
        logits: torch.Tensor = model(prompts[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        cache.crop(-1)
        return logits[:, 0].float()

    return step


def seconds(step: Callable[[], torch.Tensor]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
