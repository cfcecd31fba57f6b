"""The engine's figures by their names, and as Prometheus text. The names are vLLM's, there with the prefix `vllm:`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

from ts_parallel.engine.stats import REASONS, EngineStats, Figures, Histogram, KVBlocks

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "vllm:"

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Sample:
    """One number of a family. `suffix` is what its name has beside the family's."""

    suffix: str
    labels: Labels
    value: float


@dataclass(frozen=True)
class Family:
    """What is known by one name."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    samples: tuple[Sample, ...]


def families(figures: Figures) -> Iterator[Family]:
    """All figures, always the same names in the same order."""
    stats, now = figures.stats, figures.occupancy
    yield _gauge("num_requests_running", "Requests that run in the engine's steps.", now.num_running)
    yield _gauge("num_requests_waiting", "Requests that wait to run, anew or after a preemption.", now.num_waiting)
    yield _gauge("kv_cache_usage_perc", "Part of the KV blocks that requests hold, from 0 to 1.", now.kv_cache_usage)
    yield Family("cache_config_info", "gauge", "What the KV memory is divided into: 1.", (_layout(figures.kv_blocks),))
    for name, help, value in _totals(stats):
        yield Family(name, "counter", help, (Sample("", (), value),))
    reasons = tuple(Sample("", (("finished_reason", name),), stats.num_ended[name]) for name in REASONS)
    yield Family("request_success_total", "counter", "Requests that ended, by reason.", reasons)
    for name, help, histogram in _histograms(stats):
        yield Family(name, "histogram", help, tuple(_samples_of(histogram)))


def _totals(stats: EngineStats) -> Iterator[tuple[str, str, int]]:
    yield "prompt_tokens_total", "Tokens of the prompts that were admitted.", stats.num_prompt_tokens
    yield "generation_tokens_total", "Tokens that were generated.", stats.num_generation_tokens
    yield (
        "num_preemptions_total",
        "How often a request gave its KV blocks up to a more urgent or older one.",
        stats.num_preemptions,
    )
    yield "prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.", stats.num_prefix_queries
    yield "prefix_cache_hits_total", "Prompt tokens found in the prefix cache.", stats.num_prefix_hits


def _histograms(stats: EngineStats) -> Iterator[tuple[str, str, Histogram]]:
    yield "time_to_first_token_seconds", "From arrival to the first token.", stats.time_to_first_token
    yield "inter_token_latency_seconds", "From one token of a request to its next.", stats.inter_token_latency
    yield "request_queue_time_seconds", "From arrival to admission.", stats.queue_time
    yield "e2e_request_latency_seconds", "From arrival to the last token.", stats.e2e_latency


def _layout(blocks: KVBlocks) -> Sample:
    """The numbers are in the labels, as those have them who plan where a request goes."""
    found = {
        "block_size": blocks.size,
        "num_gpu_blocks": blocks.number,
        "enable_prefix_caching": blocks.caches_prefixes,
    }
    return Sample("", tuple((name, str(value)) for name, value in found.items()), 1)


def _gauge(name: str, help: str, value: float) -> Family:
    return Family(name, "gauge", help, (Sample("", (), value),))


def _samples_of(histogram: Histogram) -> Iterator[Sample]:
    counts = list(accumulate(histogram.counts))  # a bucket counts what is below it too
    for bound, count in zip([*map(str, histogram.bounds), "+Inf"], counts, strict=True):
        yield Sample("_bucket", (("le", bound),), count)
    yield Sample("_sum", (), histogram.total)
    yield Sample("_count", (), counts[-1])


def prometheus_text(figures: Figures, labels: Labels) -> str:
    """All figures in Prometheus' text format 0.0.4, each with `labels`."""
    lines = []
    for family in families(figures):
        name = _PREFIX + family.name
        lines += [f"# HELP {name} {family.help}", f"# TYPE {name} {family.kind}"]
        for sample in family.samples:
            pairs = ",".join(f'{key}="{_escaped(value)}"' for key, value in (*labels, *sample.labels))
            lines.append(f"{name}{sample.suffix}{{{pairs}}} {rounded(sample.value)}")
    return "\n".join(lines) + "\n"


def labels_of(model: str) -> Labels:
    """What tells a model's worker from all others."""
    return ("model_name", model), ("engine", worker_number(sys.argv))


def worker_number(command: Sequence[str]) -> str:
    """What tells this worker from the others of its model, and stays when TorchServe starts it anew: its socket's."""
    sockets = (value for flag, value in pairwise(command) if flag in ("--sock-name", "--port"))
    found = re.search(r"\d+$", next(sockets, ""))
    return found[0] if found else "0"


def rounded(value: float) -> float:
    """To the microsecond, and whole where it is: TorchServe reads no plus in an exponent."""
    return int(value) if value == int(value) else round(value, 6)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
