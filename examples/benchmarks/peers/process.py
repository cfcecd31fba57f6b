"""The benchmark's side of a measured process: started, asked, and ended with all its children. Knows no model."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from peers.rounds import Task

BENCHMARKS = Path(__file__).parents[1]
_SECONDS_TO_END = 10
_SECONDS_TO_BE_IDLE = 3.0
_SECONDS_OF_A_LOOK = 0.1
_BUSY_PART = 0.2  # of one core, that a family which waits does not use
_LEAST_PEAK_MIB = 64  # what a launcher or a resource tracker has is no rank's memory


class PeerError(Exception):
    """A measured process ended, said nothing in time, or something else than an answer. One line says which."""


class MeasuredProcess:
    """Owns one process and everything it starts. `log` takes what it says beside its replies.

    Args:
        environment: set beside this process's own variables.

    Raises:
        PeerError: it cannot be started.
    """

    def __init__(self, command: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
        self._log = log
        self._started = time.perf_counter()
        with log.open("wb") as errors:
            try:
                self._process = subprocess.Popen(
                    command,
                    cwd=BENCHMARKS,
                    env={**os.environ, **(environment or {})},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    start_new_session=True,  # Ctrl-C is for the benchmark, which then ends them all
                )
            except OSError as error:
                raise PeerError(f"cannot run {command[0]}: {error.strerror}") from None
        self._replies = queue.SimpleQueue[str]()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._replies.put(line)
        self._replies.put("")

    def introduction(self, seconds: float) -> dict[str, Any]:
        """What it says of itself once it has made its first token; `ready_seconds` since its start are added.

        Raises:
            PeerError: it did not within `seconds`.
        """
        about = self._reply(seconds)
        return {**about, "ready_seconds": time.perf_counter() - self._started}

    def ask(self, task: Task, seconds: float) -> dict[str, Any]:
        """What one round took.

        Raises:
            PeerError: it was not done within `seconds`.
        """
        assert self._process.stdin is not None
        try:
            print(json.dumps(asdict(task)), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # it has ended, which its missing reply tells
        return self._reply(seconds)

    def _reply(self, seconds: float) -> dict[str, Any]:
        try:
            line = self._replies.get(timeout=seconds)
        except queue.Empty:
            raise PeerError(f"said nothing for {seconds:g} s{self._last_words()}") from None
        try:
            reply = json.loads(line)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            what = "answered with no JSON object" if line else "ended"
            raise PeerError(f"{what}{self._last_words()}")
        return reply

    def _last_words(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f": {lines[-1].strip()[:300]}" if lines else ""

    def peaks(self) -> list[float]:
        """MiB that each rank has had at most."""
        return peaks_of_family(self._process.pid)

    def rest(self) -> None:
        wait_until_idle(self._process.pid)

    def stop(self) -> None:
        """Let it end by itself, as it does when nobody will ask any more; end what is left of it and its children."""
        family = family_of(self._process.pid)
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            pass
        end(family)
        self._process.wait()


def run_once(command: list[str], seconds: float) -> str:
    """What a command prints, that is started in the examples' folder.

    Raises:
        PeerError: it failed, or was not done within `seconds`.
    """
    try:
        result = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise PeerError(f"{command[2]} was not done after {seconds:g} s") from None
    except OSError as error:
        raise PeerError(f"cannot run {command[0]}: {error.strerror}") from None
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        raise PeerError(f"{' '.join(command[1:3])} failed: {lines[-1] if lines else 'without a word'}")
    return result.stdout


def family_of(pid: int) -> list[psutil.Process]:
    """A process and its descendants."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def wait_until_idle(pid: int) -> None:
    """Return once a process and its descendants have stopped to compute, at the latest after some seconds.

    Ranks that wait for each other may spin for a second before they sleep, which would take cores from who is next.
    """
    deadline = time.monotonic() + _SECONDS_TO_BE_IDLE
    before = _cpu_seconds(pid)
    while time.monotonic() < deadline:
        time.sleep(_SECONDS_OF_A_LOOK)
        now = _cpu_seconds(pid)
        if now - before < _BUSY_PART * _SECONDS_OF_A_LOOK:
            return
        before = now


def _cpu_seconds(pid: int) -> float:
    total = 0.0
    for process in family_of(pid):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def end(processes: list[psutil.Process]) -> None:
    """Ask those that still run to end, and kill those that do not."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            try:
                process.send_signal(kind)
            except psutil.NoSuchProcess:
                pass
        _, processes = psutil.wait_procs(processes, timeout=_SECONDS_TO_END)


def peaks_of_family(pid: int) -> list[float]:
    """MiB that each rank below `pid` has had at most, in rank order; where there are no ranks, each large process."""
    ranks: dict[int, float] = {}
    others: list[float] = []
    for process in family_of(pid):
        try:
            environment, peak = process.environ(), peak_mib(process.pid)
        except (psutil.Error, OSError):
            continue
        if "LOCAL_RANK" in environment:
            ranks[int(environment["RANK"])] = max(peak, ranks.get(int(environment["RANK"]), 0.0))
        elif peak >= _LEAST_PEAK_MIB:
            others.append(peak)
    return [ranks[rank] for rank in sorted(ranks)] or sorted(others, reverse=True)


def peak_mib(pid: int) -> float:
    """The most memory that a process has had, as Linux counts it (VmHWM)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024
