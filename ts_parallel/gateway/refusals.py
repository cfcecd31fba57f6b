"""What a gateway refuses beside `ts_parallel.errors`, and how an error looks to each kind of client.

RequestError              400
├── UnauthorizedError     401   no key, or a wrong one
├── UnknownModelError     404   no upstream of that name
├── BodyTimedOutError     408   the body stopped coming
├── BodyTooLargeError     413   the body has more bytes than the gateway takes
├── UnavailableError      503   the upstream is not up, or its worker is being started again: ask again
├── UpstreamError         502   the upstream ended or answered something that is no answer
├── SilentUpstreamError   504   the upstream said nothing for too long
└── UpstreamRefusal             what the upstream itself refused, with its own status and words
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from ts_parallel.errors import NotFoundError, RequestError, TimedOutError

SECONDS_TO_RETRY = 2

# By path's beginning: the clients of these know errors of other shapes than OpenAI's.
_ANTHROPIC, _KSERVE = "/v1/messages", "/v2"
_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class UnauthorizedError(RequestError):
    status = 401
    code = "invalid_api_key"


class UnknownModelError(NotFoundError):
    kind = "invalid_request_error"
    code = "model_not_found"


class BodyTimedOutError(RequestError):
    status = 408


class BodyTooLargeError(RequestError):
    status = 413
    code = "request_too_large"


class UnavailableError(RequestError):
    status = 503
    kind = "server_error"
    code = "service_unavailable"


class UpstreamError(RequestError):
    status = 502
    kind = "server_error"
    code = "upstream_error"


class SilentUpstreamError(TimedOutError):
    code = "upstream_timeout"


class UpstreamRefusal(RequestError):
    """Another's refusal, to be told on in whichever shape."""

    def __init__(self, status: int, message: str, parameter: str | None, kind: str, code: Any) -> None:
        super().__init__(message, parameter)
        self.status = status
        self.kind = kind
        self.code = code


_SAID = {"type": "object", "properties": {"message": {"type": "string"}}, "required": ["message"]}
ERRORS: Mapping[str, Any] = {
    "type": "object",
    "properties": {"error": {"anyOf": [_SAID, {"type": "string"}]}},
    "required": ["error"],
    "description": "OpenAI's shape; below /v1/messages Anthropic's; below /v2 KServe's, whose error is a text.",
}
"""All that `refusal` makes, as a JSON schema."""


def error_of(error: RequestError) -> dict[str, Any]:
    """In OpenAI's shape."""
    code = getattr(error, "code", None)
    return {"error": {"message": str(error), "type": error.kind, "param": error.parameter, "code": code}}


def anthropic_error_of(error: RequestError) -> dict[str, Any]:
    kind = _ANTHROPIC_KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(error)}}


def refusal(path: str, error: RequestError) -> Response:
    """The answer to a request of `path` that is refused."""
    body = error_of(error)
    if path.startswith(_ANTHROPIC):
        body = anthropic_error_of(error)
    elif path.startswith(_KSERVE):
        body = {"error": str(error)}
    return json_answer(body, error.status, headers_of(error.status))


def headers_of(status: int) -> dict[str, str]:
    """What an error's answer has beside its body."""
    if status in (429, 503):
        return {"Retry-After": str(SECONDS_TO_RETRY)}
    return {"WWW-Authenticate": "Bearer"} if status == 401 else {}


def json_answer(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(body), status, headers, media_type="application/json")
