"""What serving reads of a checkpoint folder beside its weights. Nothing is fetched, no code of it runs."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig

from ts_parallel.checkpoint.formats.placeholders import refuse_placeholders
from ts_parallel.checkpoint.settings import settings_folder
from ts_parallel.engine.vocabulary import Vocabulary
from ts_parallel.errors import CheckpointError

_SENTENCEPIECE = ("*.model", "*.spm")


@dataclass(frozen=True)
class SamplingDefaults:
    """What a request leaves open, as the model's generation_config.json has it."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0


def read_tokenizer(folder: Path) -> Any:
    """
    Raises:
        CheckpointError: the folder has none that can be used, or one that a library is missing for.
    """
    folder = settings_folder(folder)
    refuse_placeholders(folder)
    _refuse_without_sentencepiece(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"no usable tokenizer in {folder}: {str(error).splitlines()[0]}") from None
    names = sorted(tokenizer.vocab_files_names.values())
    if names and not any((folder / name).is_file() for name in names):
        # transformers makes a tokenizer with an empty vocabulary then.
        raise CheckpointError(f"no usable tokenizer in {folder}: it has none of {names}")
    return tokenizer


def _refuse_without_sentencepiece(folder: Path) -> None:
    """transformers would ask for another library, or make a tokenizer with an empty vocabulary."""
    if (folder / "tokenizer.json").is_file():
        return
    models = [file for pattern in _SENTENCEPIECE for file in sorted(folder.glob(pattern)) if _is_sentencepiece(file)]
    missing = [name for name in ("sentencepiece", "google.protobuf") if not _is_installed(name)]
    if models and missing:
        names = " and ".join(name.removeprefix("google.") for name in missing)
        raise CheckpointError(
            f"{models[0]} is a SentencePiece model, which needs {names}: pip install 'ts-parallel[sentencepiece]', or "
            "let the tokenizer be saved with a tokenizer.json"
        )


def _is_sentencepiece(file: Path) -> bool:
    """Whether it begins with a message of protobuf; tiktoken's files of that name are text."""
    with file.open("rb") as stream:
        return stream.read(1) == b"\n"


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # of its parent
        return False


def read_eos_ids(folder: Path, model_config: PretrainedConfig, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: those of config.json, of generation_config.json and the tokenizer's own, for
    checkpoints name in one what they leave out in another. One that the model has not ends none."""
    folder = settings_folder(folder)
    text_config = model_config.get_text_config()
    named: list[int | list[int] | None] = [text_config.eos_token_id, getattr(tokenizer, "eos_token_id", None)]
    if (folder / "generation_config.json").is_file():
        named.append(GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id)
    eos_ids = [token_id for own in named for token_id in ([own] if isinstance(own, int) else own or [])]
    return frozenset(token_id for token_id in eos_ids if 0 <= token_id < text_config.vocab_size)


def vocabulary_of(model_config: PretrainedConfig, tokenizer: Any) -> Vocabulary:
    """What the model has embeddings and logits for; the tokenizer may know more tokens, or fewer."""

    def name_of(token_id: int) -> str | None:
        name: str | None = tokenizer.convert_ids_to_tokens(token_id) if 0 <= token_id < len(tokenizer) else None
        return name

    return Vocabulary(model_config.get_text_config().vocab_size, name_of)


def read_sampling_defaults(folder: Path) -> SamplingDefaults:
    """What generation_config.json says of sampling; what it leaves open keeps OpenAI's defaults."""
    folder = settings_folder(folder)
    if not (folder / "generation_config.json").is_file():
        return SamplingDefaults()
    config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    named = {name: getattr(config, name, None) for name in SamplingDefaults.__dataclass_fields__}
    return SamplingDefaults(**{name: value for name, value in named.items() if value is not None})
