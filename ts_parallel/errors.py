"""Every error this package raises for a caller's mistake, and the HTTP status each one becomes.

TSParallelError
├── StartupError            the model cannot be served; one line says why, nothing is started
│   ├── ConfigError         a key of the `handler:` section, or a flag, is wrong
│   ├── TopologyError       the ranks that were started are not the ranks that were asked for
│   ├── CheckpointError     a file is missing, cut off, or does not fit the model
│   └── PlanError           the model cannot be split as asked, or cannot be run at all
├── RemoteError             a server answers otherwise than its clients expect (`cli/client/stream_client.py`)
└── RequestError      400   this request alone is refused
    ├── ContextLengthError 400   prompt and answer have more tokens than the model takes
    ├── UnauthorizedError 401   the client's key is none of the server's
    ├── NotFoundError 404   no such route, or no such model
    ├── AnswerTooLargeError 413   the answer has more bytes than TorchServe's front end takes
    ├── BusyError     429   too many requests wait already
    ├── DrainingError 503   the server ends, and finishes only what it has begun
    ├── EngineError   500   the engine failed while it ran this request, or the model leaves it no token (NaN)
    └── TimedOutError 504   the request took longer than it may

`gateway/refusals.py` draws what a gateway refuses beside these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class TSParallelError(Exception):
    """Root of the tree above. Its text is one line, fit for a user's eyes."""


class StartupError(TSParallelError):
    pass


class ConfigError(StartupError):
    pass


class TopologyError(StartupError):
    pass


class CheckpointError(StartupError):
    pass


class PlanError(StartupError):
    pass


class RequestError(TSParallelError):
    """A request that is refused. `parameter` names the body's field at fault, where one is; `code` is OpenAI's word for
    what is wrong, where it has one."""

    status = 400
    kind = "invalid_request_error"
    code: str | None = None
    headers: ClassVar[Mapping[str, str]] = {}
    """Of the answer, for programs that know what to do about it."""

    def __init__(self, message: str, parameter: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter
        if code is not None:
            self.code = code


class ContextLengthError(RequestError):
    code = "context_length_exceeded"


class UnauthorizedError(RequestError):
    status = 401
    code = "invalid_api_key"
    headers: ClassVar[Mapping[str, str]] = {"WWW-Authenticate": "Bearer"}


class NotFoundError(RequestError):
    status = 404
    kind = "not_found_error"


class AnswerTooLargeError(RequestError):
    status = 413

    def __init__(self, num_bytes: int, most_bytes: int) -> None:
        super().__init__(
            f"the answer has {num_bytes} bytes, TorchServe takes {most_bytes} at most: ask for less or for a stream, "
            "or raise max_response_size of its config.properties (--max-response-size of ts-parallel serve)"
        )


class BusyError(RequestError):
    status = 429
    kind = "rate_limit_error"
    code = "rate_limit_exceeded"
    headers: ClassVar[Mapping[str, str]] = {"Retry-After": "1"}


class DrainingError(RequestError):
    status = 503
    kind = "server_error"
    code = "server_shutting_down"
    headers: ClassVar[Mapping[str, str]] = {"Retry-After": "10"}

    def __init__(self) -> None:
        super().__init__("this server is ending and takes no more requests: try again later, or another server")


class EngineError(RequestError):
    status = 500
    kind = "server_error"


class TimedOutError(RequestError):
    status = 504
    kind = "timeout_error"
