"""Tokenizers as chat models have them: bytes, the markers of a family as added tokens, and a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EOS = "<|eos|>"


def chat_tokenizer(
    special: Sequence[str] = (), added: Sequence[str] = (), template: str | None = None, **settings: Any
) -> Any:
    """A token for each byte; `special` ones show in no text, `added` ones do."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = Tokenizer(models.BPE({letter: at for at, letter in enumerate(letters)}, []))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    own.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (EOS, *special)])
    own.add_tokens([AddedToken(name, special=False, normalized=False) for name in added])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, eos_token=EOS, **settings)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids
