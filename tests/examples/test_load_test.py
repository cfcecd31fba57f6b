"""The short form of `examples/load_test.py`: half a minute of load on a real server; and what its checks are worth."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from places import EXAMPLES

_MORE = 4  # threads or files that a busy machine may show more than before
# As much as half a minute is too short to warm up; TorchServe's Java grows into its heap for longer.
_GROWTH = 0.10


@pytest.fixture(scope="module")
def load_test() -> ModuleType:
    spec = importlib.util.spec_from_file_location("load_test", EXAMPLES / "load_test.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["load_test"] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


@pytest.mark.torchserve
def test_nothing_fails_grows_or_stays_behind(load_test: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "load.json"
    load_test.main(["--minutes", "0.6", "--clients", "4", "--json", str(file)])
    figures = json.loads(file.read_text())
    assert figures["failures"] == []
    assert set(figures["requests"]) == {"stream", "whole", "chat", "form", "tokenize", "refused", "leaves"}
    assert figures["blocks_in_use_at_the_end"] == 0
    assert set(figures["processes"]) == {"serve", "gateway", "TorchServe", "torchrun", "rank 0", "rank 1"}
    for name, own in figures["processes"].items():
        assert own["files"][1] <= own["files"][0] + _MORE, (name, own)
        if name != "TorchServe":
            assert own["threads"][1] <= own["threads"][0] + _MORE, (name, own)
            assert own["memory_growth"] <= _GROWTH, (name, own)


def seen(load_test: ModuleType, **wrong: Any) -> Any:
    """Six minutes of one process that does not change, but for what is said of its last minute."""
    made = load_test.Seen()
    for second in range(360):
        is_last = second >= 300
        memory = wrong.get("memory", 1000) if is_last else 1000
        threads, files = (wrong.get(name, 7) if is_last else 7 for name in ("threads", "files"))
        made.looks["rank 0"].append(load_test.Look(second, memory, threads, files))
        made.streams.append((second, wrong.get("took", 1.0) if is_last else 1.0))
    made.failures += wrong.get("failures", [])
    return made


@pytest.mark.parametrize(
    ("wrong", "check"),
    [
        ({}, None),
        ({"memory": 1029, "took": 1.09}, None),
        ({"memory": 1031}, "memory of rank 0 is flat"),
        ({"threads": 8}, "rank 0 has no more threads"),
        ({"files": 8}, "rank 0 has no more files"),
        ({"took": 1.11}, "99 of 100 streams end as soon as before"),
        ({"failures": ["x"]}, "no request failed"),
    ],
)
def test_check_fails_where_it_should_and_nowhere_else(
    load_test: ModuleType, wrong: dict[str, Any], check: str | None
) -> None:
    figures = load_test.judge(seen(load_test, **wrong), 0.0, 6.0, 0.03, 0.10)
    assert [name for name, holds in figures["checks"].items() if not holds] == ([check] if check else [])
    assert load_test.judge(seen(load_test), 0.01, 6.0, 0.03, 0.10)["checks"]["all KV blocks are free"] is False


def test_process_that_was_replaced_or_lost_is_told_of(load_test: ModuleType) -> None:
    made = seen(load_test)
    made.looks["rank 1"] = made.looks["rank 0"][:200]
    figures = load_test.judge(made, 0.0, 6.0, 0.03, 0.10)
    assert figures["checks"]["rank 1 was there throughout"] is False
    assert any("rank 0" in line for line in load_test.report(figures))


def test_plot_is_drawn(load_test: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    load_test.draw(load_test.judge(seen(load_test), 0.0, 6.0, 0.03, 0.10), tmp_path / "load.png")
    assert (tmp_path / "load.png").stat().st_size > 1000
