"""Makes the tokenizer of a GGUF file into files, as transformers reads it: `gguf_tokenizer FILE FOLDER`.

A program of its own, so that whoever reads the checkpoint needs no transformers.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoTokenizer
from transformers.utils import logging


def main(file: Path, folder: Path) -> None:
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(
        file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False
    )
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
