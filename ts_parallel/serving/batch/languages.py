"""Languages of models that translate (NLLB, M2M-100, mBART): which there are, what they change in text and answer.

Their tokenizers put the language of a text beside its tokens. The answer's language is its first token; a model whose
decoder starts with a language (mBART of 25) starts with that one instead.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from typing import Any

from ts_parallel.errors import RequestError
from ts_parallel.serving.batch.greedy import NO_TOKEN
from ts_parallel.serving.exchange import echo

SOURCE, TARGET = ("src_lang", "source_lang"), ("tgt_lang", "target_lang")
FIELDS = (*SOURCE, *TARGET)
_NAME = re.compile(r"[a-z]{2,3}_[A-Z][A-Za-z]{1,3}")  # `eng_Latn`, `en_XX`


class Languages:
    """Owns the tokenizer of a model that translates. Called from several threads at once."""

    def __init__(self, tokenizer: Any, start: int, num_tokens: int) -> None:
        """
        Args:
            start: the token that the decoder starts with.
            num_tokens: of the model's vocabulary.
        """
        self._tokenizer = tokenizer
        self._ids = _ids_of(tokenizer, num_tokens)
        self._start = start
        self._own = getattr(tokenizer, "src_lang", None)
        self._speaks = threading.Lock()

    def encode(self, text: str, fields: Mapping[str, Any]) -> list[int]:
        """A text's token ids, in the language that the request says, else the folder's own.

        Raises:
            RequestError: there is no such language.
        """
        language = self._language(fields, SOURCE)
        if language is None and not self._ids:
            ids: list[int] = self._tokenizer(text)["input_ids"]
            return ids
        with self._speaks:  # what a tokenizer puts beside a text is changed for all who use it
            wanted = language or self._own
            if self._tokenizer.src_lang != wanted:
                self._tokenizer.src_lang = wanted
            ids = self._tokenizer(text)["input_ids"]
        return ids

    def begin(self, fields: Mapping[str, Any], prompt: list[int]) -> tuple[list[int], int]:
        """The decoder's first tokens, and the one that the answer is to begin with; `NO_TOKEN` where that is open.

        Raises:
            RequestError: there is no such language.
        """
        language = self._language(fields, TARGET)
        if language is None:
            return prompt, NO_TOKEN
        token = self._ids[language]
        if self._start in self._ids.values():
            return [token, *prompt[1:]], NO_TOKEN
        return prompt, token

    def _language(self, fields: Mapping[str, Any], names: tuple[str, str]) -> str | None:
        given = [name for name in names if name in fields]
        if not given:
            return None
        name, value = given[0], fields[given[0]]
        if len(given) > 1 and fields[given[1]] != value:
            raise RequestError(f"{given[0]!r} and {given[1]!r} say different languages", name)
        if not self._ids:
            raise RequestError(f"{name!r}: the model's tokenizer knows no languages", name)
        if not isinstance(value, str) or value not in self._ids:
            raise RequestError(f"{name!r} must be one of {sorted(self._ids)}, got {echo(value)}", name)
        return value


def _ids_of(tokenizer: Any, num_tokens: int) -> dict[str, int]:
    """Language → its token, of those that the model has; empty where the tokenizer knows none."""
    if not hasattr(tokenizer, "src_lang"):
        return {}
    named: Mapping[str, int] | None = getattr(tokenizer, "lang_code_to_id", None)
    if named is None:
        named = {name: token for name, token in tokenizer.get_added_vocab().items() if _NAME.fullmatch(name)}
    return {name: token for name, token in named.items() if token != tokenizer.unk_token_id and token < num_tokens}
