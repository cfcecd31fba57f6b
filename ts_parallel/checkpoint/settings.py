"""Where a model's configuration and tokenizer are: with its weights, or beside the folder that a job wrote them to."""

from __future__ import annotations

from pathlib import Path

from ts_parallel.checkpoint.formats.dcp import METADATA
from ts_parallel.errors import CheckpointError

CONFIG_FILE = "config.json"
_OF_VERL = "huggingface"  # folder that it writes configuration and tokenizer to, beside each rank's weights


def settings_folder(folder: Path, named: Path | None = None) -> Path:
    """The one that holds `config.json`: `named` where it is given; else `folder`, its `huggingface/` where a job of
    verl left it there, or for a torch.distributed.checkpoint the one that `folder` lies in.

    Raises:
        CheckpointError: there is none.
    """
    if named is not None:
        folder = named
    if (folder / CONFIG_FILE).is_file():
        return folder
    if (folder / _OF_VERL / CONFIG_FILE).is_file():
        return folder / _OF_VERL
    if not (folder / METADATA).is_file():
        for own in files_of_authors(folder)[:1]:
            raise CheckpointError(
                f"no {CONFIG_FILE} in {folder}, whose {own.name} has its authors' names: copy that of the model in "
                "transformers' format, or name its folder with --config"
            )
        raise CheckpointError(f"no {CONFIG_FILE} in {folder}")
    above = folder.resolve().parent
    if (above / CONFIG_FILE).is_file():
        return above
    raise CheckpointError(
        f"no {CONFIG_FILE} in {folder} nor in {above}: torch.distributed.checkpoint saves none, copy the model's own "
        "and its tokenizer's files to either, or name their folder with --config (handler key config_path)"
    )


def files_of_authors(folder: Path) -> list[Path]:
    """Weights under the names of a model's authors (Meta's, Mistral's), who have no `config.json`."""
    return sorted([*folder.glob("consolidated*.safetensors"), *folder.glob("consolidated*.pth")])
