"""Models that generate no text behind a gateway: a real one of embeddings behind TorchServe, asked by OpenAI's client
and by KServe's protocol; other answers by servers that say what its handlers say."""

from __future__ import annotations

import base64
import json
from array import array
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import sse_server
from batch_worker import MINILM
from deployment import MODEL_CONFIGS, served
from gateway_process import Gateway, gateway
from http_client import post
from sse_server import Recorder, Refusal

from ts_parallel.cli.server.torchserve import TorchServe

DOCUMENTS = ["Stocks fell sharply.", "A cat sits on the mat.", "The weather is lovely today."]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    own = MODEL_CONFIGS["embedding-pp2-cpu.yaml"]
    handler = {**own["handler"], "pipeline_parallel_size": 1}
    settings = {**own, "parallelType": "tp", "torchrun": {"nproc-per-node": 1}, "handler": handler}
    with served(tmp_path_factory.mktemp("minilm"), settings, MINILM) as server:
        yield server


@pytest.fixture(scope="module")
def front(server: TorchServe) -> Iterator[Gateway]:
    with gateway(f"minilm={server.url}") as front:
        yield front


@pytest.fixture
def client(front: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def vector_of(server: TorchServe, text: str) -> list[float]:
    status, answer = post(server.url, {"text": text})
    assert status == 200
    vector: list[float] = json.loads(answer)
    return vector


@pytest.mark.torchserve
def test_embeddings_are_the_models_own_in_either_encoding(client: openai.OpenAI, server: TorchServe) -> None:
    expected = [vector_of(server, text) for text in DOCUMENTS]
    for options in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        made: Any = client.embeddings.create(model="minilm", input=DOCUMENTS, **options)  # type: ignore[arg-type]
        assert [own.index for own in made.data] == [0, 1, 2] and made.usage.prompt_tokens > 9
        for own, vector in zip(made.data, expected, strict=True):
            found = own.embedding
            if isinstance(found, str):
                found = list(array("f", base64.b64decode(found)))
            assert found == pytest.approx(vector, abs=1e-6)
    assert client.embeddings.create(model="minilm", input="one").data[0].embedding


@pytest.mark.torchserve
def test_shorter_embeddings_have_length_one(client: openai.OpenAI, server: TorchServe) -> None:
    short = client.embeddings.create(model="minilm", input="a", dimensions=16).data[0].embedding
    whole = vector_of(server, "a")
    assert len(short) == 16 and sum(own * own for own in short) == pytest.approx(1, abs=1e-5)
    assert short[0] / short[1] == pytest.approx(whole[0] / whole[1], rel=1e-4)
    for wrong in (0, len(whole) + 1):
        with pytest.raises(openai.BadRequestError, match=f"from 1.*, got {wrong}"):
            client.embeddings.create(model="minilm", input="a", dimensions=wrong)


@pytest.mark.torchserve
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("v1/embeddings", {"model": "minilm", "input": [DOCUMENTS[0], "é 例"]}),
        ("v1/embeddings", {"input": [101, 2023, 102], "truncate_prompt_tokens": -1}),
        ("v1/rerank", {"query": "Where is the animal?", "documents": DOCUMENTS, "top_n": 2}),
        ("v1/score", {"text_1": DOCUMENTS[1], "text_2": DOCUMENTS}),
        ("v1/embeddings", {"input": []}),
        ("v1/embeddings", {"input": "a", "no_such_field": 1}),
        ("v1/score", {"text_1": DOCUMENTS[:2], "text_2": DOCUMENTS}),
        ("v1/classify", {"input": "of another task"}),
    ],
)
def test_answers_and_refusals_are_the_models_own(
    front: Gateway, server: TorchServe, path: str, body: dict[str, Any]
) -> None:
    ours = httpx.post(f"{front.url}/{path}", json=body, timeout=60)
    theirs = httpx.post(f"{server.url}/1.0/{path}", json=body, timeout=60)
    assert ours.status_code == theirs.status_code
    kept, changing = [own.json() for own in (ours, theirs)], ("id", "created")
    assert [{name: own[name] for name in own if name not in changing} for own in kept[:1]] == [
        {name: own[name] for name in own if name not in changing} for own in kept[1:]
    ]
    assert ours.status_code != 200 or ours.json()["usage"]["prompt_tokens"] > 0


@pytest.mark.torchserve
def test_documents_are_ranked_by_what_they_mean(front: Gateway) -> None:
    body = {"model": "minilm", "query": "Where is the animal?", "documents": DOCUMENTS}
    results = httpx.post(f"{front.url}/v1/rerank", json=body, timeout=60).json()["results"]
    assert results[0]["index"] == 1 and results[0]["document"]["text"] == DOCUMENTS[1]


@pytest.mark.torchserve
def test_kserve_gives_vectors_as_a_tensor(front: Gateway, server: TorchServe) -> None:
    tensor = {"name": "text", "shape": [3], "datatype": "BYTES", "data": DOCUMENTS}
    got = httpx.post(f"{front.url}/v2/models/minilm/infer", json={"id": "7", "inputs": [tensor]}, timeout=60).json()
    (output,) = got["outputs"]
    vectors = [vector_of(server, text) for text in DOCUMENTS]
    assert got["id"] == "7" and output["datatype"] == "FP32" and output["shape"] == [3, len(vectors[0])]
    assert output["data"] == pytest.approx([number for vector in vectors for number in vector], abs=1e-6)
    assert httpx.get(f"{front.url}/v2/models/minilm/versions/1.0/ready").json() == {"name": "minilm", "ready": True}
    assert httpx.get(f"{front.url}/v2/models/minilm").json()["versions"] == ["1.0"]


@pytest.mark.torchserve
@pytest.mark.parametrize(
    "path",
    [
        *("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"),
        *("/v1/responses", "/v1/messages", "/v1/messages/count_tokens"),
    ],
)
def test_model_of_vectors_generates_no_text(front: Gateway, path: str) -> None:
    body = {"model": "minilm", "messages": [{"role": "user", "content": "a"}], "input": "a", "max_tokens": 4}
    got = httpx.post(f"{front.url}{path}", json=body, timeout=60)
    assert got.status_code == 404
    says = "the model 'minilm' generates no text: its task is text_embedding"
    assert got.json()["error"]["message"].startswith(says)


@pytest.mark.torchserve
def test_model_without_figures_is_listed_with_its_task(front: Gateway, client: openai.OpenAI) -> None:
    (card,) = client.models.list()
    assert card.id == "minilm" and card.model_extra == {"task": "text_embedding"}
    assert "ts_parallel_gateway_requests_open" in httpx.get(f"{front.url}/metrics").text


# The others, of which a server says what their handlers say.


@pytest.fixture(scope="module")
def recorder() -> Iterator[Recorder]:
    with sse_server.running() as recorder:
        recorder.models.clear()  # so it generates no text
        yield recorder


@pytest.fixture(scope="module")
def told(recorder: Recorder) -> Iterator[Gateway]:
    with gateway(f"{recorder.url.removesuffix('/v1')}/predictions/demo") as front:
        yield front


def answering(recorder: Recorder, *answers: Any) -> None:
    """To each body in turn; the last to all that follow."""
    left = list(answers)

    def answer(_: Any) -> Iterator[bytes]:
        raise Refusal(200, "", body=json.dumps(left.pop(0) if len(left) > 1 else left[0]))
        yield

    recorder.answers[""] = answer


GOOD = [{"label": "good", "score": 0.75}, {"label": "bad", "score": 0.25}]


def infer(front: Gateway, *tensors: dict[str, Any], **more: Any) -> httpx.Response:
    return httpx.post(f"{front.url}/v2/models/demo/infer", json={"inputs": list(tensors), **more})


def test_kserve_takes_rows_of_numbers_and_gives_labels(told: Gateway, recorder: Recorder) -> None:
    answering(recorder, GOOD)
    pixels = {"name": "pixel_values", "shape": [2, 1, 2], "datatype": "FP32", "data": [1, 2, 3, 4]}
    got = infer(told, pixels, outputs=[{"name": "score"}]).json()
    assert got["outputs"] == [{"name": "score", "datatype": "FP32", "shape": [2, 2], "data": [0.75, 0.25, 0.75, 0.25]}]
    assert sorted(own["pixel_values"] for own in recorder.bodies[-2:]) == [[[1, 2]], [[3, 4]]]
    answering(recorder, {"text": "un"})
    text = {"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": [["one"]]}
    got = infer(told, text, parameters={"max_new_tokens": 3}).json()
    assert got["outputs"] == [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["un"]}]
    assert recorder.bodies[-1] == {"text": "one", "max_new_tokens": 3}


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        ({"shape": [2], "data": ["a"]}, "data has 1 values, shape [2] has 2"),
        ({"shape": [0], "data": []}, "shape must be"),
        ({"shape": [1], "data": ["a"], "datatype": "STRING"}, "datatype must be"),
        ({"shape": [1], "data": [1]}, "BYTES has no int"),
        ({"shape": [1], "data": ["a"], "datatype": "FP32"}, "FP32 has no str"),
        ({"shape": [1], "data": ["a"], "name": None}, "has no name"),
    ],
)
def test_tensor_that_does_not_fit_itself_is_refused(told: Gateway, tensor: dict[str, Any], says: str) -> None:
    got = infer(told, {"name": "text", "datatype": "BYTES", **tensor})
    assert got.status_code == 400 and says in got.json()["error"]


def test_answers_of_different_shapes_are_no_tensor(told: Gateway, recorder: Recorder) -> None:
    answering(recorder, [0.5], [0.5, 0.5])
    got = infer(told, {"name": "text", "shape": [2], "datatype": "BYTES", "data": ["a", "b"]})
    assert got.status_code == 400 and "different shapes" in got.json()["error"]
    assert infer(told).status_code == 400
    assert httpx.get(f"{told.url}/v2/models/none").status_code == 404
    assert httpx.get(f"{told.url}/v2/models/demo/versions/2").status_code == 404
    assert httpx.get(f"{told.url}/v2/health/ready").json() == {"ready": True}
    assert httpx.get(f"{told.url}/v2").json()["name"] == "ts_parallel"


def test_kserve_completes_texts(recorder: Recorder) -> None:
    choices = [
        {"index": 1, "text": "b!", "finish_reason": "stop"},
        {"index": 0, "text": "a!", "finish_reason": "length"},
    ]
    with sse_server.running(completions=sse_server.whole({"choices": choices})) as generating:
        with gateway(f"{generating.url.removesuffix('/v1')}/predictions/demo") as front:
            tensor = {"name": "text_input", "shape": [2], "datatype": "BYTES", "data": ["a", "b"]}
            got = infer(front, tensor, parameters={"max_tokens": 3}).json()
            assert [own["data"] for own in got["outputs"]] == [["a!", "b!"], ["length", "stop"]]
            assert generating.bodies[-1] == {"prompt": ["a", "b"], "max_tokens": 3, "model": "demo"}
            assert httpx.get(f"{front.url}/v2/models/demo").json()["inputs"][0]["name"] == "text_input"
            for path in ("embeddings", "classify", "score", "rerank"):
                wrong = httpx.post(f"{front.url}/v1/{path}", json={"input": "a"})
                assert wrong.status_code == 404 and "'demo' generates text" in wrong.json()["error"]["message"]
            assert len(generating.bodies) == 1
