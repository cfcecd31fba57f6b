"""Where a fault happens: the servers that are harmed, each with what it takes to be harmed so."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from faults.server import DEMO_MODEL, Server

MAX_STEP_SECONDS = 5.0
OPTIONS = ("--tensor-parallel-size", "2", "--kv-cache-memory", "256MiB", "--max-step-seconds", f"{MAX_STEP_SECONDS:g}")
Site = Callable[[], AbstractContextManager[Server]]
_MEGABYTES_OF_A_SMALL_DISK = 48
# Which `serve` has no option for.
_TWO_REPLICAS = """
import ts_parallel.cli.server.archive as archive
own = archive.model_config
archive.model_config = lambda config: {**own(config), "minWorkers": 2, "maxWorkers": 2}
"""


class Impossible(Exception):
    """This machine cannot have this fault; the text says why."""


@contextmanager
def plain(*options: str) -> Iterator[Server]:
    yield Server((*OPTIONS, *options))


def with_options(*options: str) -> Site:
    return lambda: plain(*options)


@contextmanager
def two_replicas() -> Iterator[Server]:
    yield Server(OPTIONS, first=_TWO_REPLICAS)


@contextmanager
def own_checkpoint() -> Iterator[Server]:
    """One that may be spoilt, in the server's folder."""
    with tempfile.TemporaryDirectory(prefix="f-model-") as folder:
        model = Path(folder) / "model"
        shutil.copytree(DEMO_MODEL, model)
        yield Server(OPTIONS, model=model)


@contextmanager
def small_disk() -> Iterator[Server]:
    """Its temporary folder, logs included, lies on a file system of its own."""
    with tempfile.TemporaryDirectory(prefix="f-disk-") as folder:
        _run("mount", "-t", "tmpfs", "-o", f"size={_MEGABYTES_OF_A_SMALL_DISK}m", "tmpfs", folder)
        try:
            yield Server(OPTIONS, place=Path(folder))
        finally:
            _run("umount", "-l", folder)


@contextmanager
def small_shared_memory() -> Iterator[Server]:
    """/dev/shm has 64 KiB, for this server alone."""
    inside = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    _run("unshare", "-m", "sh", "-c", inside, "sh", "true")
    yield Server(OPTIONS, before=("unshare", "-m", "sh", "-c", inside, "sh"))


def _run(*command: str) -> None:
    """
    Raises:
        Impossible: it failed, or is not there.
    """
    if os.geteuid():
        raise Impossible("only root can mount")
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Impossible(str(getattr(error, "stderr", "") or error).strip()) from None


def fill(folder: Path) -> Callable[[], None]:
    """Leave no byte; what is returned takes the file away again."""
    file = folder / "full"

    def empty() -> None:
        file.unlink(missing_ok=True)

    with file.open("wb", buffering=0) as out:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    out.write(bytes(size))
            except OSError:
                continue
    return empty


def without_its_end(files: Sequence[Path]) -> None:
    """Cut each in half, in place."""
    for file in files:
        os.truncate(file, file.stat().st_size // 2)
