"""Whether the numbers are right: attention beside torch's, tokens beside transformers', draws beside the CPU's."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from gpu_machine import seconds_of, wait_for
from gpu_models import (
    BLOCK_SIZE,
    FAMILIES,
    config_of,
    device_of,
    make_engine,
    make_model,
    make_runner,
    part_of,
    prompts_of,
)
from gpu_report import Found, Report

from ts_parallel.engine.request import Request
from ts_parallel.partition.program import AttentionSite
from ts_parallel.runtime.backends.kv_memory import KVMemory
from ts_parallel.step_plan import Chunk, SamplingParams, StepPlan, pack


@dataclass(frozen=True)
class _Case:
    heads: tuple[int, int]
    dims: tuple[int, int]
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False

    @property
    def site(self) -> AttentionSite:
        scaling = self.dims[0] ** -0.5
        return AttentionSite("", *self.heads, *self.dims, self.window, scaling, self.softcap, self.has_sinks)


_CASES = {
    "llama": _Case((32, 8), (128, 128)),
    "no groups": _Case((8, 8), (64, 64)),
    "one key head": _Case((40, 1), (64, 64)),
    "odd group": _Case((12, 4), (80, 80)),
    "window": _Case((16, 8), (128, 128), window=100),
    "softcap": _Case((16, 8), (256, 256), softcap=30.0),
    "sinks": _Case((64, 8), (64, 64), has_sinks=True),
    "window, softcap and sinks": _Case((16, 2), (64, 64), window=64, softcap=20.0, has_sinks=True),
    "other value dim": _Case((16, 16), (192, 128)),
}
_TOY_CASES = {
    "toy": _Case((4, 2), (16, 16), window=5, softcap=5.0, has_sinks=True),
    "toy other value dim": _Case((4, 4), (24, 16)),
}
_ERRORS = {torch.bfloat16: 6e-2, torch.float32: 5e-5, torch.float16: 8e-3}  # of sums of numbers up to about 4
SHARES = 6


def check_attention(report: Report, size: str, share: int | None = None) -> None:
    """`share`: of the cases only each `SHARES`-th, from this one on; None: all of them, in processes of their own, for
    most of their time goes into the compilation of kernels; then how fast it is."""
    device = device_of(size)
    cases, dtypes = (_CASES, list(_ERRORS)) if size == "whole" else (_TOY_CASES, [torch.float32, torch.float16])
    every = list(product(dtypes, cases.items()))
    if size == "whole" and share is None:
        own = [[sys.executable, *sys.argv, "--share", str(number)] for number in range(SHARES)]
        processes = [subprocess.Popen(command) for command in own]
        for number, process in enumerate(processes):
            if code := process.wait():
                report.fail(f"share {number} of {SHARES}", f"its process ended with {code}")
        every = []
    for dtype, (name, case) in every[share or 0 :: SHARES if share is not None else 1]:
        report.check(f"{name}, {_name(dtype)}", lambda case=case, dtype=dtype: _attention(case, dtype, device, size))
    if share is not None:
        return
    for dtype in (torch.bfloat16,) if size == "whole" else (torch.float32,):
        case = next(iter(cases.values()))
        for count, length in ((1, 4000), (64, 2000), (256, 1000)) if size == "whole" else ((2, 20),):
            name = f"decode of {count} sequences of {length} tokens, {_name(dtype)}"
            report.check(name, lambda c=count, n=length, d=dtype, s=case: _decode_speed(s, d, device, c, n))
        for count, length in ((1, 8000), (16, 500)) if size == "whole" else ((1, 20),):
            name = f"prefill of {count} sequences of {length} tokens, {_name(dtype)}"
            report.check(name, lambda c=count, n=length, d=dtype, s=case: _prefill_speed(s, d, device, c, n))


def _attention(case: _Case, dtype: torch.dtype, device: torch.device, size: str) -> Found:
    """Prompts in parts, together and beside single tokens, then single tokens alone: the greatest difference from
    torch's own attention."""
    from ts_parallel.runtime.backends.cuda.attention import CudaAttention
    from ts_parallel.runtime.backends.torch.paged_attention import PagedAttention

    steps = [{"a": 700, "b": 1, "c": 130}, {"a": 300, "b": 1, "c": 1}, {"a": 1, "b": 90, "c": 1}]
    if size == "toy":
        steps = [{"a": 20, "b": 1}, {"a": 1, "b": 18}]
    steps += [dict.fromkeys(steps[0], 1)] * 2
    num_blocks = 160
    kinds: dict[str, Any] = {"torch": PagedAttention, "cuda": CudaAttention}
    made = {
        name: kind([case.site], _memory(case, num_blocks, dtype, device), BLOCK_SIZE) for name, kind in kinds.items()
    }
    generator = torch.Generator(device).manual_seed(0)
    worst = 0.0
    for plan in _plans(steps, num_blocks):
        total = plan.num_tokens
        heads = [
            torch.randn(1, total, count, dim, generator=generator, device=device, dtype=dtype).transpose(1, 2)
            for count, dim in zip((*case.heads, case.heads[1]), (case.dims[0], *case.dims), strict=True)
        ]
        angles = [torch.randn(1, 1, total, case.dims[0], generator=generator, device=device, dtype=dtype) for _ in "cs"]
        sinks = torch.randn(case.heads[0], generator=generator, device=device, dtype=dtype) if case.has_sinks else None
        answers = {}
        for name, attention in made.items():
            layout = attention.lay_out(plan)
            filling = layout.token_ids.shape[1] - total
            padded = [torch.nn.functional.pad(part, (0, 0, 0, filling), value=torch.nan) for part in (*heads, *angles)]
            answers[name] = attention(layout, *padded[:3], 0, sinks, *padded[3:])[0, :total].float()
        worst = max(worst, float((answers["cuda"] - answers["torch"]).abs().max()))
    return {"largest_error": worst, "allowed": _ERRORS[dtype], "is_right": worst <= _ERRORS[dtype]}


def _memory(case: _Case, num_blocks: int, dtype: torch.dtype, device: torch.device) -> KVMemory:
    memory = KVMemory([case.site], num_blocks, BLOCK_SIZE, dtype, device)
    for buffer in (*memory.keys, *memory.values):
        buffer.fill_(torch.nan)  # of earlier requests; one that is read spoils the answer
    return memory


def _plans(steps: list[dict[str, int]], num_blocks: int) -> list[StepPlan]:
    free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
    lengths: dict[str, int] = {}
    blocks: dict[str, list[int]] = {}
    plans = []
    for step in steps:
        chunks = []
        for name, count in step.items():
            start, own = lengths.get(name, 0), blocks.setdefault(name, [])
            lengths[name] = start + count
            while len(own) * BLOCK_SIZE < lengths[name]:
                own.append(free.pop())
            chunks.append(Chunk(name, (1,) * count, start, tuple(own), is_sampled=True))
        plans.append(StepPlan(tuple(chunks)))
    return plans


def _decode_speed(case: _Case, dtype: torch.dtype, device: torch.device, count: int, length: int) -> Found:
    seconds, chunks = _seconds(case, dtype, device, count, 1, length)
    num_bytes = count * length * case.site.kv_elements_per_token * dtype.itemsize
    return {"microseconds": 1e6 * seconds, "gb_per_s": num_bytes / seconds / 1e9, "chunks": chunks}


def _prefill_speed(case: _Case, dtype: torch.dtype, device: torch.device, count: int, length: int) -> Found:
    seconds, chunks = _seconds(case, dtype, device, count, length, 0)
    flops = count * length**2 * case.heads[0] * (case.dims[0] + case.dims[1])  # half of all pairs, two operations each
    return {"microseconds": 1e6 * seconds, "tflops": flops / seconds / 1e12, "chunks": chunks}


def _seconds(
    case: _Case, dtype: torch.dtype, device: torch.device, count: int, num_new: int, start: int
) -> tuple[float, int]:
    from ts_parallel.runtime.backends.cuda.attention import CudaAttention

    own = -(-(start + num_new) // BLOCK_SIZE)
    memory = KVMemory([case.site], count * own, BLOCK_SIZE, dtype, device)
    attention = CudaAttention([case.site], memory, BLOCK_SIZE)
    chunks = [
        Chunk(str(number), (1,) * num_new, start, tuple(range(number * own, (number + 1) * own)), is_sampled=True)
        for number in range(count)
    ]
    layout = attention.lay_out(StepPlan(tuple(chunks)))
    total = layout.token_ids.shape[1]
    query, key, value = (
        torch.randn(1, heads, total, dim, device=device, dtype=dtype)
        for heads, dim in zip((*case.heads, case.heads[1]), (case.dims[0], *case.dims), strict=True)
    )
    return seconds_of(
        lambda: attention(layout, query, key, value, 0), 20 if device.type == "cuda" else 1, device
    ), count


def check_families(report: Report, size: str, seconds: float) -> None:
    device, end = device_of(size), time.monotonic() + 0.85 * seconds * (10 if size == "toy" else 1)
    families = list(FAMILIES)[:2] if size == "toy" else list(FAMILIES)
    for family in families:
        for dtype in (torch.float32, torch.bfloat16):
            for is_recorded in (False, True):
                name = f"{family}, {_name(dtype)}, graphs {'on' if is_recorded else 'off'}"
                if size == "toy" and (is_recorded or dtype != torch.float32):
                    continue
                if time.monotonic() > end:
                    report.skip(name, "the section's time was over")
                    continue
                report.check(name, lambda f=family, d=dtype, r=is_recorded: _family(f, d, r, device, size))


@lru_cache(maxsize=1)
def _built(family: str, dtype: torch.dtype, device: torch.device, size: str) -> tuple[Any, Any]:
    """The model and its program, which are the same with graphs and without."""
    model = make_model(config_of(FAMILIES[family], size, is_family=True), dtype, device)
    return model, part_of(model, dtype, device)


@torch.inference_mode()
def _family(family: str, dtype: torch.dtype, is_recorded: bool, device: torch.device, size: str) -> Found:
    """Greedy tokens of prompts that begin at different steps, each beside transformers' logits for the same text."""
    from ts_parallel.runtime.backends.cuda.backend import CudaBackend

    with torch.inference_mode(mode=False):
        model, part = _built(family, dtype, device, size)
    backend = CudaBackend((1, 2, 4)) if is_recorded else CudaBackend(())
    runner = make_runner(part, device, backend, 2**26, 512)
    lengths, max_tokens = ((3, 90, 200, 31), 24) if size == "whole" else ((3, 18), 3)
    requests = [
        Request(str(number), prompt, max_tokens)
        for number, prompt in enumerate(prompts_of(lengths, model.config.vocab_size))
    ]
    outputs = make_engine(runner, 4, 128).generate(requests)
    is_graph = getattr(runner._stage, "sizes", frozenset())
    found: dict[str, Any] = {"tokens": 0, "others": 0, "furthest": 0.0, "recorded": len(is_graph)}
    exact = model if dtype == torch.float32 else None
    for request, output in zip(requests, outputs, strict=True):
        text = torch.tensor([[*request.prompt_ids, *output]], device=device)
        logits = model(text, use_cache=False).logits[0, len(request.prompt_ids) - 1 : -1].float()
        own = torch.tensor(output, device=device)
        # How much less likely than transformers' best token ours is to it: 0 where they are the same.
        behind = logits.max(dim=-1).values - logits.gather(1, own.unsqueeze(1)).squeeze(1)
        found["tokens"] += len(output)
        found["others"] += int((logits.argmax(dim=-1) != own).sum())
        found["furthest"] = max(found["furthest"], float(behind.max() / logits.std()))
    allowed = 1e-4 if exact is not None else 0.15
    wait_for(device)
    is_recorded_as_asked = bool(is_graph) == (is_recorded and device.type == "cuda")
    return {**found, "allowed": allowed, "is_right": found["furthest"] <= allowed and is_recorded_as_asked}


def check_sampling(report: Report, size: str) -> None:
    device = device_of(size)
    num_rows, num_tokens = (64, 128256) if size == "whole" else (8, 500)
    kinds = {
        "greedy": SamplingParams(),
        "temperature": SamplingParams(0.8),
        "top_p": SamplingParams(0.8, top_p=0.9),
        "top_k and min_p": SamplingParams(1.5, top_k=40, min_p=0.02),
        "typical_p": SamplingParams(1.0, typical_p=0.6),
        "penalties": SamplingParams(0.9, top_p=0.95, repetition_penalty=1.2, frequency_penalty=0.1),
    }
    for name, params in kinds.items():
        report.check(name, lambda params=params: _sampling(params, device, num_rows, num_tokens))


def _sampling(params: SamplingParams, device: torch.device, num_rows: int, num_tokens: int) -> Found:
    from ts_parallel.runtime.backends.cuda.sampling import sample
    from ts_parallel.runtime.backends.torch import sampling as plain

    logits = 3 * torch.randn(num_rows, num_tokens, generator=torch.Generator().manual_seed(0))
    history = pack(range(0, num_tokens, 37)) if params.needs_history else b""
    chunks = [Chunk("", (1,), row, (), True, replace(params, seed=row), history, history) for row in range(num_rows)]
    there = logits.to(device)
    found, expected = sample(there, chunks), plain.sample(logits, chunks)
    others = sum(one != other for one, other in zip(found, expected, strict=True))
    seconds = seconds_of(lambda: sample(there, chunks), 5, device)
    # Sums over a whole vocabulary in another order: a draw at the border of two tokens may fall to the other.
    return {"rows": num_rows, "others": others, "milliseconds": 1e3 * seconds, "is_right": others <= num_rows // 32}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
