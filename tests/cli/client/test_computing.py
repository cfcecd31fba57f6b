"""A bench's figures stand beside the machine that they are of, as far as anybody tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sse_server import running, steady
from typer.testing import CliRunner

from ts_parallel.cli.client.computing import KEYS, computing_line, find_computing
from ts_parallel.cli.client.stream_client import Client, RemoteError
from ts_parallel.cli.main import app
from ts_parallel.machine import this_machine

TOLD = {
    "processor": "AMD EPYC 9R14",
    "num_cores": 4,
    "device": "cpu",
    "backend": "native",
    "instruction_set": "AVX-512 BF16",
    "dtype": "bfloat16",
}
LOAD = ["--concurrency", "1", "--num-requests", "1", "--output-tokens", "1"]


@pytest.mark.parametrize("card", [{}, {"computed_by": TOLD}])
def test_bench_says_and_writes_by_what_the_server_computes(card: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    with running(completions=steady()) as server:
        server.card = card
        result = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["bench", server.url, *LOAD, "--json", str(file)])
    assert result.exit_code == 0, result.output
    head, written = result.stdout.splitlines()[0], json.loads(file.read_text())["computed_by"]
    if card:
        assert head == "demo: AMD EPYC 9R14, 4 cores, AVX-512 BF16, bfloat16 by the native backend"
        assert written == {**TOLD, "told_by": "server"}
    else:  # the server is on this machine
        machine = this_machine()
        assert head.startswith(f"demo: {machine.processor}, {machine.num_cores} cores, ")
        assert head.endswith(", an unknown dtype")
        assert (written["told_by"], written["processor"], written["dtype"]) == ("client", machine.processor, None)
    assert written.keys() == {*KEYS, "told_by"}


class Mute(Client):
    """A server that lists no models."""

    def model_cards(self) -> dict[str, dict[str, Any]]:
        raise RemoteError("no route")


def test_server_elsewhere_that_tells_nothing_is_unknown() -> None:
    computed_by = find_computing(Mute("http://example.org/v1"), "demo")
    assert set(computed_by.values()) == {None}
    assert computing_line(computed_by) == "an unknown processor, an unknown dtype"
    assert find_computing(Mute("http://127.0.0.1:1/v1"), "demo")["told_by"] == "client"
