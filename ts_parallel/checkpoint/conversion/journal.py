"""Which pieces of a conversion are safely on disk, so that a run that was cut off can be gone on with."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ts_parallel.errors import CheckpointError

JOURNAL = ".convert.json"


class Journal:
    """Owns `.convert.json` of a destination, which is there for as long as the conversion is incomplete."""

    def __init__(self, destination: Path, job: Mapping[str, Any]) -> None:
        """Take up what `destination` already holds of the same `job`, and write nothing yet.

        Raises:
            CheckpointError: the destination holds something else.
        """
        self._file = destination / JOURNAL
        self._job = json.loads(json.dumps(job))
        self.lengths: dict[str, list[int]] = {}
        """File name → bytes of each of its first pieces that are on disk, under the file's name or as its `.part`."""
        if destination.exists() and not destination.is_dir():
            raise CheckpointError(f"{destination} is no folder: name another one to write to")
        if self._file.is_file():
            self._take_up(destination)
        elif destination.is_dir() and any(not path.name.startswith(JOURNAL) for path in destination.iterdir()):
            raise CheckpointError(f"{destination} exists and is not empty: remove it or name another folder")

    def _take_up(self, destination: Path) -> None:
        try:
            content = json.loads(self._file.read_text())
            job, lengths = content["job"], content["lengths"]
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(f"{self._file} is damaged: remove {destination} and convert again") from None
        changed = [key for key in self._job if job.get(key) != self._job[key]]
        if changed:
            raise CheckpointError(
                f"{destination} holds a part of another conversion, whose {changed[0]} was {_short(job, changed[0])}, "
                f"not {_short(self._job, changed[0])}: remove it or name another folder"
            )
        self.lengths = lengths

    def record(self, name: str, lengths: Sequence[int]) -> None:
        """Of a file whose bytes have been synced.

        Raises:
            OSError: it cannot be written; what was recorded before still holds.
        """
        self.lengths[name] = list(lengths)
        self.save()

    def save(self) -> None:
        write_synced(self._file, json.dumps({"job": self._job, "lengths": self.lengths}).encode())

    def remove(self) -> None:
        self._file.unlink()


@contextmanager
def only_writer(destination: Path) -> Iterator[None]:
    """
    Raises:
        CheckpointError: another process is in here with the same folder.
    """
    descriptor = os.open(destination, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CheckpointError(f"another process is writing {destination}: wait for it, or stop it") from None
    except OSError:
        pass  # network file systems that cannot lock a folder
    try:
        yield
    finally:
        os.close(descriptor)


def write_synced(file: Path, content: bytes) -> None:
    """Either all of `content` is under the name after this, or what was there before.

    Raises:
        OSError: it cannot be written.
    """
    part = file.with_name(f"{file.name}.part")
    with part.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    rename_synced(part, file)


def rename_synced(part: Path, file: Path) -> None:
    os.replace(part, file)
    descriptor = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _short(job: Mapping[str, Any], key: str) -> str:
    text = json.dumps(job.get(key))
    return text if len(text) <= 60 else f"{text[:57]}…"
