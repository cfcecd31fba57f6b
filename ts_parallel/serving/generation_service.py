"""The routes of a text generation model: raw requests in, running jobs or ready replies out."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ts_parallel.config import HandlerConfig
from ts_parallel.engine.engine import EngineThread
from ts_parallel.engine.request import GenerationParams, make_request
from ts_parallel.errors import BusyError, NotFoundError, RequestError
from ts_parallel.partition.deferred import read_model_config
from ts_parallel.serving.answers import (
    Answer,
    ChatCompletion,
    ChatCompletionStream,
    Completion,
    CompletionStream,
    TextStream,
    WholeText,
    model_list,
)
from ts_parallel.serving.bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    NativeBody,
    RawRequest,
    TokenizeBody,
    parse_chat,
    parse_completion,
    parse_native,
    parse_plain,
)
from ts_parallel.serving.continuous_batching import Job, Reply
from ts_parallel.serving.detokenizer import Detokenizer
from ts_parallel.serving.model_files import (
    read_eos_ids,
    read_sampling_defaults,
    read_tokenizer,
    resolve_max_model_len,
)
from ts_parallel.serving.stop_strings import StopStrings

GeneratingBody = NativeBody | CompletionBody | ChatBody


class GenerationService:
    """Turns raw requests into running jobs. Owns the tokenizer; the engine's thread is lent."""

    def __init__(self, folder: Path, name: str, engine: EngineThread, config: HandlerConfig) -> None:
        model_config = read_model_config(folder)
        self.engine = engine
        self._name = name
        self._max_model_len = resolve_max_model_len(config.max_model_len, model_config)
        self._most_open = config.max_num_seqs + config.max_num_waiting
        self._started_at = int(time.time())
        self._tokenizer = read_tokenizer(folder)
        self._eos_ids = read_eos_ids(folder, model_config)
        self._defaults = read_sampling_defaults(folder)
        self._routes: dict[str, Callable[[str, RawRequest], Job | Reply]] = {
            "": self._open_native,
            "health": self._health,
            "v1/models": self._models,
            "v1/completions": self._open_completion,
            "v1/chat/completions": self._open_chat,
            "tokenize": self._tokenize,
            "detokenize": self._detokenize,
        }

    def open_job(self, request_id: str, request: RawRequest) -> Job | Reply:
        """Route one request. What cannot be served becomes a reply of its own; nothing is raised."""
        try:
            if request.route not in self._routes:
                known = ", ".join(route for route in self._routes if route)
                raise NotFoundError(f"no route {request.route!r}: there are {known}")
            return self._routes[request.route](request_id, request)
        except RequestError as error:
            return Reply.refusal(error)

    def _health(self, request_id: str, request: RawRequest) -> Reply:
        return Reply.whole('{"status": "ok"}' if self.engine.is_alive else '{"status": "failed"}')

    def _models(self, request_id: str, request: RawRequest) -> Reply:
        return Reply.whole(model_list(self._name, self._started_at, self._max_model_len))

    def _tokenize(self, request_id: str, request: RawRequest) -> Reply:
        body = parse_plain(TokenizeBody, request)
        tokens = list(self._tokenizer(body.prompt, add_special_tokens=body.add_special_tokens).input_ids)
        return Reply.whole(json.dumps({"tokens": tokens, "count": len(tokens), "max_model_len": self._max_model_len}))

    def _detokenize(self, request_id: str, request: RawRequest) -> Reply:
        tokens = self._known(parse_plain(DetokenizeBody, request).tokens, "tokens")
        return Reply.whole(json.dumps({"prompt": self._tokenizer.decode(tokens)}))

    def _open_native(self, request_id: str, request: RawRequest) -> Job:
        body = parse_native(request)
        prompt = self._tokens(body.prompt)
        return self._run(request_id, prompt, body, body.temperature, TextStream() if body.stream else WholeText())

    def _open_completion(self, request_id: str, request: RawRequest) -> Job:
        body = parse_completion(request)
        prompt = body.single_prompt()
        if isinstance(prompt, str):
            prompt = self._tokens(prompt)
        answer: Answer = Completion(request_id, self._name)
        if body.stream:
            answer = CompletionStream(request_id, self._name, **_usage_options(body))
        return self._run(request_id, self._known(prompt, "prompt"), body, self._temperature(body), answer)

    def _open_chat(self, request_id: str, request: RawRequest) -> Job:
        body = parse_chat(request)
        answer: Answer = ChatCompletion(request_id, self._name)
        if body.stream:
            answer = ChatCompletionStream(request_id, self._name, **_usage_options(body))
        if body.max_completion_tokens is not None:
            body = body.model_copy(update={"max_tokens": body.max_completion_tokens})
        return self._run(request_id, self._chat_prompt(body), body, self._temperature(body), answer)

    def _tokens(self, text: str) -> list[int]:
        """None for an empty text, though a tokenizer may begin each with a token of its own."""
        return list(self._tokenizer(text).input_ids) if text else []

    def _chat_prompt(self, body: ChatBody) -> list[int]:
        if not self._tokenizer.chat_template:
            raise RequestError("the model's tokenizer has no chat template; use v1/completions", "messages")
        try:
            text: str = self._tokenizer.apply_chat_template(
                body.template_messages(),
                tools=body.tools,
                add_generation_prompt=body.add_generation_prompt,
                tokenize=False,
                **(body.chat_template_kwargs or {}),
            )
        except RequestError:
            raise
        except Exception as error:  # a template is a program of the model's own, and refuses by raising what it likes
            raise RequestError(f"the model's chat template refuses the messages: {error}", "messages") from None
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def _temperature(self, body: CompletionBody | ChatBody) -> float:
        return self._defaults.temperature if body.temperature is None else body.temperature

    def _run(
        self, request_id: str, prompt_ids: list[int], body: GeneratingBody, temperature: float, answer: Answer
    ) -> Job:
        if self.engine.num_open >= self._most_open:
            raise BusyError(
                f"{self._most_open} requests are open already (max_num_seqs and max_num_waiting): try again later"
            )
        params: GenerationParams = body.generation_params(temperature, random.getrandbits(64), self._defaults)
        self._known([token_id for token_id, _ in params.sampling.logit_bias], "logit_bias")
        self._known(list(params.stop_token_ids), "stop_token_ids")
        request = make_request(request_id, prompt_ids, params, eos_ids=self._eos_ids, max_model_len=self._max_model_len)
        self.engine.submit(request)
        stops = StopStrings(body.stop_strings(), body.include_stop_str_in_output)
        return Job(answer, Detokenizer(self._tokenizer), request, stops)

    def _known(self, token_ids: list[int], parameter: str) -> list[int]:
        """The same token ids.

        Raises:
            RequestError: one is none of the model's.
        """
        vocabulary = len(self._tokenizer)
        for token_id in token_ids:
            if not 0 <= token_id < vocabulary:
                raise RequestError(f"token id {token_id} is outside the vocabulary of {vocabulary}", parameter)
        return token_ids


def _usage_options(body: CompletionBody | ChatBody) -> dict[str, Any]:
    options = body.stream_options
    return {
        "include_usage": options is not None and (options.include_usage or options.continuous_usage_stats),
        "has_usage_in_each": options is not None and options.continuous_usage_stats,
    }
