"""TorchServe's gRPC inference API without generated code: the few messages of its inference.proto, written by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import grpc

STREAM = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/StreamPredictions"


def _varint(number: int) -> bytes:
    head, rest = number & 0x7F, number >> 7
    return bytes([head | 0x80]) + _varint(rest) if rest else bytes([head])


def _field(number: int, payload: bytes) -> bytes:
    """A field of strings, bytes or messages: wire type 2."""
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def predictions_request(model: str, inputs: Mapping[str, bytes]) -> bytes:
    """`PredictionsRequest`: model_name = 1, input = 3, a map of key = 1 and value = 2."""
    entries = [_field(3, _field(1, name.encode()) + _field(2, value)) for name, value in inputs.items()]
    return _field(1, model.encode()) + b"".join(entries)


def prediction_of(response: bytes) -> bytes:
    """`PredictionResponse`: prediction = 1, which is all that StreamPredictions fills in."""
    if not response:
        return b""
    assert response[0] == 1 << 3 | 2, response
    length, shift, at = 0, 0, 1
    while True:
        byte = response[at]
        length |= (byte & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if not byte & 0x80:
            return response[at : at + length]


def send(port: int, request: bytes) -> Iterator[str]:
    """The pieces of the answer, as they come."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_stream(STREAM, request_serializer=bytes, response_deserializer=prediction_of)
        for piece in call(request, timeout=60):
            yield piece.decode()


def stream_predictions(port: int, model: str, body: Mapping[str, Any], route: str = "") -> Iterator[str]:
    """The pieces of an answer to a JSON body, as they come."""
    inputs = {"data": json.dumps(body).encode(), "url_path": route.encode()}
    return send(port, predictions_request(model, inputs))
