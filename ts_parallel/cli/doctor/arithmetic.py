"""The backend's operations beside a plain reference, in a process of their own: what this processor cannot run ends
that process, and not the page. It runs this file, and prints a finding a line:

python -m ts_parallel.cli.doctor.arithmetic NAME…
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial

import torch

from ts_parallel.cli.doctor.computing import BY
from ts_parallel.cli.doctor.finding import Check, Finding, Status, finding_of
from ts_parallel.machine import this_machine
from ts_parallel.runtime.backends.base import Backend
from ts_parallel.runtime.backends.choose import choose_backend
from ts_parallel.runtime.backends.self_test import Comparison, Operation, operations

_CPU = torch.device("cpu")
_FLOAT16 = "float16"
_SECONDS = 60.0  # for one operation, and before the first for the import of torch


class Arithmetic:
    """Owns the process, which computes ahead of who asks."""

    def __init__(self) -> None:
        self._waiting = list(_checks())
        self._begin()

    def checks(self) -> Iterator[tuple[str, Check]]:
        """A check of each operation of the backend that computes bfloat16, and one of all operations in float16; to be
        asked in this order."""
        for name in list(self._waiting):
            yield name, partial(self._next, name)

    def _begin(self) -> None:
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, *self._waiting],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(self._process, self._lines), daemon=True).start()

    def _next(self, name: str) -> Finding:
        """What was found of the next operation. Where its process has ended of it, another one goes on behind it."""
        assert self._waiting[0] == name
        del self._waiting[0]
        try:
            line = self._lines.get(timeout=_SECONDS)
        except queue.Empty:
            self.end()
            found = _broken(name, f"no answer after {_SECONDS:g} s")
        else:
            if line is not None:
                return Finding(**{**(found := json.loads(line)), "status": Status(found["status"])})
            found = _broken(name, f"the process that computed it ended with {_how_it_ended(self._process.wait())}")
        if self._waiting:
            self._begin()
        return found

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def in_own_process() -> Iterator[Arithmetic]:
    arithmetic = Arithmetic()
    try:
        yield arithmetic
    finally:
        arithmetic.end()


def _read(process: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
    assert process.stdout is not None
    with process.stdout as output:
        for line in output:
            lines.put(line)
    lines.put(None)


def _how_it_ended(status: int) -> str:
    if status >= 0:
        return f"status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def _broken(name: str, text: str) -> Finding:
    return _off(name, _backend(torch.float16 if name == _FLOAT16 else torch.bfloat16).name, text, "there would be none")


def _backend(dtype: torch.dtype) -> Backend:
    """With a thread for every core."""
    return choose_backend(_CPU, dtype, this_machine().num_cores)


def _checks() -> dict[str, Check]:
    """By name; they compute in this process."""
    own, other = _backend(torch.bfloat16), _backend(torch.float16)
    checks: dict[str, Check] = {
        name: partial(_compared, name, own.name, operation) for name, operation in operations(own).items()
    }
    return {**checks, _FLOAT16: partial(_all_compared, other.name, operations(other, torch.float16))}


def _compared(name: str, backend: str, operation: Operation) -> Finding:
    found = operation()
    if found.num_wrong:
        return _off(name, backend, f"{_wrong(found)} by {BY[backend]} are off by more than {found.allowed}")
    numbers = f"{found.num_numbers:,} numbers beside float64"
    text = (
        f"{numbers}, off by at most {found.share:.2f} of {found.allowed}" if found.share else f"{numbers}, all the same"
    )
    return Finding(name, Status.OK, text)


def _all_compared(backend: str, own: Mapping[str, Operation]) -> Finding:
    found = {name: operation() for name, operation in own.items()}
    wrong = [f"{_wrong(each)} of {name}" for name, each in found.items() if each.num_wrong]
    if wrong:
        return _off(_FLOAT16, backend, f"{'; '.join(wrong)} by {BY[backend]} are further off than they may be")
    count, share = sum(each.num_numbers for each in found.values()), max(each.share for each in found.values())
    text = f"{count:,} numbers of {len(found)} operations beside float64, off by at most {share:.2f} of what is allowed"
    return Finding(_FLOAT16, Status.OK, text)


def _wrong(found: Comparison) -> str:
    return f"{found.num_wrong:,} of {found.num_numbers:,} numbers"


def _off(name: str, backend: str, text: str, answers: str = "answers would be wrong") -> Finding:
    meanwhile = "TS_PARALLEL_ISA=none" if backend == "native" else "dtype: float32"
    return Finding(name, Status.FAIL, text, f"{answers}; report it with this page, and set {meanwhile} until then")


def main(names: Sequence[str]) -> None:
    checks = _checks()
    for name in names:
        print(json.dumps(asdict(finding_of(name, checks[name]))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
