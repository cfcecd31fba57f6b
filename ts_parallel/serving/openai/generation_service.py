"""The routes of a text generation model: raw requests in, running jobs or ready replies out."""

from __future__ import annotations

import json
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ts_parallel import long_json
from ts_parallel.config import HandlerConfig
from ts_parallel.engine.engine import EngineThread
from ts_parallel.engine.request import make_request, room_behind
from ts_parallel.errors import BusyError, ContextLengthError, EngineError, NotFoundError, RequestError
from ts_parallel.openapi import document as openapi
from ts_parallel.partition.model.model_config import max_positions_of, read_model_config
from ts_parallel.serving.chat.tools import Offer, offer_of
from ts_parallel.serving.chat.turns import Turn, Turns
from ts_parallel.serving.exchange import RawRequest, Reply
from ts_parallel.serving.metrics import PROMETHEUS, labels_of, prometheus_text
from ts_parallel.serving.openai.about.description import ONE_MODEL, description
from ts_parallel.serving.openai.about.limits import limits_body, limits_of
from ts_parallel.serving.openai.about.models import ModelCards, ModelNames
from ts_parallel.serving.openai.answers import (
    Answer,
    ChatCompletion,
    ChatCompletionStream,
    Completion,
    CompletionStream,
    TextStream,
    WholeText,
)
from ts_parallel.serving.openai.bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    NativeBody,
    TokenizeBody,
    parse_chat,
    parse_completion,
    parse_native,
    parse_plain,
    parse_tokenize,
)
from ts_parallel.serving.openai.choices import Choice, Echo, GenerationJob
from ts_parallel.serving.openai.fields.allowed_tokens import LimitMaker
from ts_parallel.serving.openai.fields.conversation import ConversationBody
from ts_parallel.serving.openai.fields.foreign import ForeignFields
from ts_parallel.serving.openai.fields.generation import choice_params
from ts_parallel.serving.openai.fields.messages import plain_messages
from ts_parallel.serving.openai.fields.token_details import TokenDetails
from ts_parallel.serving.openai.keys import APIKeys
from ts_parallel.serving.openai.preparation import Preparations, PreparedJob
from ts_parallel.serving.openai.templates.chat_template import ChatTemplate
from ts_parallel.serving.openai.templates.sandbox import TakesLongError
from ts_parallel.serving.text.detokenizer import TextDecoder
from ts_parallel.serving.text.model_files import (
    read_eos_ids,
    read_sampling_defaults,
    read_tokenizer,
    vocabulary_of,
)
from ts_parallel.serving.text.stop_strings import StopStrings
from ts_parallel.serving.text.structured_output import GuideMaker
from ts_parallel.serving.text.text_encoder import TextEncoder
from ts_parallel.serving.text.token_texts import TokenTexts

logger = logging.getLogger(__name__)

# What a client may call its own request, so that the answer's id has it.
_OWN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_READY_ROUTES = (
    "health",
    "metrics",
    "v1/models",
    "v1/limits",
    openapi.ROUTE,
)  # what they say is there, whatever the body
_RENDERING_ROUTES = ("v1/chat/completions", "tokenize")

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
        sizes: Mapping[str, int] | None = None,
        api_keys: Sequence[str] = (),
    ) -> None:
        """
        Args:
            computed_by: what `v1/models` says of the machine.
            sizes: what `limits_of` is to know of the front end.
            api_keys: one of which a client has to have, where there are any.
        """
        model_config = read_model_config(folder)
        self.engine = engine
        self._names = ModelNames(name, Path(config.model_path), config.served_model_name)
        self._name = self._names.own
        self._keys = APIKeys(api_keys)
        self._max_model_len = config.resolve_max_model_len(max_positions_of(model_config))
        self._most_choices = config.max_num_seqs
        self._most_open = config.max_num_seqs + config.max_num_waiting
        self._max_seconds = config.max_request_seconds
        self._cards = ModelCards(self._names, int(time.time()), self._max_model_len, computed_by)
        self._limits = limits_of(config, self._max_model_len, sizes or {})
        self._tokenizer = read_tokenizer(folder)
        self._vocabulary = vocabulary_of(model_config, self._tokenizer)
        self._eos_ids = read_eos_ids(folder, model_config, self._tokenizer)
        self._defaults = read_sampling_defaults(folder)
        self._texts = TokenTexts(self._tokenizer)
        self._decoder = TextDecoder(self._tokenizer)
        self._whole_decoder = TextDecoder(self._tokenizer, skips_special_tokens=False)
        self._special_names = self._texts.special_names(self._vocabulary.size)
        self._guides = GuideMaker(self._tokenizer, self._eos_ids, self._vocabulary.size)
        self._token_limits = LimitMaker(self._tokenizer, self._vocabulary, self._eos_ids)
        self._chat_template = ChatTemplate(self._tokenizer)
        self._is_strict = config.strict
        self._foreign = ForeignFields(config.strict)
        self._clamps_max_tokens = config.clamp_max_tokens
        self._turns = Turns(self._tokenizer, self._eos_ids, config.chat_format, split_reasoning=config.split_reasoning)
        self._encoder = TextEncoder(self._tokenizer)
        self._preparations = Preparations(engine, self._open, self._renders_long)
        self._admission = threading.Lock()
        self._routes: dict[str, Callable[[str, RawRequest], GenerationJob | Reply]] = {
            "": self._open_native,
            "health": self._health,
            "metrics": self._metrics,
            "v1/models": self._models,
            "v1/limits": self._show_limits,
            openapi.ROUTE: self._describe,
            "v1/completions": self._open_completion,
            "v1/chat/completions": self._open_chat,
            "tokenize": self._tokenize,
            "detokenize": self._detokenize,
        }

    def open_job(self, request_id: str, request: RawRequest) -> GenerationJob | PreparedJob | Reply:
        """Route one request. What cannot be served becomes a reply of its own, now or later; nothing is raised."""
        if request.route in _READY_ROUTES or request.route not in self._routes:
            return self._open(request_id, request)
        return self._preparations.open(request_id, request)

    def _open(self, request_id: str, request: RawRequest) -> GenerationJob | Reply:
        try:
            if request.route != "health":  # which those who watch over servers ask for without a key
                self._keys.check(request.headers)
            return self._route(request.route)(request_id, request)
        except RequestError as error:
            return Reply.refusal(error)
        except TakesLongError:  # in a thread it need not hurry
            raise
        except Exception as error:  # whatever it was, the other requests must not end by it
            logger.exception("a request failed")
            return Reply.refusal(EngineError(f"{type(error).__name__}: {error}"))

    def _renders_long(self, request: RawRequest) -> bool:
        return request.route in _RENDERING_ROUTES and self._chat_template.takes_long

    def _route(self, route: str) -> Callable[[str, RawRequest], GenerationJob | Reply]:
        if route in self._routes:
            return self._routes[route]
        if route.startswith(ONE_MODEL):
            return self._model
        known = ", ".join(own for own in self._routes if own)
        raise NotFoundError(f"no route {route!r}: there are {known}", code="unknown_url")

    def _health(self, request_id: str, request: RawRequest) -> Reply:
        if self.engine.is_alive:
            return Reply.whole('{"status": "ok"}')
        # This process ends, and TorchServe starts another.
        return Reply('{"status": "failed"}', is_first=True, is_last=True, status=503, headers={"Retry-After": "5"})

    def _metrics(self, request_id: str, request: RawRequest) -> Reply:
        text = prometheus_text(self.engine.figures(), labels_of(self._name))
        return Reply.whole(text, PROMETHEUS)

    def _models(self, request_id: str, request: RawRequest) -> Reply:
        return Reply.whole(self._cards.all())

    def _model(self, request_id: str, request: RawRequest) -> Reply:
        return Reply.whole(self._cards.one(unquote(request.route.removeprefix(ONE_MODEL))))

    def _show_limits(self, request_id: str, request: RawRequest) -> Reply:
        return Reply.whole(limits_body(self._name, self._limits))

    def _describe(self, request_id: str, request: RawRequest) -> Reply:
        told = description(self._name, self._routes, is_strict=self._is_strict, has_keys=self._keys.are_asked_for)
        return Reply.whole(told)

    def _tokenize(self, request_id: str, request: RawRequest) -> Reply:
        body = parse_tokenize(request, self._foreign)
        self._names.check(body.model)
        if isinstance(body, TokenizeBody):
            text = body.prompt
        else:
            text = self._chat_text(body, offer_of(body.tools, "auto", None))
        tokens = self._encoder.encode(text, body.add_special_tokens)
        others = f'"count": {len(tokens)}, "max_model_len": {self._max_model_len}'
        if body.return_token_strs:
            others += f', "token_strs": {long_json.dumps(self._tokenizer.convert_ids_to_tokens(tokens))}'
        return Reply.whole(f'{{"tokens": {long_json.dumps(tokens)}, {others}}}')

    def _detokenize(self, request_id: str, request: RawRequest) -> Reply:
        # Also what `tokenize` says that the model has not.
        both = replace(self._vocabulary, size=max(self._vocabulary.size, len(self._tokenizer)))
        body = parse_plain(DetokenizeBody, request, self._foreign)
        self._names.check(body.model)
        tokens = both.known(body.tokens, "tokens")
        return Reply.whole(json.dumps({"prompt": self._whole_decoder.decode(list(tokens))}))

    def _open_native(self, request_id: str, request: RawRequest) -> GenerationJob:
        body = parse_native(request, self._foreign)
        if body.stream and body.logprobs is not None:
            raise RequestError("a stream of plain text has no place for logprobs: set stream to false", "logprobs")
        if body.stream and body.details(is_chat=False):
            name = "return_token_ids" if body.return_token_ids else "prompt_logprobs"
            raise RequestError(f"a stream of plain text has no place for {name}: set stream to false", name)
        answer = TextStream() if body.stream else WholeText()
        prompt = self._prompt_tokens(body.prompt, body)
        return self._run(request_id, [prompt], body, body.temperature, answer)

    def _open_completion(self, request_id: str, request: RawRequest) -> GenerationJob:
        body = parse_completion(request, self._foreign)
        self._names.check(body.model)
        num_choices = self._num_choices(body, len(body.prompts))
        name = _name_of(request_id, request)
        answer: Answer = Completion(name, self._name, num_choices)
        if body.stream:
            answer = CompletionStream(name, self._name, num_choices, **_usage_options(body))
        prompts = [self._prompt_tokens(own, body) for own in body.prompts]
        echoes: list[Echo] | None = None
        if body.echo:
            is_all, is_whole = body.most_tokens == 0, body.truncate_prompt_tokens is None
            texts = [
                own if isinstance(own, str) and is_whole else self._text(ids, is_all)
                for own, ids in zip(body.prompts, prompts, strict=True)
            ]
            echoes = [Echo(text, is_all) for text in texts]
        return self._run(request_id, prompts, body, self._temperature(body), answer, echoes)

    def _open_chat(self, request_id: str, request: RawRequest) -> GenerationJob:
        body = parse_chat(request, self._foreign)
        self._names.check(body.model)
        num_choices = self._num_choices(body, 1)
        offer = body.offer()
        text = self._chat_text(body, offer)
        turn = self._turns.open(offer, text, body.continued_text(), body.form())
        if turn.form is not None:
            body.refuse_to_go_on_behind(turn.form)
        readers = turn.readers(num_choices)
        name = _name_of(request_id, request)
        answer: Answer = ChatCompletion(name, self._name, num_choices, readers)
        if body.stream:
            answer = ChatCompletionStream(name, self._name, num_choices, readers, **_usage_options(body))
        prompt = body.truncated(self._tokens(text, body, "messages"), self._max_model_len)
        return self._run(request_id, [prompt], body, self._temperature(body), answer, turn=turn)

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
        self._refuse_where_full(num_choices)  # now too, before there is any work
        return num_choices

    def _prompt_tokens(self, prompt: str | list[int], body: NativeBody | CompletionBody) -> list[int]:
        if isinstance(prompt, str):  # an empty one has no tokens, though a tokenizer may begin each with one of its own
            prompt = self._tokens(prompt, body, "prompt") if prompt else []
        tokens = body.truncated(prompt, self._max_model_len)
        room_behind(len(tokens), body.most_tokens, self._max_model_len)  # before anything is done with all of them
        return tokens

    def _tokens(self, text: str, body: GeneratingBody, parameter: str) -> list[int]:
        if body.truncate_prompt_tokens is None:
            self._refuse_too_long(text, parameter)
        return self._encoder.encode(text, body.add_special_tokens)

    def _refuse_too_long(self, text: str, parameter: str) -> None:
        """
        Raises:
            RequestError: a text cannot have so few tokens that it fits. To find out how many costs seconds.
        """
        fewest = self._encoder.fewest_tokens(text)
        if fewest > self._max_model_len:
            raise ContextLengthError(
                f"This model's maximum context length is {self._max_model_len} tokens (max_model_len), but the prompt "
                f"has at least {fewest} tokens: shorten it",
                parameter,
            )

    def _text(self, token_ids: list[int], is_all: bool) -> str:
        """A prompt's; the beginning of a character at its end is the answer's, unless none comes."""
        known = list(self._vocabulary.known(token_ids, "prompt"))
        return self._decoder.decode(known) if is_all else self._decoder.complete_text(known)

    def _chat_text(self, body: ConversationBody, offer: Offer | None) -> str:
        messages, tools = self._turns.conversation(plain_messages(body.messages), offer)
        return self._chat_template.render(
            messages,
            tools,
            body.template_variables(),
            add_generation_prompt=body.begins_an_answer,
            continue_final_message=body.continue_final_message,
        )

    def _temperature(self, body: CompletionBody | ChatBody) -> float:
        return self._defaults.temperature if body.temperature is None else body.temperature

    def _ways_to_text(self, skip_special_tokens: bool, turn: Turn | None) -> tuple[TextDecoder, dict[int, str]]:
        """How an answer's tokens become text, and the names of those that show in none."""
        if not skip_special_tokens:
            return self._whole_decoder, {}
        if turn is None or turn.decoder is None:
            return self._decoder, self._special_names
        hidden = self._special_names.keys() - turn.shown_ids
        return turn.decoder, {token_id: self._special_names[token_id] for token_id in hidden}

    def _run(
        self,
        request_id: str,
        prompts: Sequence[list[int]],
        body: GeneratingBody,
        temperature: float,
        answer: Answer,
        echoes: Sequence[Echo] | None = None,
        turn: Turn | None = None,
    ) -> GenerationJob:
        """Hand the choices of all prompts to the engine. Nothing is handed over where anything is refused."""
        num_answers = 1 if isinstance(body, NativeBody) else body.num_choices
        num_choices = num_answers * len(prompts)
        # Where the body has no seed, each prompt gets one of its own: two that are alike are not to be answered alike.
        clamps = self._clamps_max_tokens
        params = [body.generation_params(temperature, random.getrandbits(64), self._defaults, clamps) for _ in prompts]
        stops = body.stop_strings()
        ends = tuple(token_id for token_id, name in self._special_names.items() if name in stops)
        params = [replace(own, stop_token_ids=(*own.stop_token_ids, *ends)) for own in params] if ends else params
        form = body.form() if turn is None or turn.form is None else turn.form
        forms = [None] * num_choices if form is None else self._guides.make(form, num_choices)
        guides = self._token_limits.limited(forms, body.allowed_token_ids, body.bad_words)
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
        decoder, names = self._ways_to_text(body.skip_special_tokens, turn)
        prompt_ends = [decoder.end_of(own.prompt_ids, form is not None) for own in requests[::num_answers]]
        choices = [
            Choice(
                own,
                decoder,
                StopStrings(stops, body.include_stop_str_in_output, names),
                texts,
                echoes[number // num_answers] if echoes else None,
                prompt_ends[number // num_answers],
                body.num_logprobs,
            )
            for number, own in enumerate(requests)
        ]
        limits = [seconds for seconds in (body.timeout, self._max_seconds) if seconds is not None]
        with self._admission:
            self._refuse_where_full(num_choices)
            if not self.engine.submit(*requests, seconds=min(limits, default=None), is_reserved=True):
                raise RequestError("its client has left")  # which nobody reads
        wanted = body.details(isinstance(body, ChatBody))
        details = TokenDetails(wanted, requests, self._texts) if wanted else None
        return GenerationJob(answer, choices, num_answers, self.engine, details)

    def _refuse_where_full(self, num_choices: int) -> None:
        """
        Raises:
            BusyError: so many are open beside this request, which is one of those that are, that it does not fit.
        """
        num_others = self.engine.num_open - 1
        if num_others + num_choices > self._most_open:
            raise BusyError(
                f"{num_others} of {self._most_open} requests (max_num_seqs and max_num_waiting) are open "
                f"already, {num_choices} more do not fit: try again later"
            )


def _name_of(request_id: str, request: RawRequest) -> str:
    """The client's own for a request, where it has one."""
    own = request.headers.get("x-request-id", "")
    return own if _OWN_ID.fullmatch(own) else request_id


def _usage_options(body: CompletionBody | ChatBody) -> dict[str, Any]:
    options = body.stream_options
    return {
        "include_usage": options is not None and (options.include_usage or options.continuous_usage_stats),
        "has_usage_in_each": options is not None and options.continuous_usage_stats,
    }
