"""The routes of a text generation model: raw requests in, running jobs or ready replies out."""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ts_parallel.config import HandlerConfig
from ts_parallel.engine.engine import EngineThread
from ts_parallel.engine.request import make_request
from ts_parallel.errors import BusyError, EngineError, NotFoundError, RequestError
from ts_parallel.partition.model.model_config import max_positions_of, read_model_config
from ts_parallel.serving.exchange import RawRequest, Reply
from ts_parallel.serving.metrics import PROMETHEUS, labels_of, prometheus_text
from ts_parallel.serving.openai.answers import (
    Answer,
    ChatCompletion,
    ChatCompletionStream,
    Completion,
    CompletionStream,
    TextStream,
    WholeText,
    model_list,
)
from ts_parallel.serving.openai.bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    NativeBody,
    TokenizeBody,
    choice_params,
    parse_chat,
    parse_completion,
    parse_native,
    parse_plain,
)
from ts_parallel.serving.openai.choices import Choice, Echo, GenerationJob
from ts_parallel.serving.text.detokenizer import TextDecoder
from ts_parallel.serving.text.model_files import (
    read_eos_ids,
    read_sampling_defaults,
    read_tokenizer,
    vocabulary_of,
)
from ts_parallel.serving.text.stop_strings import StopStrings
from ts_parallel.serving.text.structured_output import GuideMaker
from ts_parallel.serving.text.token_texts import TokenTexts

logger = logging.getLogger(__name__)

GeneratingBody = NativeBody | CompletionBody | ChatBody


class GenerationService:
    """Turns raw requests into running jobs. Owns the tokenizer; the engine's thread is lent."""

    def __init__(
        self,
        folder: Path,
        name: str,
        engine: EngineThread,
        config: HandlerConfig,
        computed_by: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            computed_by: what `model_list` says of the machine.
        """
        model_config = read_model_config(folder)
        self.engine = engine
        self._name = name
        self._computed_by = computed_by
        self._max_model_len = config.resolve_max_model_len(max_positions_of(model_config))
        self._most_choices = config.max_num_seqs
        self._most_open = config.max_num_seqs + config.max_num_waiting
        self._max_seconds = config.max_request_seconds
        self._started_at = int(time.time())
        self._tokenizer = read_tokenizer(folder)
        self._vocabulary = vocabulary_of(model_config, self._tokenizer)
        self._eos_ids = read_eos_ids(folder, model_config, self._tokenizer)
        self._defaults = read_sampling_defaults(folder)
        self._texts = TokenTexts(self._tokenizer)
        self._decoder = TextDecoder(self._tokenizer)
        self._special_names = self._texts.special_names(self._vocabulary.size)
        self._guides = GuideMaker(self._tokenizer, self._eos_ids, self._vocabulary.size)
        self._routes: dict[str, Callable[[str, RawRequest], GenerationJob | Reply]] = {
            "": self._open_native,
            "health": self._health,
            "metrics": self._metrics,
            "v1/models": self._models,
            "v1/completions": self._open_completion,
            "v1/chat/completions": self._open_chat,
            "tokenize": self._tokenize,
            "detokenize": self._detokenize,
        }

    def open_job(self, request_id: str, request: RawRequest) -> GenerationJob | Reply:
        """Route one request. What cannot be served becomes a reply of its own; nothing is raised."""
        try:
            if request.route not in self._routes:
                known = ", ".join(route for route in self._routes if route)
                raise NotFoundError(f"no route {request.route!r}: there are {known}")
            return self._routes[request.route](request_id, request)
        except RequestError as error:
            return Reply.refusal(error)
        except Exception as error:  # whatever it was, the other requests must not end by it
            logger.exception("a request failed")
            return Reply.refusal(EngineError(f"{type(error).__name__}: {error}"))

    def _health(self, request_id: str, request: RawRequest) -> Reply:
        if self.engine.is_alive:
            return Reply.whole('{"status": "ok"}')
        return Reply('{"status": "failed"}', is_first=True, is_last=True, status=503)

    def _metrics(self, request_id: str, request: RawRequest) -> Reply:
        text = prometheus_text(self.engine.figures(), labels_of(self._name))
        return Reply.whole(text, PROMETHEUS)

    def _models(self, request_id: str, request: RawRequest) -> Reply:
        return Reply.whole(model_list(self._name, self._started_at, self._max_model_len, self._computed_by))

    def _tokenize(self, request_id: str, request: RawRequest) -> Reply:
        body = parse_plain(TokenizeBody, request)
        tokens = list(self._tokenizer(body.prompt, add_special_tokens=body.add_special_tokens).input_ids)
        return Reply.whole(json.dumps({"tokens": tokens, "count": len(tokens), "max_model_len": self._max_model_len}))

    def _detokenize(self, request_id: str, request: RawRequest) -> Reply:
        # Also what `tokenize` says that the model has not.
        both = replace(self._vocabulary, size=max(self._vocabulary.size, len(self._tokenizer)))
        tokens = both.known(parse_plain(DetokenizeBody, request).tokens, "tokens")
        return Reply.whole(json.dumps({"prompt": self._tokenizer.decode(list(tokens))}))

    def _open_native(self, request_id: str, request: RawRequest) -> GenerationJob:
        body = parse_native(request)
        if body.stream and body.logprobs is not None:
            raise RequestError("a stream of plain text has no place for logprobs: set stream to false", "logprobs")
        answer = TextStream() if body.stream else WholeText()
        return self._run(request_id, [self._tokens(body.prompt)], body, body.temperature, answer)

    def _open_completion(self, request_id: str, request: RawRequest) -> GenerationJob:
        body = parse_completion(request)
        num_choices = self._num_choices(body, len(body.prompts))
        answer: Answer = Completion(request_id, self._name, num_choices)
        if body.stream:
            answer = CompletionStream(request_id, self._name, num_choices, **_usage_options(body))
        prompts = [self._tokens(own) if isinstance(own, str) else own for own in body.prompts]
        echoes: list[Echo] | None = None
        if body.echo:
            is_all = body.max_tokens == 0
            texts = [own if isinstance(own, str) else self._text(own, is_all) for own in body.prompts]
            echoes = [Echo(text, is_all) for text in texts]
        return self._run(request_id, prompts, body, self._temperature(body), answer, echoes)

    def _open_chat(self, request_id: str, request: RawRequest) -> GenerationJob:
        body = parse_chat(request)
        num_choices = self._num_choices(body, 1)
        answer: Answer = ChatCompletion(request_id, self._name, num_choices)
        if body.stream:
            answer = ChatCompletionStream(request_id, self._name, num_choices, **_usage_options(body))
        if body.max_completion_tokens is not None:
            body = body.model_copy(update={"max_tokens": body.max_completion_tokens})
        return self._run(request_id, [self._chat_prompt(body)], body, self._temperature(body), answer)

    def _num_choices(self, body: CompletionBody | ChatBody, num_prompts: int) -> int:
        """Of all prompts together.

        Raises:
            RequestError: more than can ever be open.
        """
        if body.num_choices > self._most_choices:
            raise RequestError(f"n is {body.num_choices}, more than max_num_seqs, {self._most_choices}", "n")
        num_choices = body.num_choices * num_prompts
        if num_choices > self._most_open:
            raise RequestError(
                f"{num_prompts} prompts with {body.num_choices} answers each are more than can be open at once: "
                f"{self._most_open} (max_num_seqs and max_num_waiting)",
                "prompt",
            )
        return num_choices

    def _tokens(self, text: str) -> list[int]:
        """None for an empty text, though a tokenizer may begin each with a token of its own."""
        return list(self._tokenizer(text).input_ids) if text else []

    def _text(self, token_ids: list[int], is_all: bool) -> str:
        """A prompt's; the beginning of a character at its end is the answer's, unless none comes."""
        known = list(self._vocabulary.known(token_ids, "prompt"))
        return self._decoder.decode(known) if is_all else self._decoder.complete_text(known)

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
        self,
        request_id: str,
        prompts: Sequence[list[int]],
        body: GeneratingBody,
        temperature: float,
        answer: Answer,
        echoes: Sequence[Echo] | None = None,
    ) -> GenerationJob:
        """Hand the choices of all prompts to the engine. Nothing is handed over where anything is refused."""
        num_answers = 1 if isinstance(body, NativeBody) else body.num_choices
        num_choices = num_answers * len(prompts)
        if self.engine.num_open + num_choices > self._most_open:
            raise BusyError(
                f"{self.engine.num_open} of {self._most_open} requests (max_num_seqs and max_num_waiting) are open "
                f"already, {num_choices} more do not fit: try again later"
            )
        # Where the body has no seed, each prompt gets one of its own: two that are alike are not to be answered alike.
        params = [body.generation_params(temperature, random.getrandbits(64), self._defaults) for _ in prompts]
        stops = body.stop_strings()
        ends = tuple(token_id for token_id, name in self._special_names.items() if name in stops)
        params = [replace(own, stop_token_ids=(*own.stop_token_ids, *ends)) for own in params] if ends else params
        form = body.form()
        guides = [None] * num_choices if form is None else self._guides.make(form, num_choices)
        requests = [
            make_request(
                f"{request_id}/{number}" if number else request_id,
                prompts[number // num_answers],
                choice_params(params[number // num_answers], number % num_answers),
                eos_ids=self._eos_ids,
                max_model_len=self._max_model_len,
                vocabulary=self._vocabulary,
                guide=guide,
                prompt_field="messages" if isinstance(body, ChatBody) else "prompt",
            )
            for number, guide in enumerate(guides)
        ]
        texts = self._texts if body.num_logprobs is not None else None
        prompt_ends = [self._decoder.end_of(own.prompt_ids, form is not None) for own in requests[::num_answers]]
        choices = [
            Choice(
                own,
                self._decoder,
                StopStrings(stops, body.include_stop_str_in_output, self._special_names),
                texts,
                echoes[number // num_answers] if echoes else None,
                prompt_ends[number // num_answers],
            )
            for number, own in enumerate(requests)
        ]
        limits = [seconds for seconds in (body.timeout, self._max_seconds) if seconds is not None]
        self.engine.submit(*requests, seconds=min(limits, default=None))
        return GenerationJob(answer, choices, num_answers, self.engine)


def _usage_options(body: CompletionBody | ChatBody) -> dict[str, Any]:
    options = body.stream_options
    return {
        "include_usage": options is not None and (options.include_usage or options.continuous_usage_stats),
        "has_usage_in_each": options is not None and options.continuous_usage_stats,
    }
