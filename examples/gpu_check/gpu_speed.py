"""How fast one model is: decode at several numbers of sequences, prompts, and transformers beside it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from gpu_machine import copy_bandwidth, wait_for
from gpu_models import (
    BLOCK_SIZE,
    SHAPES,
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
from ts_parallel.runtime.runner import Runner
from ts_parallel.step_plan import Chunk, StepPlan

_PROMPT, _ANSWER, _CONTEXT = 128, 64, 512


class _Model:
    """One model under measurement. Owns its weights and the runners over them."""

    def __init__(self, name: str, size: str) -> None:
        self.device, self.size = device_of(size), size
        self.dtype = torch.bfloat16 if size == "whole" else torch.float32
        self.config = config_of(SHAPES[name], size)
        self.plain = make_model(self.config, self.dtype, self.device)
        self.part = part_of(self.plain, self.dtype, self.device)
        self.bandwidth = copy_bandwidth(self.device, size)

    def runner(self, recorded: Sequence[int]) -> Runner:
        from ts_parallel.runtime.backends.cuda.backend import CudaBackend

        kv_bytes, length = (20 * 2**30, 8192) if self.size == "whole" else (2**18, 64)
        runner = make_runner(self.part, self.device, CudaBackend(recorded), kv_bytes, length)
        assert not recorded or self.device.type == "cpu" or getattr(runner._stage, "sizes", None), "nothing recorded"
        return runner

    def read_bytes(self, num_seqs: int, context: int) -> int:
        """Of weights and KV memory in a step: of an embedding that is no head a row, and of a mixture at most all."""
        program = self.part.program
        embedding = self.plain.get_input_embeddings().weight
        is_tied = self.plain.get_output_embeddings().weight is embedding
        weights = program.plan.local_bytes(0) - (0 if is_tied else embedding.nbytes)
        return weights + num_seqs * context * program.kv_elements_of_ranks[0] * self.dtype.itemsize


def check(report: Report, name: str, size: str, seconds: float) -> None:
    end = time.monotonic() + 0.9 * seconds * (10 if size == "toy" else 1)
    made: dict[str, Any] = {}

    def build() -> Found:
        started = time.perf_counter()
        made["model"] = _Model(name, size)
        found = {"seconds": time.perf_counter() - started, "of_them_program": made["model"].part.seconds}
        return {**found, "gib": made["model"].part.num_bytes / 2**30}

    if report.check("the model and its program", build) is None:
        return
    model: _Model = made["model"]
    counts = (1, 8, 64, 256) if size == "whole" else (1, 2)
    runners: dict[str, Runner] = {}

    def record(kind: str, sizes: Sequence[int]) -> Found:
        runners[kind] = model.runner(sizes)
        return {"sizes": sorted(getattr(runners[kind]._stage, "sizes", ())), "blocks": runners[kind].num_blocks}

    def when_there_is_time(check_name: str, run: Any) -> None:
        if time.monotonic() > end:
            report.skip(check_name, "the section's time was over")
        else:
            report.check(check_name, run)

    report.check("runner that records graphs", lambda: record("graphs", counts if size == "whole" else ()))
    kind = "graphs"
    if kind not in runners or (size == "whole" and not getattr(runners[kind]._stage, "sizes", None)):
        kind = "launches"
        report.check("runner that launches each operation", lambda: record("launches", ()))
    if kind not in runners:
        return
    runner = runners[kind]
    for count in counts:
        when_there_is_time(f"decode of {count} at {_CONTEXT}, {kind}", lambda n=count: _decode(model, runner, n))
    for count, length in ((1, 1024), (1, 4096), (16, 512)) if size == "whole" else ((1, 16),):
        name_of = f"prompts: {count} of {length}"
        when_there_is_time(name_of, lambda n=count, own=length: _prefill(model, runner, n, own))
    for count in counts:
        when_there_is_time(f"{count} answers by ts_parallel", lambda n=count: _answers(model, runner, n))
        if count in counts[:3]:
            when_there_is_time(f"{count} answers by transformers, generate", lambda n=count: _generate(model, n))
    when_there_is_time(
        f"{counts[-2]} answers by transformers, generate_batch", lambda: _generate_batch(model, counts[-2])
    )
    if size == "whole":
        del runner
        runners.clear()
        torch.cuda.empty_cache()
        report.check("runner without graphs", lambda: record("launches", ()))
        if "launches" in runners:
            for count in (1, 64):
                run = lambda n=count: _decode(model, runners["launches"], n)  # noqa: E731
                when_there_is_time(f"decode of {count} at {_CONTEXT}, launches", run)
            when_there_is_time("launches and waits of a step", lambda: _launches(model, runners["launches"]))


def _plans(model: _Model, runner: Runner, num_seqs: int, num_new: int, start: int, times: int) -> list[StepPlan]:
    """Steps in which sequences that are `start` tokens long get `num_new` more; nobody has computed what they have."""
    own = -(-(start + times * num_new) // BLOCK_SIZE)
    num_seqs_there = max(1, runner.num_blocks // own)
    plans = []
    for step in range(times):
        begin = start + step * (num_new if num_new == 1 else 0)
        chunks = []
        for number in range(num_seqs):
            first = number % num_seqs_there * own
            blocks = tuple(range(first, first + -(-(begin + num_new) // BLOCK_SIZE)))
            tokens = tuple((7 * number + at) % model.config.vocab_size for at in range(num_new))
            chunks.append(Chunk(str(number), tokens, begin, blocks, is_sampled=True))
        plans.append(StepPlan(tuple(chunks)))
    return plans


def _run(runner: Runner, plans: Sequence[StepPlan]) -> None:
    for plan in plans:
        runner.submit(plan)
        runner.collect()


def _decode(model: _Model, runner: Runner, num_seqs: int) -> Found:
    context, times = (_CONTEXT, 60) if model.size == "whole" else (10, 2)
    plans = _plans(model, runner, num_seqs, 1, context, times + 5)
    _run(runner, plans[:5] if model.size == "whole" else plans[:1])
    wait_for(model.device)
    started = time.perf_counter()
    _run(runner, plans[5:])
    seconds = (time.perf_counter() - started) / times
    rate = model.read_bytes(num_seqs, context) / seconds / 1e9
    return {
        "ms_a_step": 1e3 * seconds,
        "tokens_per_s": num_seqs / seconds,
        "gb_per_s": rate,
        "share_of_copy": rate / model.bandwidth,
    }


def _prefill(model: _Model, runner: Runner, num_seqs: int, length: int) -> Found:
    plans = _plans(model, runner, num_seqs, length, 0, 1) * (4 if model.size == "whole" else 2)
    _run(runner, plans[:1])
    wait_for(model.device)
    started = time.perf_counter()
    _run(runner, plans[1:])
    seconds = (time.perf_counter() - started) / (len(plans) - 1)
    weights = model.read_bytes(0, 0) / model.dtype.itemsize
    flops = 2 * weights * num_seqs * length  # of products alone; of a mixture as if every expert had every token
    return {"ms": 1e3 * seconds, "tokens_per_s": num_seqs * length / seconds, "tflops": flops / seconds / 1e12}


def _answers(model: _Model, runner: Runner, num_seqs: int) -> Found:
    prompts, answer = _prompts(model, num_seqs)
    requests = [Request(str(number), prompt, answer) for number, prompt in enumerate(prompts)]
    engine = make_engine(runner, num_seqs)
    started = time.perf_counter()
    outputs = engine.generate(requests)
    return _rates(outputs, started)


def _prompts(model: _Model, num_seqs: int) -> tuple[list[tuple[int, ...]], int]:
    length, answer = (_PROMPT, _ANSWER) if model.size == "whole" else (6, 3)
    return prompts_of([length] * num_seqs, model.config.vocab_size), answer


def _rates(outputs: Sequence[Sequence[int]], started: float) -> Found:
    seconds, total = time.perf_counter() - started, sum(map(len, outputs))
    return {"seconds": seconds, "tokens": total, "output_tokens_per_s": total / seconds}


@torch.inference_mode()
def _generate(model: _Model, num_seqs: int) -> Found:
    prompts, answer = _prompts(model, num_seqs)
    inputs = torch.tensor(prompts, device=model.device)
    settings: dict[str, Any] = {"max_new_tokens": answer, "min_new_tokens": answer, "do_sample": False}
    settings |= {"attention_mask": torch.ones_like(inputs), "pad_token_id": 0}
    model.plain.generate(inputs, **{**settings, "max_new_tokens": 2, "min_new_tokens": 2})
    wait_for(model.device)
    started = time.perf_counter()
    found = model.plain.generate(inputs, **settings)
    wait_for(model.device)
    return _rates(found[:, inputs.shape[1] :].tolist(), started)


def _generate_batch(model: _Model, num_seqs: int) -> Found:
    from transformers import GenerationConfig

    prompts, answer = _prompts(model, num_seqs)
    settings = GenerationConfig(max_new_tokens=answer, do_sample=False, eos_token_id=-1, pad_token_id=0)
    started = time.perf_counter()
    found = model.plain.generate_batch(inputs=[list(own) for own in prompts], generation_config=settings)
    return _rates([own.generated_tokens for own in found.values()], started)


def _launches(model: _Model, runner: Runner) -> Found:
    """Of one decode step of eight sequences without graphs, by torch's profiler and its watch over waits."""
    plans = _plans(model, runner, 8, 1, 100, 4)
    _run(runner, plans[:2])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        _run(runner, plans[2:3])
        wait_for(model.device)
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    names = {event.name[:60] for event in kernels}
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            _run(runner, plans[3:])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    layers = model.config.num_hidden_layers
    num_waits = sum("synchroniz" in str(wait.message) for wait in waits)
    found = {"kernels": len(kernels), "kernels_a_layer": len(kernels) / layers, "waits": num_waits}
    return {**found, "names": sorted(names), "is_right": num_waits <= 1}
