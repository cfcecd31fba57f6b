"""The figures as Prometheus reads them, and what TorchServe is told of them."""

from __future__ import annotations

import json
import re
import threading
from itertools import count

import pytest
from places import EXAMPLES

from ts_parallel.engine.request import Request
from ts_parallel.engine.stats import REASONS, EngineStats, Figures, KVBlocks, Occupancy
from ts_parallel.serving.metrics import families, prometheus_text, worker_number
from ts_parallel.serving.torchserve import metrics
from ts_parallel.serving.torchserve.metrics import MetricsReporter

LABELS = (("model_name", 'a "quoted" name'), ("engine", "9000"))
BLOCKS = KVBlocks(number=96, size=16, caches_prefixes=True)
# What TorchServe 0.12 takes for a metric: the patterns of its front end.
NAME, VALUE = re.compile(r"\w+"), re.compile(r"[0-9\-,.e]+")


def some_figures() -> Figures:
    stats = EngineStats()
    request = Request("a", (1, 2, 3), 4)
    stats.admitted(request, num_cached=2)
    for moment in (0.2, 0.23, 0.27):
        stats.token(request, request.arrived + moment)
    stats.ended(request, "stop")
    return Figures(stats, Occupancy(num_running=2, num_waiting=1, kv_cache_usage=0.25), BLOCKS)


def values(text: str) -> dict[str, float]:
    """Series → value, without the labels that all have."""
    common = 'model_name="a \\"quoted\\" name",engine="9000"'
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    assert all(common in name for name, _, _ in lines)
    return {name.replace(common, "").replace("{,", "{"): float(value) for name, _, value in lines}


def test_text_has_vllms_names_and_the_figures() -> None:
    text = prometheus_text(some_figures(), LABELS)
    found = values(text)
    assert found["vllm:num_requests_running{}"] == 2
    assert found["vllm:num_requests_waiting{}"] == 1
    assert found["vllm:kv_cache_usage_perc{}"] == 0.25
    labels = 'block_size="16",num_gpu_blocks="96",enable_prefix_caching="True"'
    assert found[f"vllm:cache_config_info{{{labels}}}"] == 1
    assert found["vllm:prompt_tokens_total{}"] == found["vllm:generation_tokens_total{}"] == 3
    assert found["vllm:prefix_cache_hits_total{}"] == 2
    assert found['vllm:request_success_total{finished_reason="stop"}'] == 1
    assert "# TYPE vllm:time_to_first_token_seconds histogram\n" in text


def test_every_reason_to_end_is_told() -> None:
    figures = some_figures()
    for reason in REASONS:
        figures.stats.ended(Request(reason, (1,), 1), reason)
    found = values(prometheus_text(figures, LABELS))
    ends = {name: value for name, value in found.items() if name.startswith("vllm:request_success_total")}
    assert sum(ends.values()) == figures.stats.num_ended.total() == len(REASONS) + 1
    for reason in ("stop", "length", "abort", "error", "timeout"):
        assert ends[f'vllm:request_success_total{{finished_reason="{reason}"}}'] >= 1


def test_report_that_fails_is_not_the_last(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(metrics, "SECONDS_BETWEEN_REPORTS", 0.001)
    num_reads, has_gone_on = count(), threading.Event()

    def read() -> Figures:
        number = next(num_reads)
        if number == 0:
            raise RuntimeError("out of luck")
        if number == 2:
            has_gone_on.set()
            threading.Event().wait()
        return some_figures()

    MetricsReporter(read, TorchServe().make_meter, LABELS).report_for_ever()
    assert has_gone_on.wait(30)
    assert "a report of the metrics failed" in caplog.text


def test_buckets_count_what_is_below_them_too() -> None:
    found = values(prometheus_text(some_figures(), LABELS))
    name = "vllm:inter_token_latency_seconds"
    assert [found[f'{name}_bucket{{le="{bound}"}}'] for bound in ("0.025", "0.05", "0.075", "+Inf")] == [0, 2, 2, 2]
    assert found[f"{name}_count{{}}"] == 2
    assert found[f"{name}_sum{{}}"] == pytest.approx(0.07, abs=1e-5)
    assert found['vllm:time_to_first_token_seconds_bucket{le="0.1"}'] == 0
    assert found['vllm:time_to_first_token_seconds_bucket{le="0.25"}'] == 1


class TorchServe:
    """Adds up what it is told, as its front end does in Prometheus mode."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], float] = {}

    def make_meter(self, name: str, kind: str, label_names: list[str]):  # type: ignore[no-untyped-def]
        assert NAME.fullmatch(name)
        assert label_names[:2] == ["model_name", "engine"]

        def meter(value: float, label_values: list[str]) -> None:
            assert VALUE.fullmatch(str(value))
            assert len(label_values) == len(label_names)
            key = (name, *label_values[2:])
            assert kind == "gauge" or value >= 0
            self.values[key] = value + (self.values.get(key, 0) if kind == "counter" else 0)

        return meter


def test_reports_are_of_what_changed_and_add_up() -> None:
    figures, server = some_figures(), TorchServe()
    current = [Figures(EngineStats(), Occupancy(0, 0, 0.0), BLOCKS)]
    reporter = MetricsReporter(lambda: current[0], server.make_meter, LABELS)
    num_series = sum(len(family.samples) for family in families(figures))
    assert reporter.report() == num_series
    assert reporter.report() == 0
    current[0] = figures
    assert 0 < reporter.report() < num_series
    current[0] = Figures(figures.stats, Occupancy(0, 0, 0.0), BLOCKS)
    request = Request("b", (1,), 1)
    figures.stats.token(request, request.arrived + 0.2)
    reporter.report()
    assert server.values["generation_tokens_total",] == 4
    assert server.values["time_to_first_token_seconds_count",] == 2
    assert server.values["time_to_first_token_seconds_sum",] == pytest.approx(0.4, abs=1e-5)
    assert server.values["time_to_first_token_seconds_bucket", "0.25"] == 2
    assert server.values["num_requests_running",] == 0
    assert server.values["request_success_total", "stop"] == 1


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["worker.py", "--sock-type", "unix", "--sock-name", "/tmp/.ts.sock.9001"], "9001"),
        (["worker.py", "--sock-type", "tcp", "--port", "9002", "--async"], "9002"),
        (["worker.py"], "0"),
    ],
)
def test_worker_is_known_by_its_socket(command: list[str], expected: str) -> None:
    assert worker_number(command) == expected


def test_dashboard_asks_for_names_that_there_are() -> None:
    dashboard = json.loads((EXAMPLES / "grafana" / "dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for text in expressions for name in re.findall(r'__name__=~"\(vllm:\)\?(\w+)"', text)}
    known = {family.name + sample.suffix for family in families(some_figures()) for sample in family.samples}
    assert len(asked) == len(list(families(some_figures())))
    assert asked <= known
