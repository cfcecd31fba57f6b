"""Speech that is written down frame by frame (wav2vec2, HuBERT and their kin): greedy text, as transformers' pipeline.

Each frame of a sound has a token; those that repeat one another are one, and those that say nothing fall out. Sounds of
unlike lengths are never filled up to one length: the models take the mean and spread of a whole sound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ts_parallel.errors import CheckpointError, RequestError
from ts_parallel.partition.model.encoder import SOUND, ModelCall
from ts_parallel.serving.batch.jobs import Body, Done, Work, choice, known_names
from ts_parallel.serving.batch.speech.audio import SAMPLE_RATE
from ts_parallel.serving.batch.speech.requests import TRANSCRIPTIONS, form_value, is_sound, read_extractor, samples_of
from ts_parallel.serving.exchange import TEXT, RawRequest, echo
from ts_parallel.serving.text.model_files import read_tokenizer

_FORMATS = ("json", "text")
_SOUNDS = ("file", "audio")
_TIMES = "return_timestamps"
FIELDS = (*_SOUNDS, "response_format", _TIMES, "model", "temperature", "stream", "user")
ROUTES: Mapping[str, Sequence[str]] = {TRANSCRIPTIONS: FIELDS}


class CtcApi:
    """A sound file's bytes, a form with one, or samples → its text."""

    def __init__(self, folder: Path, call: ModelCall, frame: int, most_seconds: float) -> None:
        """
        Args:
            frame: so many samples a token stands for.

        Raises:
            CheckpointError: the folder has no tokenizer or no feature extractor that can be used.
        """
        self._tokenizer = read_tokenizer(folder)
        self._extractor = read_extractor(folder)
        if self._extractor is None:
            raise CheckpointError(f"{folder} has no preprocessor_config.json, which says how the model hears")
        self._dtype = call.inputs[SOUND].dtype
        self._least = call.least["S"]
        self._seconds_of_frame = frame / SAMPLE_RATE
        self._most_seconds = min(most_seconds, call.limits["S"] / SAMPLE_RATE)

    def open(self, item: RawRequest) -> Work:
        """
        Raises:
            RequestError: the body has a field that is unknown or out of its limits.
        """
        fields = self._fields_of(item)
        form = choice(fields, "response_format", _FORMATS)
        times = choice(fields, _TIMES, (None, "char", "word"))

        def finish(done: Any) -> Any:
            return self._written(done[0], form, times, has_usage=bool(item.route))

        return Work([lambda: self._inputs(fields)], finish)

    def preprocess(self, item: RawRequest) -> dict[str, torch.Tensor]:
        """
        Raises:
            RequestError: the body has no speech, one that is too long, or a field that is unknown.
        """
        return self._inputs(self._fields_of(item))

    def answer(self, output: torch.Tensor) -> dict[str, Any]:
        return {"text": self._decode(output)}

    def _inputs(self, fields: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        samples = samples_of(fields, self._most_seconds)
        if len(samples) < self._least:
            raise RequestError(f"the audio has {len(samples)} samples, the model needs at least {self._least}", "audio")
        made = self._extractor(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        return {SOUND: made[SOUND][0].to(self._dtype)}

    def _written(self, done: Done, form: str, times: str | None, has_usage: bool) -> Any:
        text = self._decode(done.output)
        if form == "text":
            return Body(text + "\n", TEXT)
        seconds = math.ceil(len(done.inputs[SOUND]) / SAMPLE_RATE)
        usage = {"usage": {"type": "duration", "seconds": seconds}} if has_usage else {}
        return {"text": text, **({} if times is None else {"chunks": self._chunks(done.output, times)}), **usage}

    def _decode(self, output: torch.Tensor) -> str:
        text: str = self._tokenizer.decode(output, skip_special_tokens=False)
        return text

    def _chunks(self, output: torch.Tensor, kind: str) -> list[dict[str, Any]]:
        """Each letter or word, and from when to when it is heard."""
        tokenizer = self._tokenizer
        if not hasattr(tokenizer, "_get_word_offsets"):
            raise RequestError(f"{type(tokenizer).__name__} of the model's folder tells no times", _TIMES)
        found = tokenizer.decode(output, skip_special_tokens=False, output_char_offsets=True, output_word_offsets=True)
        return [
            {
                "text": own[kind],
                "timestamp": [own[name] * self._seconds_of_frame for name in ("start_offset", "end_offset")],
            }
            for own in found[f"{kind}_offsets"]
        ]

    def _fields_of(self, item: RawRequest) -> dict[str, Any]:
        """The body's fields, of whichever of its three kinds it is."""
        if isinstance(item.body, (bytes, bytearray)) and is_sound(bytes(item.body[:64]), item.content_type):
            return {"file": bytes(item.body)}
        fields = item.fields()
        if "multipart/" in item.content_type:
            fields = {name: form_value(name, value) for name, value in fields.items()}
        fields = known_names({name: value for name, value in fields.items() if value is not None}, FIELDS)
        for name, only in (("temperature", (0,)), ("stream", (False, "false", ""))):
            if fields.get(name, only[0]) not in only:
                raise RequestError(f"{name!r} can only be {only[0]!r}, got {echo(fields[name])}", name)
        given = [name for name in _SOUNDS if name in fields]
        if len(given) != 1:
            raise RequestError(f"the body must have one of {list(_SOUNDS)}, got {given or 'none'}", "file")
        return fields
