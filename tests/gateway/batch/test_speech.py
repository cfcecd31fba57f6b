"""Speech behind a gateway: forms go on to a real model behind TorchServe, by OpenAI's client and without it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import sse_server
from deployment import MODEL_CONFIGS, served
from gateway_process import Gateway, gateway
from whisper_models import file_of, save_whisper, sound

from ts_parallel.cli.server.torchserve import TorchServe
from ts_parallel.errors import RequestError
from ts_parallel.gateway.batch.speech import text_of_form

SOUND = file_of(sound(2.5), 16000, "FLAC")
ROUTES = ("v1/audio/transcriptions", "v1/audio/translations")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    folder = tmp_path_factory.mktemp("whisper")
    save_whisper(folder)
    own = MODEL_CONFIGS["embedding-pp2-cpu.yaml"]
    handler = {"model_path": ".", "task": "automatic_speech_recognition", "device": "cpu"}
    settings = {**own, "parallelType": "tp", "torchrun": {"nproc-per-node": 1}, "handler": handler}
    with served(tmp_path_factory.mktemp("served"), settings, folder) as server:
        yield server


@pytest.fixture(scope="module")
def front(server: TorchServe) -> Iterator[Gateway]:
    """Its model has another name here, and there is a second one."""
    with gateway(f"ears={server.url}", f"other={server.url}") as front:
        yield front


@pytest.fixture
def client(front: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.mark.torchserve
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("form", ["json", "text", "verbose_json", "srt", "vtt"])
def test_transcript_is_the_models_own_in_every_format(
    front: Gateway, server: TorchServe, route: str, form: str
) -> None:
    fields = {"model": "ears", "response_format": form, "language": "de"}
    asked: Any = {"data": fields, "files": {"file": ("a.flac", SOUND)}, "timeout": 60}
    ours, theirs = httpx.post(f"{front.url}/{route}", **asked), httpx.post(f"{server.url}/1.0/{route}", **asked)
    assert ours.status_code == theirs.status_code == 200, ours.text
    assert ours.content == theirs.content and len(ours.content) > 10
    assert ours.headers["content-type"] == theirs.headers["content-type"]


@pytest.mark.torchserve
def test_openais_client_gets_a_transcript(client: openai.OpenAI) -> None:
    file = ("a.flac", SOUND)
    whole: Any = client.audio.transcriptions.create(model="ears", file=file, response_format="verbose_json")
    assert whole.text and whole.duration == pytest.approx(2.5) and whole.segments
    assert client.audio.transcriptions.create(model="ears", file=file).text == whole.text


@pytest.mark.torchserve
def test_refusals_are_the_models_own_or_name_the_models(client: openai.OpenAI, front: Gateway) -> None:
    file = ("a.flac", SOUND)
    for options, says in (
        ({"temperature": 0.5}, "greedy"),
        ({"file": ("a.mp3", b"ID3")}, "file"),
        ({"language": "klingon"}, "klingon"),
    ):
        with pytest.raises(openai.BadRequestError, match=says):
            client.audio.transcriptions.create(**{"model": "ears", "file": file, **options})  # type: ignore[call-overload]
    with pytest.raises(openai.NotFoundError, match="'whisper-1' does not exist: there are ears, other"):
        client.audio.transcriptions.create(model="whisper-1", file=file)
    got = httpx.post(f"{front.url}/{ROUTES[0]}", files={"file": file})
    assert got.status_code == 400 and "'model' is missing" in got.json()["error"]["message"]
    got = httpx.post(f"{front.url}/v1/embeddings", json={"model": "ears", "input": "a"})
    assert got.status_code == 404 and ROUTES[0] in got.json()["error"]["message"]


@pytest.mark.parametrize("route", ROUTES)
def test_form_for_a_model_that_generates_text_is_refused(route: str) -> None:
    with sse_server.running() as generating:
        with gateway(f"{generating.url.removesuffix('/v1')}/predictions/demo") as front:
            got = httpx.post(f"{front.url}/{route}", files={"file": ("a.wav", b"RIFF")})
            assert got.status_code == 404 and "'demo' generates text" in got.json()["error"]["message"]
            others: list[dict[str, Any]] = [{"json": {}}, {"content": b"RIFF"}]
            for other in others:
                got = httpx.post(f"{front.url}/{route}", **other)
                assert got.status_code == 400 and "multipart/form-data" in got.json()["error"]["message"]
            assert not generating.bodies


KIND = "multipart/form-data; boundary=x-y"
FILE = b'--x-y\r\nContent-Disposition: form-data; name="file"; filename="model"\r\n\r\n\r\n--x-\r\n\r\nmodel'
MODEL = b'\r\nContent-Type: text/plain\r\nContent-Disposition: form-data; name="model"\r\n\r\n'


def part(value: bytes, end: bytes = b"--") -> bytes:
    return b"--x-y" + MODEL + value + b"\r\n--x-y" + end


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (part(b"ears"), "ears"),
        (b"preamble\r\n" + part("é".encode()), "é"),
        (FILE + b"\r\n" + part(b"ears"), "ears"),
        (FILE + b"\r\n--x-y--\r\n", None),
        (part(b"one", b"\r\n" + part(b"two").removeprefix(b"--x-y\r\n")), "two"),
        (b"--x-y--", None),
        (b"--x-y\r\nContent-Disposition: form-data; name=model\r\n\r\n\r\n--x-y--", ""),
    ],
)
def test_field_is_found_in_a_form_that_is_not_taken_apart(body: bytes, expected: str | None) -> None:
    assert text_of_form(body, KIND, "model") == expected


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", KIND),
        (b"x", KIND),
        (FILE, KIND),
        (part(b"ears", b""), KIND),
        (b"--x-y\r\nno head\r\n--x-y--", KIND),
        (part(b"e" * 1025), KIND),
        (part(b"ears"), "multipart/form-data"),
        (part(b"ears"), "multipart/mixed; boundary=x-y"),
        (part(b"ears"), ""),
    ],
)
def test_what_is_no_form_is_refused(body: bytes, kind: str) -> None:
    with pytest.raises(RequestError):
        text_of_form(body, kind, "model")
