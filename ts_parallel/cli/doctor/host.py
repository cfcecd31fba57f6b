"""What this machine has free: memory, huge pages, room in folders, ports."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil

from ts_parallel.cli.doctor.finding import Finding, Status, judged

_LEAST_MEMORY, _ENOUGH_MEMORY = (
    2**29,
    2**31,
)  # what a worker of a tiny model and Java take; what leaves room for a model
_LEAST_ROOM, _ENOUGH_ROOM = 2**26, 2**30  # archive, sockets, logs
_PROBE = bytes(2**20)
_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"))
SHARED_MEMORY = Path("/dev/shm")
PORTS = {8080: "inference", 8081: "management", 8082: "metrics", 7070: "gRPC inference", 7071: "gRPC management"}
"""Those that TorchServe takes where nobody names others."""


def memory(free: int | None = None) -> Finding:
    """
    Args:
        free: bytes that can be had, by default what the system says.
    """
    free = _free_memory() if free is None else free
    text = f"{_size(free)} free of {_size(psutil.virtual_memory().total)}"
    if free >= _ENOUGH_MEMORY:
        return Finding("memory", Status.OK, text)
    status = Status.FAIL if free < _LEAST_MEMORY else Status.WARNING
    return Finding("memory", status, text, "a worker takes 0.8 GiB beside weights and KV cache; free some")


def _free_memory() -> int:
    """What the system has, or what is left to a container of its limit."""
    free = psutil.virtual_memory().available
    try:
        limit, used = (file.read_text().strip() for file in _LIMITS)
    except OSError:
        return free
    return free if limit == "max" else max(0, min(free, int(limit) - int(used)))


def huge_pages(file: Path = _PAGES) -> Finding:
    """Whether the system gives pages of 2 MiB to who asks for them, as this package does for weights."""
    try:
        text = f"of 2 MiB: {file.read_text().strip()}"
    except OSError:
        text = "this system has none"
    is_given = "[always]" in text or "[madvise]" in text
    advice = "" if is_given else f"weights are read a fifth slower without; as root: echo madvise > {file}"
    return judged("huge pages", text, advice, Status.WARNING)


def shared_memory(folder: Path = SHARED_MEMORY) -> Finding:
    """Ranks share memory that has no name and takes no room there, but libraries beside them may want it."""
    return _room("shared memory", folder, "mount it larger (docker run --shm-size=1g)", Status.WARNING)


def temporary_folder() -> Finding:
    """Where `serve` writes archive, sockets and logs."""
    wanted = os.environ.get("TMPDIR")
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        return Finding("temporary folder", Status.FAIL, str(error), "set TMPDIR to a folder that can be written to")
    advice = "make room, or set TMPDIR to another folder"
    found = _room("temporary folder", folder, advice, Status.FAIL)
    if wanted and Path(wanted).absolute() != folder and found.status == Status.OK:
        text = f"TMPDIR, {wanted}, cannot be written to; {found.text} is used"
        return Finding("temporary folder", Status.WARNING, text, "set TMPDIR to a folder that can be")
    return found


def _room(subject: str, folder: Path, advice: str, worst: Status) -> Finding:
    """`worst` where nothing can be written there."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(_PROBE)
            file.flush()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding(subject, worst, f"{folder} cannot be written to ({error.strerror})", advice)
    text = f"{_size(free)} free in {folder}"
    if free >= _ENOUGH_ROOM:
        return Finding(subject, Status.OK, text)
    return Finding(subject, worst if free < _LEAST_ROOM else Status.WARNING, text, advice)


def ports(numbers: Sequence[int] = tuple(PORTS)) -> Finding:
    """Which of TorchServe's are free on loopback."""
    taken = [number for number in numbers if not _is_free(number)]
    if not taken:
        return Finding("ports", Status.OK, f"{', '.join(map(str, numbers))} are free")
    text = ", ".join(f"{number} ({PORTS.get(number, 'TCP')})" for number in taken) + " taken"
    advice = "serve takes 8080 alone, or --port; a TorchServe of your own needs others in its config.properties"
    return Finding("ports", Status.WARNING, text, advice)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
