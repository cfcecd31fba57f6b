"""A checkpoint of any kind that can be read → files of another format, piece by piece, at the memory of a piece.

Each file grows under the name `….part` and is renamed once it is whole and synced; the index comes last. A run that was
cut off is gone on with by the next one of the same job.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ts_parallel.checkpoint.conversion.companions import copy_companions, weight_files
from ts_parallel.checkpoint.conversion.journal import Journal, only_writer, rename_synced, write_synced
from ts_parallel.checkpoint.conversion.pieces import PIECE_BYTES, Format, Piece, PlannedFile, bytes_of, cut_rows
from ts_parallel.checkpoint.index import CheckpointIndex, read_index
from ts_parallel.checkpoint.progress import Progress
from ts_parallel.checkpoint.quantized import refuse_quantized, refuse_quantized_names
from ts_parallel.errors import CheckpointError

_BYTES_BETWEEN_RECORDS = 2**30  # what a run that was cut off has to write again, at most
_OVERHEAD_OF_A_PIECE = 4096  # more than what any format adds to a piece


def convert(
    folder: Path, destination: Path, target: Format, companions: Path | None = None, *, compare: bool = False
) -> CheckpointIndex:
    """Write the tensors of `folder` to `destination`, and beside them what else a model needs; their new index.

    Args:
        companions: where configuration and tokenizer are; where it is None, `folder` or for dcp the one above.
        compare: read both again and compare their bytes.

    Raises:
        CheckpointError: the source cannot be read or written in this format, or is quantised; the destination holds
            something else, has too little room, or cannot be written; what was written is not what the source holds.
    """
    refuse_quantized(folder, companions)
    index = read_index(folder, companions)
    if not index:
        raise CheckpointError(f"no tensors in {folder}")
    refuse_quantized_names(index)
    files = target.plan(index)
    journal = Journal(destination, _job(folder, index, target))
    _check_room(destination, _remaining(destination, files, journal))
    try:
        destination.mkdir(parents=True, exist_ok=True)
        with only_writer(destination):
            journal.save()
            is_decoded = any(tensor.codes for tensor in index.values())
            copy_companions(companions or folder, destination, is_decoded=is_decoded)
            _write_files(destination, files, target, journal)
    except OSError as error:
        raise _stopped(error, destination, _remaining(destination, files, journal)) from None
    written = read_index(destination)
    check_index(index, written, destination)
    if compare:
        compare_contents(index, written, destination)
    journal.remove()
    return written


def check_index(index: CheckpointIndex, written: CheckpointIndex, destination: Path) -> None:
    """
    Raises:
        CheckpointError: names, shapes or dtypes differ.
    """
    for name in [*index, *written]:
        pair = [f"{t[name].dtype} {list(t[name].shape)}" if name in t else "missing" for t in (index, written)]
        if pair[0] != pair[1]:
            raise CheckpointError(
                f"{name!r} is {pair[0]} in the source but {pair[1]} in {destination}: remove it and convert again"
            )


def compare_contents(index: CheckpointIndex, written: CheckpointIndex, destination: Path) -> None:
    """
    Raises:
        CheckpointError: a tensor's bytes differ; the first one is named.
    """
    progress = Progress("compared")
    with progress.over(sum(tensor.num_bytes for tensor in index.values())):
        for name, tensor in index.items():
            for piece in cut_rows(tensor):
                if not torch.equal(bytes_of(piece.read()), bytes_of(piece.read_from(written[name]))):
                    rows = "" if piece.rows is None else f" in rows {piece.rows[0]} to {sum(piece.rows) - 1}"
                    raise CheckpointError(
                        f"{name!r} in {destination} differs from the source{rows}: remove it and convert again"
                    )
                progress.advance(piece.num_bytes)


def _job(folder: Path, index: CheckpointIndex, target: Format) -> dict[str, Any]:
    """What must be the same for a run to go on with another's files."""
    tensors = [(tensor.name, str(tensor.dtype), list(tensor.shape)) for tensor in index.values()]
    stats = [(path.name, path.stat()) for path in weight_files(folder)]
    return {
        "source": str(folder.resolve()),
        **target.settings,
        "piece_bytes": PIECE_BYTES,
        "tensors": hashlib.sha256(repr(tensors).encode()).hexdigest(),
        "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
    }


def _recorded(destination: Path, file: PlannedFile, journal: Journal) -> list[int]:
    """Bytes of each of the file's first pieces that are on disk, the sizes of the files being as the journal says."""
    lengths = journal.lengths.get(file.name, [])
    part = _part(destination, file)
    if _is_complete(destination, file, journal) or (part.is_file() and part.stat().st_size >= _size(file, lengths)):
        return lengths
    return []


def _is_complete(destination: Path, file: PlannedFile, journal: Journal) -> bool:
    lengths, path = journal.lengths.get(file.name, []), destination / file.name
    return len(lengths) == len(file.pieces) and path.is_file() and path.stat().st_size == _size(file, lengths)


def _size(file: PlannedFile, lengths: Sequence[int]) -> int:
    return len(file.head) + sum(lengths)


def _part(destination: Path, file: PlannedFile) -> Path:
    return destination / f"{file.name}.part"


def _remaining(destination: Path, files: Sequence[PlannedFile], journal: Journal) -> list[Piece]:
    return [piece for file in files for piece in file.pieces[len(_recorded(destination, file, journal)) :]]


def _write_files(destination: Path, files: Sequence[PlannedFile], target: Format, journal: Journal) -> None:
    progress = Progress("written")
    with progress.over(sum(piece.num_bytes for piece in _remaining(destination, files, journal))):
        for file in files:
            if not _is_complete(destination, file, journal):
                _write_file(destination, file, target, journal, progress)
    last = target.index_file(files, journal.lengths)
    if last is not None:
        write_synced(destination / last[0], last[1])


def _write_file(destination: Path, file: PlannedFile, target: Format, journal: Journal, progress: Progress) -> None:
    part = _part(destination, file)
    lengths = list(_recorded(destination, file, journal))
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.ftruncate(descriptor, _size(file, lengths) if lengths else 0)
        os.lseek(descriptor, 0, os.SEEK_END)
        if not lengths:
            _write_all(descriptor, memoryview(file.head))
        unrecorded = 0
        for piece in file.pieces[len(lengths) :]:
            data = target.encode(piece.read())
            _write_all(descriptor, data)
            lengths.append(len(data))
            progress.advance(piece.num_bytes)
            unrecorded += len(data)
            if unrecorded >= _BYTES_BETWEEN_RECORDS:
                os.fsync(descriptor)
                journal.record(file.name, lengths)
                unrecorded = 0
        os.fsync(descriptor)
        journal.record(file.name, lengths)
    finally:
        os.close(descriptor)
    rename_synced(part, destination / file.name)


def _write_all(descriptor: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.write(descriptor, data[done:])


def _check_room(destination: Path, remaining: Sequence[Piece]) -> None:
    needed = sum(piece.num_bytes + _OVERHEAD_OF_A_PIECE for piece in remaining)
    free = _free_bytes(destination)
    if needed > free:
        raise CheckpointError(
            f"{needed:,} bytes are to be written to {destination} and {free:,} are free: make room or name "
            "another folder"
        )


def _stopped(error: OSError, destination: Path, remaining: Sequence[Piece]) -> CheckpointError:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return CheckpointError(f"cannot convert to {destination}: {error.filename or 'its files'}: {error.strerror}")
    num_bytes = sum(piece.num_bytes for piece in remaining)
    return CheckpointError(
        f"cannot write {destination}: {error.strerror}; {num_bytes:,} bytes are still to be written and "
        f"{_free_bytes(destination):,} are free: make room and run the same again, which goes on from there"
    )


def _free_bytes(destination: Path) -> int:
    parents = destination.resolve().parents
    return shutil.disk_usage(next(path for path in (destination, *parents) if path.is_dir())).free
