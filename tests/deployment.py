"""The README's own way for tests: torch-model-archiver and torchserve by hand, with handlers/ and model-configs/."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from http_client import JSON, get, post
from places import ROOT
from programs import keep_for_ranks

from ts_parallel.cli.server.torchserve import TorchServe, free_ports
from ts_parallel.errors import StartupError

DEMO_MODEL = ROOT / "examples" / "demo_model"
MODEL_CONFIGS: dict[str, dict[str, Any]] = {
    path.name: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "model-configs").glob("*.yaml"))
}
"""The files of model-configs/ by name."""


def is_batch(settings: Mapping[str, Any]) -> bool:
    """Whether a model-config.yaml is batch inference's."""
    return "task" in settings["handler"]


def on_the_cpu(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same model-config.yaml where there is no GPU, with KV memory that all ranks have room for in one host."""
    handler = {**settings["handler"], "device": "cpu"}
    if handler.get("kv_cache_memory") == "8GiB":
        handler["kv_cache_memory"] = "256MiB"
    return {**settings, "deviceType": "cpu", "handler": handler}


@contextmanager
def served(
    workspace: Path, settings: Mapping[str, Any], folder: Path, handler: Path | None = None, **sizes: int
) -> Iterator[TorchServe]:
    """A TorchServe with the checkpoint in `folder` as "demo", once all replicas have loaded and one has answered."""
    with starting(workspace, settings, folder, handler, **sizes) as server:
        wait_until(lambda: num_ready(server) >= settings["minWorkers"] and is_healthy(server), lambda: log_end(server))
        yield server


@contextmanager
def starting(
    workspace: Path, settings: Mapping[str, Any], folder: Path, handler: Path | None = None, **sizes: int
) -> Iterator[TorchServe]:
    """The same without waiting; by default with the file of handlers/ that the settings are for, and TorchServe's own
    `sizes` of a body."""
    with suppress(StartupError):  # of which the ranks tell
        keep_for_ranks(folder, settings["handler"])
    config_file = workspace / "model-config.yaml"
    config_file.write_text(yaml.safe_dump(dict(settings)))
    own = ROOT / "handlers" / ("batch_inference.py" if is_batch(settings) else "text_generation.py")
    command = [str(Path(sys.executable).parent / "torch-model-archiver"), "--model-name", "demo", "--version", "1.0"]
    command += ["--handler", str(handler or own), "--config-file", str(config_file)]
    command += ["--extra-files", f"{folder}/", "--export-path", str(workspace / "store")]
    (workspace / "store").mkdir()
    subprocess.run(command, check=True, capture_output=True)
    server = TorchServe(workspace, workspace / "store", "demo", "127.0.0.1", free_ports(1)[0], None, **sizes)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def wait_until(holds: Callable[[], bool], otherwise: Callable[[], str] = str, seconds: float = 120) -> None:
    """`otherwise` says what is to be known of the case that it does not hold in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.2)


def num_ready(server: TorchServe) -> int:
    """How many times a replica has loaded."""
    return server.log_text().count("ts_parallel is ready")


def is_healthy(server: TorchServe) -> bool:
    try:
        return get(f"{server.url}/1.0/health")[0] == 200
    except OSError:
        return False


def log_end(server: TorchServe) -> str:
    return server.log_text()[-5000:]


def ask_at_once(server: TorchServe, bodies: Sequence[Any], headers: dict[str, str] = JSON) -> list[tuple[int, Any]]:
    """Status and JSON of all answers; all bodies are sent at the same time, so that TorchServe batches them."""
    with ThreadPoolExecutor(len(bodies)) as threads:
        answers = list(threads.map(lambda body: post(server.url, body, headers), bodies))
    return [(status, json.loads(text)) for status, text in answers]
