"""The engine's figures as the lines by which TorchServe's workers report metrics.

TorchServe takes letters, digits and underscores only, so the names lack the prefix `vllm:`. Its own histograms take a
line for each single value; ours are counters of their buckets, which a Prometheus server takes for the same, so what is
written does not grow with the load.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from ts_parallel.engine.stats import Figures
from ts_parallel.serving.metrics import Labels, families, rounded

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_REPORTS = 1.0

Meter = Callable[[float, list[str]], None]


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
        self._meters[name](rounded(value), [text for _, text in labels])


def torchserve_meters(cache: Any) -> Callable[[str, str, list[str]], Meter]:
    """How to report by `context.metrics` of a TorchServe worker."""
    # Not above: importing anything of TorchServe's leaves a file open, which only its own workers can bear.
    from ts.metrics.metric_type_enum import MetricTypes

    def make_meter(name: str, kind: str, label_names: list[str]) -> Meter:
        unit = "seconds" if "_seconds" in name and not name.endswith(("_bucket", "_count")) else "count"
        meter: Meter = cache.add_metric_to_cache(name, unit, label_names, MetricTypes(kind)).add_or_update
        return meter

    return make_meter
