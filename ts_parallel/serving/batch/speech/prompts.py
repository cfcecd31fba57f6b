"""Whisper's first tokens of an answer, as its own `generate` makes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig, PretrainedConfig
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from ts_parallel.errors import RequestError
from ts_parallel.serving.batch.greedy import DETECT


class SpeechPrompts:
    """Language, task, and whether there are timestamps, as tokens."""

    def __init__(self, generation: GenerationConfig, config: PretrainedConfig) -> None:
        self._own = generation
        self._languages: Mapping[str, int] = getattr(generation, "lang_to_id", None) or {}
        self._tasks: Mapping[str, int] = getattr(generation, "task_to_id", None) or {}
        self._names = {token: word.strip("<|>") for word, token in self._languages.items()}
        self._untimed: int | None = getattr(generation, "no_timestamps_token_id", None)
        forced = getattr(generation, "forced_decoder_ids", None) or getattr(config, "forced_decoder_ids", None)
        self._forced = dict(forced or [])
        self.is_timed = getattr(generation, "return_timestamps", None) is True
        """Whether answers have timestamps where a request says nothing of them."""
        self.can_be_timed = self._untimed is not None and isinstance(generation.eos_token_id, int)

    def of(self, fields: Mapping[str, Any], is_timed: bool = False) -> list[int]:
        """With `DETECT` in place of a language that is to be found out.

        Raises:
            RequestError: the language or the task is none of the model's.
        """
        language = fields.get("language", getattr(self._own, "language", None))
        task = fields.get("task", getattr(self._own, "task", None))
        tokens: list[int | None] = [self._own.decoder_start_token_id]
        if language is None and task is None:
            while len(tokens) in self._forced:
                tokens.append(self._forced[len(tokens)])
        if language is not None:
            tokens.append(self._language(language))
        elif self._languages and tokens[1:2] in ([], [None]):
            tokens[1:2] = [DETECT]
        if task is not None:
            tokens.append(self._task(task))
        elif language is not None and "transcribe" in self._tasks:
            tokens.append(self._tasks["transcribe"])
        if is_timed and tokens[-1] == self._untimed:
            tokens.pop()
        elif not is_timed and self._untimed is not None and tokens[-1] != self._untimed:
            tokens.append(self._untimed)
        return [token for token in tokens if token is not None]

    def language_of(self, tokens: list[int]) -> str | None:
        """The name of the first language among an answer's tokens, as OpenAI's answers have it."""
        code = next((self._names[token] for token in tokens if token in self._names), None)
        if code is None and getattr(self._own, "is_multilingual", None) is False:
            code = "en"
        name: str | None = LANGUAGES.get(code or "", code)
        return name

    def task_of(self, tokens: list[int]) -> str:
        return "translate" if self._tasks.get("translate") in tokens else "transcribe"

    def _language(self, name: Any) -> int:
        text = str(name).lower()
        known = (text, f"<|{text}|>", f"<|{TO_LANGUAGE_CODE.get(text)}|>")
        token = next((self._languages[word] for word in known if word in self._languages), None)
        if token is None:
            names = sorted(self._names.values())
            raise RequestError(f"'language' must be one of {names}, got {name!r}", "language")
        return token

    def _task(self, name: Any) -> int:
        if not isinstance(name, str) or name not in self._tasks:
            raise RequestError(f"'task' must be one of {sorted(self._tasks)}, got {name!r}", "task")
        return self._tasks[name]
