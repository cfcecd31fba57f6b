"""The gateway that `serve` starts beside its server is this package's own, wherever the command stands."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest

from ts_parallel.cli.server.beside import gateway_beside
from ts_parallel.cli.server.torchserve import Access, TorchServe, free_ports


def test_files_of_the_folder_that_it_is_started_in_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ts_parallel", "uvicorn", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a stranger was imported')")
    monkeypatch.chdir(tmp_path)
    port, gateway_port = free_ports(2)
    server = TorchServe(tmp_path, tmp_path, "demo", "127.0.0.1", port, None)  # which need not run
    with gateway_beside(server, "127.0.0.1", gateway_port, 1 << 20, Access()) as gateway:
        with urllib.request.urlopen(gateway.url.replace("/v1", "/live"), timeout=30) as answer:
            assert answer.status == 200
