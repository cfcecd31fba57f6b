"""Transcripts as OpenAI's API writes them: `json`, `text`, `verbose_json`, `srt`, `vtt`."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ts_parallel.serving.batch.jobs import Body
from ts_parallel.serving.batch.speech.recordings import Segment, Transcript
from ts_parallel.serving.exchange import TEXT

FORMATS = ("json", "text", "verbose_json", "srt", "vtt")
TIMED_FORMATS = ("verbose_json", "srt", "vtt")
_VTT = "text/vtt; charset=utf-8"


@dataclass(frozen=True)
class Writer:
    """Makes texts of tokens. `decode` leaves special tokens and timestamps out."""

    decode: Callable[[list[int]], str]

    def write(self, transcript: Transcript, form: str, task: str, language: str | None, seconds: float) -> Any:
        """What the answer is, in one of `FORMATS`."""
        text = self.decode(transcript.tokens)
        if form == "text":
            return Body(text + "\n", TEXT)
        if form == "srt":
            return Body("".join(self._cues(transcript, ",", is_numbered=True)), TEXT)
        if form == "vtt":
            return Body("WEBVTT\n\n" + "".join(self._cues(transcript, ".", is_numbered=False)), _VTT)
        if form == "json":
            return {"text": text, "usage": {"type": "duration", "seconds": math.ceil(seconds)}}
        segments = [self._segment(number, own) for number, own in enumerate(transcript.segments)]
        return {"task": task, "language": language, "duration": seconds, "text": text, "segments": segments}

    def _segment(self, number: int, segment: Segment) -> dict[str, Any]:
        text = self.decode(segment.tokens)
        return {
            "id": number,
            "seek": segment.seek,
            "start": segment.start,
            "end": segment.end,
            "text": text,
            "tokens": segment.tokens,
            "temperature": 0.0,
            "avg_logprob": segment.logprob,
            "compression_ratio": len(text.encode()) / len(zlib.compress(text.encode())),
        }

    def _cues(self, transcript: Transcript, mark: str, is_numbered: bool) -> list[str]:
        cues = []
        for number, segment in enumerate(transcript.segments, 1):
            head = f"{number}\n" if is_numbered else ""
            # A blank line would end the cue, and an arrow be taken for its times.
            text = " ".join(self.decode(segment.tokens).split()).replace("-->", "->")
            cues.append(f"{head}{_clock(segment.start, mark)} --> {_clock(segment.end, mark)}\n{text}\n\n")
        return cues


def _clock(seconds: float, mark: str) -> str:
    """`01:02:03,456`."""
    whole, thousandths = divmod(round(seconds * 1000), 1000)
    minutes, second = divmod(whole, 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour:02}:{minute:02}:{second:02}{mark}{thousandths:03}"
