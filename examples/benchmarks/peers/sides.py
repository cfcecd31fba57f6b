"""Each system that is measured, as the benchmark sees it: started, asked for a round, and ended. Knows no table."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from peers.process import MeasuredProcess, PeerError, peaks_of_family, run_once, wait_until_idle
from peers.programs.engine import load_seconds, measured_config
from peers.rounds import Task, make_prompts
from ts_parallel.cli.client.dialect import Dialect
from ts_parallel.cli.client.measure import follow, run_load, summarize
from ts_parallel.cli.client.stream_client import Client
from ts_parallel.cli.client.workload import Ask
from ts_parallel.cli.server.serve import running
from ts_parallel.cli.server.torchserve import TorchServe, free_ports
from ts_parallel.config import ARCHIVE_VERSION
from ts_parallel.errors import StartupError

SECONDS_TO_START = 180.0
SECONDS_OF_A_ROUND = 600.0  # which only who hangs takes: 32 streams at 10 tokens/s have half of it left
_SECONDS_TO_LOOK = 60.0


class Running(Protocol):
    """A system that has its model loaded. Its methods raise PeerError where it fails or takes too long."""

    about: dict[str, Any]
    """`version`, `load_seconds` or None, and `ready_seconds`."""

    def measure(self, task: Task) -> dict[str, Any]:
        """`seconds` of the round; `first`, `next`, `slow` and `token_ids` where they are known."""
        ...

    def rest(self) -> None:
        """Return once it computes no more, so that it takes nothing from the next."""
        ...

    def peaks(self) -> list[float]:
        """MiB that each rank has had at most."""
        ...


@dataclass(frozen=True)
class ProcessSide:
    """A process as `peers.rounds` has it: `name` for options, `label` for tables.

    In its command MODEL stands for the model's folder, GGUF for its GGUF file. In a round each of several streams asks
    `asks` times, a single one `asks_alone` times.
    """

    name: str
    label: str
    command: tuple[str, ...]
    asks: int = 1
    asks_alone: int = 3
    gguf_writer: str | None = None  # the Python that writes the GGUF file

    @contextmanager
    def running(self, folder: Path, scratch: Path) -> Iterator[Running]:
        gguf = scratch / "model.gguf"
        if self.gguf_writer is not None:
            run_once([self.gguf_writer, "-m", "peers.programs.gguf_file", str(folder), str(gguf)], SECONDS_OF_A_ROUND)
        places = {"MODEL": str(folder), "GGUF": str(gguf)}
        process = MeasuredProcess([places.get(word, word) for word in self.command], scratch / f"{self.name}.log")
        try:
            yield RunningProcess(process)
        finally:
            process.stop()


class RunningProcess:
    def __init__(self, process: MeasuredProcess) -> None:
        self._process = process
        self.about = process.introduction(SECONDS_TO_START)

    def measure(self, task: Task) -> dict[str, Any]:
        return self._process.ask(task, SECONDS_OF_A_ROUND)

    def rest(self) -> None:
        self._process.rest()

    def peaks(self) -> list[float]:
        return self._process.peaks()


@dataclass(frozen=True)
class ServedSide:
    """This package behind TorchServe, asked by HTTP as `ts-parallel bench` does it."""

    name: str
    label: str
    num_ranks: int
    asks: int
    asks_alone: int = 3

    @contextmanager
    def running(self, folder: Path, scratch: Path) -> Iterator[Running]:
        config, port, is_late = measured_config(folder, self.num_ranks), free_ports(1)[0], threading.Event()
        timer = threading.Timer(SECONDS_TO_START, is_late.set)
        timer.daemon = True
        timer.start()
        started = time.perf_counter()
        try:
            with running(config, folder, "m", "127.0.0.1", port, False, is_late) as server:
                ready = time.perf_counter() - started
                timer.cancel()
                if is_late.is_set():
                    raise PeerError(f"was not ready after {SECONDS_TO_START:g} s")
                yield RunningServer(server, ready)
        except StartupError as error:
            raise PeerError(str(error)) from None
        finally:
            timer.cancel()


class RunningServer:
    def __init__(self, server: TorchServe, ready_seconds: float) -> None:
        self._server = server
        self._client = Client(f"{server.url}/{ARCHIVE_VERSION}/v1", timeout=SECONDS_OF_A_ROUND)
        self.about = {
            "version": version("ts-parallel"),
            "load_seconds": load_seconds(server.log_text()),
            "ready_seconds": ready_seconds,
        }

    def measure(self, task: Task) -> dict[str, Any]:
        client, dialect = self._client, Dialect("m")
        asks = [Ask(0.0, tuple(prompt), task.num_tokens) for prompt in make_prompts(task.streams * task.asks)]
        records = run_load(
            asks, task.streams, lambda ask, origin: follow(ask, client.complete(dialect.body(ask)), origin)
        )
        summary = summarize(list(records))
        if summary["failed"] or summary["shorter_than_asked"]:
            raise PeerError(f"{summary['failed']} of {len(asks)} requests failed: {summary['errors']}")
        first, following = summary["metrics"]["ttft_seconds"], summary["metrics"]["itl_seconds"]
        latencies = {"next": following["p50"], "slow": following["p99"]} if following["count"] else {}
        return {"seconds": summary["seconds"], "first": first["p50"], **latencies}

    def rest(self) -> None:
        assert self._server.pid is not None
        wait_until_idle(self._server.pid)

    def peaks(self) -> list[float]:
        assert self._server.pid is not None
        return peaks_of_family(self._server.pid)


Side = ProcessSide | ServedSide

PEERS: Mapping[str, str] = {"transformers": "transformers", "llamacpp": "llama_cpp", "vllm": "vllm"}
"""Name of a peer → the module that its environment must have."""


def find_peer(name: str, python: str | None) -> str:
    """The absolute path of a Python that has the peer: `python`, or this one.

    Raises:
        PeerError: it has not; the text says which.
    """
    chosen = (
        os.path.abspath(python) if python is not None else sys.executable
    )  # no link is followed: it is what a venv is
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({PEERS[name]!r}) is None)"
    try:
        result = subprocess.run([chosen, "-c", look], capture_output=True, timeout=_SECONDS_TO_LOOK)
    except (OSError, subprocess.TimeoutExpired):
        raise PeerError(f"{chosen} cannot be run") from None
    if result.returncode:
        raise PeerError(f"{PEERS[name]} is not installed for {chosen}; name another with --peer {name}=PYTHON")
    return chosen


def own_sides(num_ranks: int, asks: int) -> list[Side]:
    """This package in process and served, of one shape."""
    shape = "1 rank" if num_ranks == 1 else f"tensor parallel {num_ranks}"
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)] if num_ranks > 1 else []
    )
    command = (sys.executable, *launcher, "-m", "peers.programs.engine", "MODEL")
    return [
        ProcessSide(f"engine-{num_ranks}", f"ts_parallel, in process, {shape}", command, asks),
        ServedSide(f"served-{num_ranks}", f"ts_parallel, TorchServe, {shape}", num_ranks, asks),
    ]


def peer_sides(name: str, python: str, sizes: list[int], asks: int) -> list[Side]:
    """The ways in which an installed peer is measured.

    Whoever answers a batch as a whole is asked once: the next batch would only take as long again.
    """
    run = (python, "-m")
    if name == "transformers":
        return [
            ProcessSide("generate", "transformers generate", (*run, "peers.programs.transformers_generate", "MODEL")),
            ProcessSide(
                "generate-batch",
                "transformers generate_batch",
                (*run, "peers.programs.transformers_generate_batch", "MODEL"),
                asks_alone=1,
            ),
        ]
    if name == "llamacpp":
        command = (*run, "peers.programs.llamacpp", "GGUF")
        return [ProcessSide("llamacpp", "llama.cpp, in process", command, gguf_writer=python)]
    return [
        ProcessSide(
            f"vllm-{size}",
            "vLLM, in process, " + ("1 rank" if size == 1 else f"tensor parallel {size}"),
            (*run, "peers.programs.vllm_offline", "MODEL", str(size)),
            asks,
        )
        for size in sizes
    ]
