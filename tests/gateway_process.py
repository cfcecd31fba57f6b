"""`ts-parallel gateway` as its users run it: a process of its own on a free port."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

COMMAND = str(Path(sys.executable).parent / "ts-parallel")


@dataclass(frozen=True)
class Gateway:
    url: str
    """Without `/v1`."""
    process: subprocess.Popen[str]


@contextmanager
def gateway(*upstreams: str, options: tuple[str, ...] = (), **environment: str) -> Iterator[Gateway]:
    """One before `upstreams`, each `NAME=URL`; it ends by itself when it is told to, else the test fails."""
    named = [word for upstream in upstreams for word in ("--upstream", upstream)]
    process = subprocess.Popen(
        [COMMAND, "gateway", "--port", "0", *named, *options],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("ready: "), line
        yield Gateway(line.removeprefix("ready: ").strip().removesuffix("/v1"), process)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(timeout=20)
        finally:
            process.kill()
            process.stdout.close()
    assert status in (0, -signal.SIGKILL)  # or a test has killed it
