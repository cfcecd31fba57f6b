"""One way to answer in pieces, whichever of TorchServe's transports model-config.yaml chose. For handlers of your own:

from ts_parallel import StreamingHandler

class Countdown(StreamingHandler):
    def answer(self, request, stream):
        for number in range(request.fields()["from"], 0, -1):
            stream.send(f"{number}\\n")

_handler = Countdown()

def handle(data, context):
    return _handler.handle(data, context)
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ts_parallel.errors import ConfigError, EngineError, RequestError
from ts_parallel.serving.exchange import TEXT, Door, OpenJob, RawRequest, Reply, error_body
from ts_parallel.serving.torchserve.ends.outliving import be_outlived_alone, seconds_until_front_end_waits
from ts_parallel.serving.torchserve.front_end_settings import message_sizes
from ts_parallel.serving.torchserve.keep_open import has_replicas
from ts_parallel.serving.torchserve.transports.continuous_batching import ContinuousBatchingDrain
from ts_parallel.serving.torchserve.transports.plain_batching import PlainBatches

logger = logging.getLogger(__name__)

D = TypeVar("D")
Transport = ContinuousBatchingDrain[D] | PlainBatches[D]


def make_transport(
    settings: Mapping[str, Any], door: Door[D], open_job: Callable[[str, RawRequest], OpenJob[D] | Reply]
) -> Transport[D]:
    """What carries the replies, as the keys of model-config.yaml say.

    Raises:
        ConfigError: as `refuse_unsafe_transport`.
    """
    refuse_unsafe_transport(settings)
    if settings.get("continuousBatching"):
        return ContinuousBatchingDrain(door, open_job, has_replicas(settings), message_sizes().max_response_size)
    return PlainBatches(door, open_job, most_bytes=message_sizes().max_response_size)


def refuse_unsafe_transport(settings: Mapping[str, Any]) -> None:
    """
    Raises:
        ConfigError: model-config.yaml asks for a transport under which requests are lost.
    """
    if settings.get("asyncCommunication"):
        raise ConfigError(
            "model-config.yaml key 'asyncCommunication': TorchServe 0.12 never answers those whose worker ends then, "
            "and tells no worker of a client that left: remove the key, and set continuousBatching to true"
        )


@dataclass
class News:
    """What a stream was given to send since it was last asked. `error` ends it, as `is_last` does."""

    pieces: list[str] = field(default_factory=list)
    is_last: bool = False
    error: RequestError | None = None


class ResponseStream:
    """The answer to one request, sent in pieces as they are ready; from any thread."""

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._news = News()
        self._has_ended = False
        self._is_wanted = True
        self.is_stream = False
        """Whether anything was sent before the end, so that the answer may leave in any number of pieces."""
        self.content_type = TEXT
        """What it is; to be set before the first piece."""

    @property
    def is_wanted(self) -> bool:
        """Whether anybody still listens. Only with continuous batching does TorchServe tell of clients that left."""
        return self._is_wanted

    def send(self, piece: str) -> None:
        """Send one piece; it leaves with what else is ready when TorchServe asks next.

        It is dropped where nobody listens any more.
        """
        with self._changed:
            if self._has_ended or not self._is_wanted:
                return
            self.is_stream = True
            self._news.pieces.append(piece)
            self._changed.notify_all()

    def end(self, piece: str = "", error: RequestError | None = None) -> None:
        """Nothing more comes than `piece`; `error` says why not, where the answer is not whole. Once is enough.

        An answer that is sent by this alone is no stream: it goes out with its length and its own status.
        """
        with self._changed:
            if self._has_ended:
                return
            self._has_ended = True
            self._news.pieces += [piece] if piece else []
            self._news.is_last, self._news.error = True, error
            self._changed.notify_all()

    def take(self) -> News:
        with self._changed:
            news, self._news = self._news, News()
            return news

    def has_news(self) -> bool:
        return bool(self._news.pieces) or self._news.is_last

    def close(self) -> None:
        self._is_wanted = False


class StreamJob:
    """A stream as the transports see it."""

    def __init__(self, stream: ResponseStream) -> None:
        self._stream = stream
        self._has_begun = False

    def advance(self, news: News) -> Reply | None:
        if not news.pieces and not news.is_last:
            return None
        body = "".join(news.pieces)
        if news.error is not None:
            return self.fail(news.error, body)
        is_first, self._has_begun = not self._has_begun, True
        return self._reply(body, is_first, news.is_last)

    @property
    def is_whole(self) -> bool:
        return False  # it may send a piece at any time

    def fail(self, error: RequestError, body: str = "") -> Reply:
        """The last reply, after a last piece."""
        if not self._has_begun and not body:
            return Reply.refusal(error)
        return self._reply(body + error_body(error), not self._has_begun, True)

    def _reply(self, body: str, is_first: bool, is_last: bool) -> Reply:
        stream = self._stream
        return Reply(body, is_first, is_last, content_type=stream.content_type, is_stream=stream.is_stream)


class Streams:
    """Owns the open streams of a handler. The transports come in here: it is their `Door`, and its own mailboxes."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open: dict[str, ResponseStream] = {}

    @property
    def router(self) -> Streams:
        return self

    def open(self, request_id: str) -> ResponseStream:
        stream = self._open[request_id] = ResponseStream(self._changed)
        return stream

    def wait(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: any(stream.has_news() for stream in self._open.values()), seconds)

    def take(self, request_id: str) -> News:
        return self._open[request_id].take()

    def abort(self, request_id: str) -> None:
        self._open.pop(request_id).close()


class StreamingHandler:
    """A handler that answers each request in pieces. Override `answer`, and `load` where there is something to load.

    It runs in one process; for models over several ranks there are `text_generation` and `batch_inference`.
    """

    def __init__(self, num_threads: int = 32) -> None:
        """
        Args:
            num_threads: how many requests are answered at once; the others wait.
        """
        self.streams = Streams()
        self._threads = ThreadPoolExecutor(num_threads, "answer")
        self._transport: Transport[News] | None = None

    def load(self, context: Any) -> None:
        """Called once, before any request, with TorchServe's context."""

    def answer(self, request: RawRequest, stream: ResponseStream) -> None:
        """Answer one request, in a thread of its own: `stream.send` what is ready, and return at the end.

        Raises:
            RequestError: the request is refused, with the error's status if nothing was sent yet. Any other exception
                is a 500.
        """
        raise NotImplementedError

    def handle(self, data: list[dict[str, Any]] | None, context: Any) -> list[str]:
        """TorchServe's entry point. Called first with no data, to load."""
        if data is None:
            self._transport = make_transport(context.model_yaml_config or {}, self.streams, self._open)
            self.load(context)
            be_outlived_alone(seconds_until_front_end_waits(context.model_yaml_config or {}))
            return []
        assert self._transport is not None
        return self._transport.handle(data, context)

    def _open(self, request_id: str, request: RawRequest) -> StreamJob | Reply:
        if request.route == "health":
            return Reply.whole('{"status": "ok"}')
        stream = self.streams.open(request_id)
        self._threads.submit(self._answer, request, stream)
        return StreamJob(stream)

    def _answer(self, request: RawRequest, stream: ResponseStream) -> None:
        if not stream.is_wanted:  # its client has left while it waited for a thread
            return
        try:
            self.answer(request, stream)
            stream.end()
        except RequestError as error:
            stream.end(error=error)
        except Exception as error:  # whatever it was, the stream must not hang for it
            logger.exception("a request failed")
            stream.end(error=EngineError(f"{type(error).__name__}: {error}"))
