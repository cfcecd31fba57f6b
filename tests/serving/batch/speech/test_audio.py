"""Sound files of the common formats, of any rate and number of channels, become the samples that they hold."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import soundfile
import soxr
from whisper_models import file_of, sound

from ts_parallel.errors import RequestError
from ts_parallel.serving.batch.speech.audio import read_audio

PCM = [*(("WAV", name) for name in ("PCM_16", "PCM_24", "FLOAT", "PCM_U8")), ("FLAC", "PCM_16"), ("AIFF", "PCM_16")]
LOSSY = [("OGG", "VORBIS", 44100), ("OGG", "OPUS", 48000), ("MP3", None, 44100)]


@pytest.mark.parametrize(("form", "subtype"), PCM)
def test_samples_of_16_khz_are_those_of_the_file(form: str, subtype: str) -> None:
    file = file_of(sound(0.7), 16000, form, subtype)
    expected, _ = soundfile.read(io.BytesIO(file), dtype="float32")
    np.testing.assert_array_equal(read_audio(file, 10), expected)


@pytest.mark.parametrize(("form", "subtype", "rate"), LOSSY)
def test_files_that_lose_something_are_near_to_their_sound(form: str, subtype: str | None, rate: int) -> None:
    samples = sound(1.5, rate=rate)
    heard = read_audio(file_of(samples, rate, form, subtype), 10)
    expected = soxr.resample(samples, rate, 16000)
    assert abs(len(heard) - len(expected)) < 2500  # MP3 begins and ends with silence
    similar = max(np.corrcoef(heard[at : at + 16000], expected[:16000])[0, 1] for at in range(0, 1500))
    assert similar > 0.95


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_any_rate_and_number_of_channels_is_taken(rate: int, channels: int) -> None:
    """The mean of the channels, resampled in pieces as at once."""
    samples = np.stack([sound(3.3, seed, rate) for seed in range(channels)], axis=1)
    expected = soxr.resample(samples.mean(axis=1), rate, 16000)
    heard = read_audio(file_of(samples, rate, "WAV", "FLOAT"), 10)
    assert len(heard) == len(expected)
    np.testing.assert_allclose(heard, expected, atol=1e-5)


def test_length_is_limited_whatever_the_file_says_of_itself() -> None:
    """A file of a few KiB holds minutes of silence; a header may lie."""
    silence = file_of(np.zeros(16000 * 600, np.int16), 16000, "FLAC")
    assert len(silence) < 2**16
    with pytest.raises(RequestError, match=r"the audio is longer than 30 s .*max_audio_seconds"):
        read_audio(silence, 30)
    assert len(read_audio(file_of(sound(30), 16000, "WAV"), 30)) == 30 * 16000
    with pytest.raises(RequestError, match="longer than 30 s"):
        read_audio(file_of(sound(30.1), 16000, "WAV"), 30)
    honest = bytearray(file_of(sound(1), 16000, "WAV"))
    honest[40:44] = struct.pack("<I", 2**31 - 1)  # so many bytes of samples
    assert len(read_audio(bytes(honest), 30)) == 16000


@pytest.mark.parametrize(
    ("file", "says"),
    [
        (b"", "no sound file that can be read"),
        (b"RIFF", "no sound file that can be read"),
        (b"\x00" * 5000, "no sound file that can be read"),
        (file_of(sound(0.5), 16000, "FLAC")[:60], "no sound file that can be read|the audio is empty"),
        (file_of(np.zeros(0, np.float32), 16000, "WAV"), "the audio is empty"),
        (file_of(np.zeros((99, 33), np.float32), 16000, "WAV"), "33 channels, at most 32"),
        (file_of(sound(0.1), 500, "WAV"), "500 Hz, 1000 to 384000 are taken"),
        (file_of(np.full(99, np.nan, np.float32), 16000, "WAV", "FLOAT"), "no finite numbers"),
    ],
)
def test_what_is_no_sound_is_refused(file: bytes, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        read_audio(file, 30)
