"""Clients of embeddings before a gateway, beside the model's own route."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from batch_worker import MINILM
from client_programs import seen
from deployment import MODEL_CONFIGS, served
from gateway_process import gateway
from http_client import post

from ts_parallel.cli.server.torchserve import TorchServe

pytestmark = pytest.mark.torchserve


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    own = MODEL_CONFIGS["embedding-pp2-cpu.yaml"]
    handler = {**own["handler"], "pipeline_parallel_size": 1}
    settings = {**own, "parallelType": "tp", "torchrun": {"nproc-per-node": 1}, "handler": handler}
    with served(tmp_path_factory.mktemp("minilm"), settings, MINILM) as server:
        yield server


def test_litellm_gets_the_models_vectors(server: TorchServe) -> None:
    texts = ("A cat sits on the mat.", "The weather is lovely today.")
    expected = [json.loads(post(server.url, {"text": text})[1])[:3] for text in texts]
    with gateway(f"demo={server.url}") as front:
        saw = seen("ask_embeddings", "litellm", front.url)
    for vectors in saw["embeddings"]:
        for own, vector in zip(vectors, expected, strict=True):
            assert own == pytest.approx(vector, abs=1e-6)
    assert (saw["usage"], saw["dimensions"], saw["ranking"]) == ([True, True], 16, [1, 0])
