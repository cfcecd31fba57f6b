"""A rank's program from a file, made there first by a process of its own where it is missing.

Making one takes transformers, the tracer and a few seconds. A process that makes it and ends keeps their memory out of
the ranks, the ranks of one host make it once, and the next start reads what an earlier one has left. The file's name is
a digest of what the program depends on: the model's configuration, the checkpoint's tensors, the shape of the
deployment, this package's code and the libraries' versions. Where no folder can be had to keep it, each rank makes it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import pickle
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ts_parallel.checkpoint.index import CheckpointIndex
from ts_parallel.checkpoint.quantized import refuse_quantized
from ts_parallel.checkpoint.settings import CONFIG_FILE, settings_folder
from ts_parallel.errors import PlanError, StartupError
from ts_parallel.partition.model.sentence_modules import sentence_folder
from ts_parallel.partition.program import ProgramRequest, RankProgram

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "TS_PARALLEL_CACHE"
_MOST_FILES = 200
_LIBRARIES = ("torch", "transformers")
_TIES = "tie_word_embeddings"
_SETTINGS = ("config*.json", "modules.json", "[0-9]_*/config.json", "preprocessor_config.json", "processor_config.json")

Pickles = Mapping[tuple[int, int], bytes]
"""Tensor-parallel rank and pipeline rank → its pickled program."""


def prepare_program(
    request: ProgramRequest, index: CheckpointIndex, on_making: Callable[[], None] = lambda: None
) -> RankProgram:
    """The program that is asked for; `index` is that of its folder. Where no file has it, `on_making` is told first.

    Raises:
        CheckpointError, ConfigError, PlanError: as `build.make_programs` does.
    """
    refuse_quantized(request.folder, request.settings)
    own = request.rank, request.place.rank
    cache, problem = find_cache()
    if problem:
        logger.warning("the model's trace is not kept: %s", problem)
    if cache is None:
        on_making()
        return _unpickle(_make(request)[own])
    stem = cache / _digest(request, index)
    program = _read(stem, own)
    if program is None:
        with _locked(stem.with_suffix(".lock")):
            program = _read(stem, own)  # another rank may have made it meanwhile
            if program is None:
                on_making()
                pickles = _make(request)
                _keep(stem, pickles)
                program = _unpickle(pickles[own])
    return program


def _keep(stem: Path, pickles: Pickles) -> None:
    """One file a rank, which other processes see whole or not at all. A full disk loses no more than the next start's
    time."""
    try:
        for own, content in pickles.items():
            part = stem.with_name(f"{_file_of(stem, own).name}.{os.getpid()}.part")
            try:
                part.write_bytes(content)
                part.replace(_file_of(stem, own))
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("cannot keep the model's trace for the next start: %s", error)
    _forget_oldest(stem)


def _read(stem: Path, own: tuple[int, int]) -> RankProgram | None:
    """None where there is none, or what a crash has left of one."""
    file = _file_of(stem, own)
    try:
        program = _unpickle(file.read_bytes())
        os.utime(file)  # those that are used are the last to be forgotten
    except FileNotFoundError:
        return None
    except Exception:  # a torn pickle raises whatever its bytes happen to say
        logger.warning("%s cannot be read and is made again", file)
        return None
    return program


def _unpickle(content: bytes) -> RankProgram:
    program = pickle.loads(content)
    assert isinstance(program, RankProgram)
    return program


def _file_of(stem: Path, own: tuple[int, int]) -> Path:
    rank, place = own
    return stem.with_name(f"{stem.name}-{rank}-{place}")


def find_cache() -> tuple[Path | None, str]:
    """The user's own folder of programs; where none can be had, None and why."""
    base = Path(os.environ.get(CACHE_VARIABLE) or os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = base if os.environ.get(CACHE_VARIABLE) else base / "ts_parallel"
    problem = "this user has no home folder" if base.parts[:1] == ("~",) else _why_not_ours(folder)
    return None if problem else folder, problem


def _why_not_ours(folder: Path) -> str:
    """Why it is not so that this user, and nobody else, may write there; empty where it is. Its files are pickles, and
    what they say is done."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
        with TemporaryDirectory(dir=folder):
            pass
    except OSError as error:
        return str(error)
    if state.st_uid != os.getuid() or state.st_mode & 0o022:
        return f"others may write to {folder}"
    return ""


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # ends with the process, whatever ends it
        yield


def _digest(request: ProgramRequest, index: CheckpointIndex) -> str:
    digest = hashlib.sha256()
    shared = replace(request, folder=Path(), settings=None, rank=0, place=replace(request.place, rank=0))
    tensors = sorted((stored.name, str(stored.dtype), stored.shape) for stored in index.values())
    versions = [version(library) for library in _LIBRARIES]
    digest.update(repr((shared, tensors, versions, sys.version_info)).encode())
    home = request.settings or settings_folder(request.folder)
    if _may_tie(home):
        digest.update(repr(_states_of_ties(index)).encode())
    find = home.rglob if home == request.folder else home.glob  # another may hold all of a job's checkpoints
    above = sentence_folder(home)
    settings = {file for pattern in _SETTINGS for file in (*find(pattern), *above.glob(pattern)) if file.is_file()}
    for file in sorted(settings):
        digest.update(os.path.relpath(file, home).encode() + file.read_bytes())
    package = Path(__file__).parents[1]
    for room in ("checkpoint", "partition"):
        for file in sorted((package / room).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def _may_tie(home: Path) -> bool:
    """Whether the configuration ties anything, as it does where it says nothing."""
    try:
        content = json.loads((home / CONFIG_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return True
    own = content.get(_TIES, True) if isinstance(content, dict) else True
    parts = content.values() if isinstance(content, dict) else ()
    return bool(own) or any(part.get(_TIES) for part in parts if isinstance(part, dict))


def _states_of_ties(index: CheckpointIndex) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files of tensors that may be tied: what they hold decides whether they are.

    Such are embeddings and heads, which no layer has, and which are of one shape; and biases of heads.
    """
    by_shape: dict[tuple[int, ...], list[Path]] = defaultdict(list)
    for name, stored in index.items():
        if not any(word.isdecimal() for word in name.split(".")):
            by_shape[stored.shape].append(stored.file)
    tables = {shape for shape in by_shape if len(shape) == 2 and shape[0] != shape[1]}
    biases = {shape[:1] for shape in tables}
    files = {
        file for shape, own in by_shape.items() if len(own) > 1 and (shape in tables or shape in biases) for file in own
    }
    states = [(file, file.stat()) for file in sorted(files)]
    return [(file.name, state.st_size, state.st_mtime_ns) for file, state in states]


def _make(request: ProgramRequest) -> Pickles:
    """Let a process of its own make the programs of all ranks.

    Its answer comes through a pipe of its own, for anything may print to its standard output.
    """
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    read_end, write_end = os.pipe()
    # -P: a file of the working directory is no module of ours, whatever it is called.
    command = [sys.executable, "-P", "-m", "ts_parallel.partition.make_programs", str(write_end)]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with os.fdopen(read_end, "rb") as answer:
        try:
            maker = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[write_end], env=environment)
        finally:
            os.close(write_end)
        with maker:
            try:
                assert maker.stdin is not None
                with suppress(BrokenPipeError), maker.stdin as stream:  # its status says more
                    stream.write(pickle.dumps(request))
                content = answer.read()
            except BaseException:
                maker.kill()
                raise
    made: Any = pickle.loads(content) if content and maker.returncode == 0 else None
    if isinstance(made, StartupError):
        raise made
    if made is None:
        raise PlanError(f"the process that traces the model ended with status {maker.returncode}")
    pickles: Pickles = made
    return pickles


def _forget_oldest(stem: Path) -> None:
    """Keep the latest files, and those of `stem` in any case."""
    with os.scandir(stem.parent) as entries:
        others = [entry for entry in entries if not entry.name.startswith(stem.name)]
    ages = []
    for entry in others:
        with suppress(FileNotFoundError):  # by another process that does the same
            if entry.is_file():
                ages.append((entry.stat().st_mtime, entry.path))
    for _, path in sorted(ages)[: -_MOST_FILES or None]:
        Path(path).unlink(missing_ok=True)
