"""One TorchServe worker process as one rank: how it starts, follows rank 0, and ends. What every handler does alike."""

from __future__ import annotations

import logging
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ts_parallel.checkpoint.folders.located import checkpoint_folder
from ts_parallel.config import ModelConfig, parse_config
from ts_parallel.errors import StartupError
from ts_parallel.serving.torchserve.ends.outliving import be_outlived, end_with_agent, seconds_until_front_end_waits
from ts_parallel.serving.torchserve.rank_watch import RankWatch, kill_stopped_siblings, other_ranks, patience_beside
from ts_parallel.serving.torchserve.streaming import refuse_unsafe_transport
from ts_parallel.topology import Topology, open_topology

logger = logging.getLogger(__name__)

CANNOT_START = "ts_parallel cannot start:"
_SECONDS_TO_ANSWER_BEFORE_EXIT = 1.0
_SECONDS_OF_A_REPLY, _SECONDS_BETWEEN_LOOKS = 0.05, 0.01

C = TypeVar("C", bound=ModelConfig)
L = TypeVar("L")


def start_rank(context: Any, kind: type[C], load: Callable[[C, Path, Topology], L]) -> tuple[Topology, RankWatch, L]:
    """Parse the `handler:` section as a `kind`, join the other ranks, and `load` what this rank needs.

    Where any rank raises a `StartupError`, every rank's process ends, and rank 0 says why on one line.
    """
    agent_is_watched = end_with_agent()
    try:
        refuse_unsafe_transport(context.model_yaml_config or {})
        config = parse_config((context.model_yaml_config or {}).get("handler"), kind)
        config = config.located_in(Path(context.system_properties["model_dir"]))
        topology = open_topology(
            config.tensor_parallel_size,
            config.device,
            num_threads=config.num_threads,
            pipeline_parallel_size=config.pipeline_parallel_size,
            patience=patience_beside(config.max_step_seconds),
        )
    except StartupError as error:
        _give_up([str(error)], is_told=os.environ.get("RANK", "0") == "0")
    failure, loaded = None, None
    try:
        folder = checkpoint_folder(Path(config.model_path))
        loaded = _in_a_thread_that_ends(partial(load, config, folder, topology))
    except StartupError as refused:
        failure = str(refused)
    errors = topology.gather_errors(failure)  # TorchServe looks at one rank's answer only: they must agree
    if errors:
        _give_up(errors, is_told=topology.rank == 0)
    assert loaded is not None
    watch = RankWatch(other_ranks(topology), config.max_step_seconds)
    be_outlived(topology, seconds_until_front_end_waits(context.model_yaml_config or {}), watch.end_worker)
    agent_is_watched()
    return topology, watch, loaded


def _in_a_thread_that_ends(load: Callable[[], L]) -> L:
    """The result of `load`, or what it raises.

    Each thread that computes with OpenMP keeps a team of helpers for as long as it lives. This process's main thread,
    had it loaded, would keep one that it never uses again; GNU's OpenMP counts it, finds more threads than cores, and
    lets the helpers of the thread that runs the model sleep between any two operations. That made a step take 1.5
    times as long (libgomp, `gomp_managed_threads` and `gomp_throttled_spin_count_var`).
    """
    with ThreadPoolExecutor(1, "load") as pool:
        return pool.submit(load).result()


def log_loaded(topology: Topology, what: str) -> None:
    logger.info("ts_parallel rank %d: %s, peak memory %.0f MiB", topology.rank, what, _peak_mib())


def _peak_mib() -> float:
    """The most memory that this program has had.

    getrusage counts on from the process that started it, so Linux is asked for its own figure first.
    """
    status = Path("/proc/self/status")
    if status.is_file() and "VmHWM:" in (text := status.read_text()):
        return int(text.partition("VmHWM:")[2].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def log_ready(topology: Topology, name: str) -> None:
    """The line that `ts-parallel serve` waits for."""
    logger.info("ts_parallel is ready: %s on %d ranks", name, topology.world_size)


def follow_in_thread(follow: Callable[[], None], watch: RankWatch) -> None:
    """Do what rank 0 says for as long as this process lives; end the worker where rank 0 is lost."""

    def run() -> None:
        try:
            follow()
        except Exception:
            logger.exception("rank 0 was lost")
            watch.end_worker()

    threading.Thread(target=run, name="follow", daemon=True).start()
    watch.begin_with_leader()


def tell_clients(fail_all: Callable[[str], object], num_open: Callable[[], int], reason: str) -> None:
    """Fail every open request, and return once all have been answered, or have had the time to be."""
    fail_all(f"the worker ends: {reason}")
    deadline = time.monotonic() + _SECONDS_TO_ANSWER_BEFORE_EXIT
    while num_open() and time.monotonic() < deadline:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    time.sleep(_SECONDS_OF_A_REPLY)  # in which the last answers are sent


def exit_soon() -> None:
    """End this worker once its open requests have had the time to be answered; TorchServe starts another."""

    def end() -> None:
        kill_stopped_siblings()
        os._exit(1)

    timer = threading.Timer(_SECONDS_TO_ANSWER_BEFORE_EXIT, end)
    timer.daemon = True
    timer.start()


def _give_up(errors: list[str], is_told: bool) -> NoReturn:
    """End this worker with one clear line. The exit status is 0, or torchrun would bury the line under a report."""
    with suppress(OSError):  # nobody may read it any more
        if is_told:
            for error in dict.fromkeys(errors):
                print(f"{CANNOT_START} {error}", flush=True)
        sys.stdout.flush()
    os._exit(0)  # at once: threads of half-built process groups would have the last word
