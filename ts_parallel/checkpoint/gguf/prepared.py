"""A folder as transformers wants it, in place of a GGUF file: configuration and tokenizer as files, and a link to it.

Made once, in the user's cache, by whoever needs it first. The tokenizer is transformers' to make, in a process of its
own: this room does not know it, and ranks need no such memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from ts_parallel.checkpoint.gguf.header import MAGIC, read_header
from ts_parallel.checkpoint.gguf.settings import config_of
from ts_parallel.checkpoint.settings import CONFIG_FILE
from ts_parallel.errors import CheckpointError

LINK = "model.gguf"
_CACHE_VARIABLE = "TS_PARALLEL_CACHE"
_TOKENIZER_MAKER = "ts_parallel.partition.gguf_tokenizer"


def gguf_folder(path: Path) -> Path:
    """`path` itself, or where it is a GGUF file, or a folder with one and no configuration, the folder that it stands
    for.

    Raises:
        CheckpointError: the file is none that is read here, or the folder holds several.
    """
    if is_gguf(path):
        return folder_of_gguf(path)
    if path.is_dir() and not (path / CONFIG_FILE).is_file() and not any(path.glob("*.safetensors")):
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise CheckpointError(f"{path} holds {', '.join(file.name for file in files)}: name one, as {files[0]}")
        if files:
            return folder_of_gguf(files[0])
    return path


def is_gguf_folder(folder: Path) -> bool:
    """Whether its weights are those of a GGUF file."""
    others = any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin"))
    return not others and any(folder.glob("*.gguf"))


def is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def folder_of_gguf(file: Path) -> Path:
    """
    Raises:
        CheckpointError: the file is none that is read here, or no folder can be made of it.
    """
    file = file.resolve()
    home = _cache() / f"gguf-{_digest(file)}"
    if home.is_dir():
        return home
    config, generation = config_of(read_header(file))
    try:
        home.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f"{home.name}.", dir=home.parent))
        try:
            (part / "config.json").write_text(json.dumps(config, indent=2))
            if generation:
                (part / "generation_config.json").write_text(json.dumps(generation, indent=2))
            _make_tokenizer(file, part)
            (part / LINK).symlink_to(file)
            part.rename(home)
        except OSError:
            if not home.is_dir():  # another process was first
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"cannot write {home}, which {file} needs for its tokenizer: {error.strerror}") from None
    return home


def _make_tokenizer(file: Path, folder: Path) -> None:
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    command = [sys.executable, "-P", "-m", _TOKENIZER_MAKER, str(file), str(folder)]
    made = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    if made.returncode:
        last = (made.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise CheckpointError(f"{file} has no tokenizer that transformers can read: {last}")


def _cache() -> Path:
    named = os.environ.get(_CACHE_VARIABLE)
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ts_parallel"


def _digest(file: Path) -> str:
    state = file.stat()
    digest = hashlib.sha256(repr((str(file), state.st_size, state.st_mtime_ns, version("transformers"))).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:24]
