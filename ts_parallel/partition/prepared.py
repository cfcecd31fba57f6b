"""A rank's program from a file, made there first by a process of its own where it is missing.

Making one takes transformers, the tracer and a few seconds. A process that makes it and ends keeps their memory out of
the ranks, the ranks of one host make it once, and the next start reads what an earlier one has left.
The file's name is a digest of all that the program depends on, so nothing in the cache can be out of date.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from ts_parallel.checkpoint.index import CheckpointIndex
from ts_parallel.errors import PlanError, StartupError
from ts_parallel.partition.program import ProgramRequest, RankProgram

CACHE_VARIABLE = "TS_PARALLEL_CACHE"
_MOST_FILES = 200
_LIBRARIES = ("torch", "transformers")


def prepare_program(request: ProgramRequest, index: CheckpointIndex) -> RankProgram:
    """The program that is asked for; `index` is that of its folder.

    Raises:
        CheckpointError, ConfigError, PlanError: as `build.make_programs` does.
    """
    with _cache_folder() as cache:
        digest = _digest(request, index)
        file = file_of_rank(cache / digest, request.rank, request.place.rank)
        if not file.is_file():
            with _locked(cache / f"{digest}.lock"):
                if not file.is_file():  # another rank may have made it meanwhile
                    _make(request, cache / digest, file)
                    _forget_oldest(cache)
        with file.open("rb") as stream:
            program: RankProgram = pickle.load(stream)
    return program


def store_programs(
    request: ProgramRequest, index: CheckpointIndex, programs: Mapping[tuple[int, int], RankProgram]
) -> None:
    """Keep the programs of all ranks for later starts."""
    with _cache_folder() as cache:
        write_programs(cache / _digest(request, index), programs)


def write_programs(stem: Path, programs: Mapping[tuple[int, int], RankProgram]) -> None:
    """One file a rank, which other processes see whole or not at all."""
    for (rank, place), program in programs.items():
        file = file_of_rank(stem, rank, place)
        part = file.with_name(f"{file.name}.{os.getpid()}.part")
        part.write_bytes(pickle.dumps(program))
        part.replace(file)


def file_of_rank(stem: Path, rank: int, place: int) -> Path:
    return stem.with_name(f"{stem.name}-{rank}-{place}")


@contextmanager
def _cache_folder() -> Iterator[Path]:
    """The user's own folder of programs, or one for this time alone where none can be had."""
    base = os.environ.get(CACHE_VARIABLE) or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ts_parallel"
    )
    try:
        # The files are pickles: nobody else may write here.
        Path(base).mkdir(mode=0o700, parents=True, exist_ok=True)
        with TemporaryDirectory(dir=base):
            pass
        if Path(base).stat().st_uid != os.getuid():
            raise PermissionError(base)
    except OSError:
        with TemporaryDirectory(prefix="tsp-programs-") as folder:
            yield Path(folder)
        return
    yield Path(base)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # ends with the process, whatever ends it
        yield


def _digest(request: ProgramRequest, index: CheckpointIndex) -> str:
    """Of all that the programs of the ranks depend on."""
    digest = hashlib.sha256()
    shared = replace(request, folder=Path(), rank=0, place=replace(request.place, rank=0))
    tensors = sorted((stored.name, str(stored.dtype), stored.shape) for stored in index.values())
    versions = [version(library) for library in _LIBRARIES]
    digest.update(repr((shared, tensors, versions, sys.version_info)).encode())
    settings = [request.folder / "config.json", request.folder / "modules.json", *request.folder.glob("*/config.json")]
    for file in sorted(path for path in settings if path.is_file()):
        digest.update(f"{file.relative_to(request.folder)}".encode() + file.read_bytes())
    package = Path(__file__).parents[1]
    for folder in ("checkpoint", "partition"):
        for file in sorted((package / folder).glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def _make(request: ProgramRequest, stem: Path, file: Path) -> None:
    """Let a process of its own write the programs of all ranks, `file` among them."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    result = subprocess.run(
        [sys.executable, "-m", "ts_parallel.partition.make_programs", str(stem)],
        input=pickle.dumps(request),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if file.is_file():
        return
    refused = pickle.loads(result.stdout) if result.returncode == 1 and result.stdout else None
    if isinstance(refused, StartupError):
        raise refused
    raise PlanError(f"the model could not be traced: the process that traces it ended with status {result.returncode}")


def _forget_oldest(cache: Path) -> None:
    files = sorted((path for path in cache.iterdir() if path.is_file()), key=lambda path: path.stat().st_mtime)
    for file in files[: -_MOST_FILES or None]:
        file.unlink(missing_ok=True)
