"""The engine's figures as Prometheus text, and as the lines by which TorchServe's workers report metrics.

The names are vLLM's. TorchServe takes letters, digits and underscores only, so there they lack the prefix `vllm:`. Its
own histograms take a line for each single value; ours are counters of their buckets, which a Prometheus server takes
for the same, so what is written does not grow with the load.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

from ts_parallel.engine.stats import REASONS, EngineStats, Figures, Histogram

logger = logging.getLogger(__name__)

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
SECONDS_BETWEEN_REPORTS = 1.0
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


Meter = Callable[[float, list[str]], None]


def families(figures: Figures) -> Iterator[Family]:
    """All figures, always the same names in the same order."""
    stats, now = figures.stats, figures.occupancy
    yield _gauge("num_requests_running", "Requests that run in the engine's steps.", now.num_running)
    yield _gauge("num_requests_waiting", "Requests that wait to run, anew or after a preemption.", now.num_waiting)
    yield _gauge("kv_cache_usage_perc", "Part of the KV blocks that requests hold, from 0 to 1.", now.kv_cache_usage)
    for name, help, value in _totals(stats):
        yield Family(name, "counter", help, (Sample("", (), value),))
    reasons = tuple(Sample("", (("finished_reason", name),), stats.num_ended[name]) for name in REASONS)
    yield Family("request_success_total", "counter", "Requests that ended, by reason.", reasons)
    for name, help, histogram in _histograms(stats):
        yield Family(name, "histogram", help, tuple(_samples_of(histogram)))


def _totals(stats: EngineStats) -> Iterator[tuple[str, str, int]]:
    yield "prompt_tokens_total", "Tokens of the prompts that were admitted.", stats.num_prompt_tokens
    yield "generation_tokens_total", "Tokens that were generated.", stats.num_generation_tokens
    yield "num_preemptions_total", "How often a request gave its KV blocks up to an older one.", stats.num_preemptions
    yield "prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.", stats.num_prefix_queries
    yield "prefix_cache_hits_total", "Prompt tokens found in the prefix cache.", stats.num_prefix_hits


def _histograms(stats: EngineStats) -> Iterator[tuple[str, str, Histogram]]:
    yield "time_to_first_token_seconds", "From arrival to the first token.", stats.time_to_first_token
    yield "inter_token_latency_seconds", "From one token of a request to its next.", stats.inter_token_latency
    yield "request_queue_time_seconds", "From arrival to admission.", stats.queue_time
    yield "e2e_request_latency_seconds", "From arrival to the last token.", stats.e2e_latency


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
            lines.append(f"{name}{sample.suffix}{{{pairs}}} {_number(sample.value)}")
    return "\n".join(lines) + "\n"


class MetricsReporter:
    """Tells TorchServe what has changed since the last report. Owns what was reported."""

    def __init__(
        self, read: Callable[[], Figures], make_meter: Callable[[str, str, list[str]], Meter], labels: Labels
    ) -> None:
        """
        Args:
            read: the figures now.
            make_meter: a name, a kind ("counter" or "gauge") and the labels' names → what takes a counter's increase
                or a gauge's value, with the labels' values.
        """
        self._read = read
        self._make_meter = make_meter
        self._labels = labels
        self._meters: dict[str, Meter] = {}
        self._reported: dict[tuple[str, Labels], float] = {}

    def report(self) -> int:
        """Report what is new; how many lines that were. The first time that is all, for a rate counts from there."""
        num_lines = 0
        for family in families(self._read()):
            kind = "gauge" if family.kind == "gauge" else "counter"
            for sample in family.samples:
                name = family.name + sample.suffix
                before = self._reported.get((name, sample.labels))
                if before == sample.value:
                    continue
                self._reported[name, sample.labels] = sample.value
                self._send(name, kind, sample.labels, sample.value - (before or 0 if kind == "counter" else 0))
                num_lines += 1
        return num_lines

    def report_for_ever(self) -> None:
        """Report once a second in a thread, for as long as this process lives."""
        threading.Thread(target=self._run, name="metrics", daemon=True).start()

    def _run(self) -> None:
        pause = threading.Event()
        while True:
            try:
                self.report()
            except Exception:  # one that fails must not be the last
                logger.exception("a report of the metrics failed")
            pause.wait(SECONDS_BETWEEN_REPORTS)

    def _send(self, name: str, kind: str, labels: Labels, value: float) -> None:
        labels = (*self._labels, *labels)
        if name not in self._meters:
            self._meters[name] = self._make_meter(name, kind, [key for key, _ in labels])
        self._meters[name](_number(value), [text for _, text in labels])


def torchserve_meters(cache: Any) -> Callable[[str, str, list[str]], Meter]:
    """How to report by `context.metrics` of a TorchServe worker."""
    # Not above: importing anything of TorchServe's leaves a file open, which only its own workers can bear.
    from ts.metrics.metric_type_enum import MetricTypes

    def make_meter(name: str, kind: str, label_names: list[str]) -> Meter:
        unit = "seconds" if "_seconds" in name and not name.endswith(("_bucket", "_count")) else "count"
        meter: Meter = cache.add_metric_to_cache(name, unit, label_names, MetricTypes(kind)).add_or_update
        return meter

    return make_meter


def labels_of(model: str) -> Labels:
    """What tells a model's worker from all others."""
    return ("model_name", model), ("engine", worker_number(sys.argv))


def worker_number(command: Sequence[str]) -> str:
    """What tells this worker from the others of its model, and stays when TorchServe starts it anew: its socket's."""
    sockets = (value for flag, value in pairwise(command) if flag in ("--sock-name", "--port"))
    found = re.search(r"\d+$", next(sockets, ""))
    return found[0] if found else "0"


def _number(value: float) -> float:
    """To the microsecond, and whole where it is: TorchServe reads no plus in an exponent."""
    return int(value) if value == int(value) else round(value, 6)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
