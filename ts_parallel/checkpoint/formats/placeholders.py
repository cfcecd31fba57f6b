"""Files that stand where another one should be: a pointer of git-lfs, or nothing at all. Knows no format of weights.

A clone without git-lfs leaves a text of three lines in place of each large file (https://git-lfs.com, "pointer file");
a copy that was broken off leaves an empty one. Read as what their names say they would be a riddle.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ts_parallel.errors import CheckpointError

_POINTER = re.compile(rb"version https?://\S+/spec/v\d+\s")
_SIZE = re.compile(rb"^size (\d+)$", re.MULTILINE)
_LONGEST_POINTER = 1024  # bytes; git-lfs's own limit
# What a configuration or a tokenizer is made of.
_COMPANIONS = ("*.json", "*.model", "*.jinja", "*.spm", "*.txt")
_MAY_BE_EMPTY = (".txt", ".jinja")


def refuse_placeholder(file: Path) -> None:
    """
    Raises:
        CheckpointError: the file is a pointer of git-lfs, or empty.
    """
    state = file.stat()
    if state.st_size == 0:
        raise CheckpointError(f"{file} is empty (0 bytes): it was not written or copied to its end, fetch it again")
    refuse_pointer(file)


def refuse_pointer(file: Path) -> None:
    """
    Raises:
        CheckpointError: the file is a pointer of git-lfs.
    """
    if not 0 < file.stat().st_size <= _LONGEST_POINTER:
        return
    content = file.read_bytes()
    if _POINTER.match(content) is None:
        return
    size = _SIZE.search(content)
    bytes_there = f" of {int(size[1]):,} bytes" if size is not None else ""
    raise CheckpointError(
        f"{file} is a git-lfs pointer to a file{bytes_there}, not the file itself: run `git lfs pull` in its clone "
        "(made without git-lfs, or with GIT_LFS_SKIP_SMUDGE), or fetch it with `hf download`"
    )


def refuse_placeholders(folder: Path, files: Iterable[Path] | None = None) -> None:
    """Look through `files`, or through all that `folder` has beside weights.

    Raises:
        CheckpointError: one of them is a pointer of git-lfs, or empty where that says nothing.
    """
    found = files if files is not None else {file for pattern in _COMPANIONS for file in folder.glob(pattern)}
    for file in sorted(found):
        if not file.is_file():
            continue
        if file.suffix in _MAY_BE_EMPTY:
            refuse_pointer(file)
        else:
            refuse_placeholder(file)
