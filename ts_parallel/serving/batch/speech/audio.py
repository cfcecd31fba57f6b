"""A sound file → samples of one channel at one rate. Reads piece by piece: a small file may hold hours of silence."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import soundfile
import soxr

from ts_parallel.errors import RequestError

SAMPLE_RATE = 16000
FORMATS = "WAV, FLAC, MP3, OGG (Vorbis, Opus), AIFF"
_FRAMES_AT_ONCE = 2**16
_LOWEST_RATE, _HIGHEST_RATE = 1000, 384_000
_MOST_CHANNELS = 32

Samples = np.ndarray[Any, np.dtype[np.float32]]


def read_audio(file: bytes, most_seconds: float) -> Samples:
    """The mean of the file's channels, at `SAMPLE_RATE`.

    Raises:
        RequestError: it is no sound file that can be read, too long, or of too many channels.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(file)) as sound:
            rate = _checked_rate(sound)
            pieces = list(_resampled(_mono(sound, int(most_seconds * rate), most_seconds), rate))
    except (soundfile.SoundFileError, RuntimeError, ValueError, OSError) as error:
        raise RequestError(f"the body is no sound file that can be read ({FORMATS}): {error}", "file") from None
    samples = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    return checked_samples(samples, most_seconds, "file")


def checked_samples(samples: Samples, most_seconds: float, parameter: str) -> Samples:
    """
    Raises:
        RequestError: there are none, too many, or one that is no number.
    """
    if not len(samples):
        raise RequestError("the audio is empty", parameter)
    if len(samples) > most_seconds * SAMPLE_RATE:
        raise too_long(len(samples) / SAMPLE_RATE, most_seconds, parameter)
    if not np.isfinite(samples).all():
        raise RequestError("the audio has samples that are no finite numbers", parameter)
    return samples


def too_long(seconds: float, most: float, parameter: str) -> RequestError:
    return RequestError(
        f"the audio is longer than {most:g} s ({seconds:.1f} s or more): send it in pieces, or raise max_audio_seconds "
        "(handler key; see responseTimeout too)",
        parameter,
    )


def _checked_rate(sound: Any) -> int:
    rate, channels = int(sound.samplerate), int(sound.channels)
    if not _LOWEST_RATE <= rate <= _HIGHEST_RATE:
        raise RequestError(f"the audio has {rate} Hz, {_LOWEST_RATE} to {_HIGHEST_RATE} are taken", "file")
    if channels > _MOST_CHANNELS:
        raise RequestError(f"the audio has {channels} channels, at most {_MOST_CHANNELS} are taken", "file")
    return rate


def _mono(sound: Any, most_frames: int, most_seconds: float) -> Iterator[Samples]:
    num_frames = 0
    while len(block := sound.read(_FRAMES_AT_ONCE, dtype="float32", always_2d=True)):
        num_frames += len(block)
        if num_frames > most_frames:
            raise too_long(num_frames / sound.samplerate, most_seconds, "file")
        yield block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)


def _resampled(blocks: Iterator[Samples], rate: int) -> Iterator[Samples]:
    if rate == SAMPLE_RATE:
        yield from blocks
        return
    stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")
    for block in blocks:
        yield stream.resample_chunk(np.ascontiguousarray(block))
    yield stream.resample_chunk(np.zeros(0, np.float32), last=True)
