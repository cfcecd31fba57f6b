"""How one chat request is answered: what its answers must be, how their tokens become text, and who reads that."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers.utils.chat_parsing.response_templates import ResponseTemplate

from ts_parallel.errors import RequestError
from ts_parallel.serving.chat.enforce import calls_grammar
from ts_parallel.serving.chat.formats import (
    CALLS,
    REASONING,
    ChatFormat,
    choose_format,
    format_for_all,
    nearest_family,
    special_tokens,
    template_text,
)
from ts_parallel.serving.chat.reader import AnswerReader, Called
from ts_parallel.serving.chat.regions import Regions
from ts_parallel.serving.chat.tools import Offer
from ts_parallel.serving.chat.words import in_words
from ts_parallel.serving.text.detokenizer import TextDecoder
from ts_parallel.serving.text.forms import Form

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Turn:
    """One request's answers."""

    decoder: TextDecoder | None = None
    """Where their text is another than usual: some special tokens show in it."""
    shown_ids: frozenset[int] = frozenset()
    """Those tokens."""
    form: Form | None = None
    """What they must be, beside or instead of what the request says."""
    make_reader: Callable[[], AnswerReader] | None = None
    """For each of them; None where all that they are is content."""

    def readers(self, num_answers: int) -> list[AnswerReader] | None:
        return None if self.make_reader is None else [self.make_reader() for _ in range(num_answers)]


class MarkedTokenizer:
    """A tokenizer in whose texts those special tokens show that are markers, and no others."""

    def __init__(self, tokenizer: Any, marker_ids: frozenset[int], hidden_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden_ids - marker_ids

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        shown = [own for own in token_ids if not skip_special_tokens or own not in self._hidden]
        text: str = self._tokenizer.decode(shown, skip_special_tokens=False)
        return text


class Turns:
    """Opens turns in a model's format. Owns what of the tokenizer they share."""

    def __init__(
        self, tokenizer: Any, eos_ids: frozenset[int], chat_format: str = "auto", *, split_reasoning: bool = True
    ) -> None:
        """
        Args:
            chat_format: `auto`, `none` or a family's name.
            split_reasoning: whether reasoning is told apart from content.

        Raises:
            ConfigError: there is no such format.
        """
        self._tokenizer, self._eos_ids = tokenizer, eos_ids
        self._is_off = chat_format == "none"
        self._splits_reasoning = split_reasoning
        self._special = special_tokens(tokenizer)
        own = choose_format(tokenizer, chat_format)
        self._format = own if own is None or own.written is not None else self._with_way_to_write(own)
        self._for_all = format_for_all(tokenizer)
        template = template_text(tokenizer)
        self._is_told_in_words = "tools" not in template
        self._shows_calls = "tool_calls" in template
        self._has_system = "system" in template
        self._decoders: dict[frozenset[int], TextDecoder] = {}
        if self._is_off:
            logger.info("chat answers are not parsed: chat_format is none")
        elif self._format is None:
            how = ", tools are told in words" if self._is_told_in_words else ", calls are read where one is required"
            logger.info("chat answers are of no known format by their tokenizer%s (chat_format)", how)
        else:
            logger.info("chat answers are parsed as %s: %s (chat_format)", self._format.name, self._format.reason)

    def conversation(
        self, messages: Sequence[Mapping[str, Any]], offer: Offer | None
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        """Messages and tools as the chat template gets them, which may know nothing of tools, or only of calls: these
        it shows as it does, where no tools are to be told of."""
        tools = None if offer is None else list(offer.tools)
        is_as_it_shows = self._shows_calls and not tools
        if self._is_off or not self._is_told_in_words or is_as_it_shows:
            return [dict(message) for message in messages], tools
        own = self._format if self._format is not None and self._has_calls(self._format) else self._for_all
        assert own.written is not None
        return in_words(messages, tools or [], own.written, has_system=self._has_system), None

    def open(self, offer: Offer | None, prompt: str, continued: str | None = None, form: Form | None = None) -> Turn:
        """How a request with this prompt is answered.

        Args:
            continued: the message that the answer goes on with.
            form: what an answer must be that calls nothing.

        Raises:
            RequestError: calls are asked for that cannot be had.
        """
        own = self._format_for(offer)
        template = own and own.regions(with_calls=offer is not None, with_reasoning=self._splits_reasoning)
        if own is None or template is None:
            return Turn()
        opening = own.opening_of(prompt, continued)
        tools = list(offer.tools) if offer is not None else []
        markers = own.marker_ids(self._special) - self._eos_ids
        return Turn(
            self._decoder(markers) if markers else None,
            markers,
            None if offer is None else self._form(own, template, offer, opening, form),
            lambda: AnswerReader(own, template, opening, tools),
        )

    def _format_for(self, offer: Offer | None) -> ChatFormat | None:
        """The one to read answers in, which models without any must be made to write."""
        if offer is not None and offer.must_call and self._is_off:
            raise RequestError("tool_choice asks for a call, and chat_format is none: set it to auto", "tool_choice")
        own = self._format
        if offer is None or (own is not None and self._has_calls(own)):
            return own
        return self._for_all if offer.must_call or (self._is_told_in_words and not self._is_off) else own

    def _has_calls(self, own: ChatFormat) -> bool:
        """Whether the model can be made to write calls in the format, or told to: one tag for each argument takes more
        words than there are."""
        if own.written is None or CALLS not in own.fields:
            return False
        return not (self._is_told_in_words and "argument" in own.written)

    def _form(
        self, own: ChatFormat, template: ResponseTemplate, offer: Offer, opening: str, form: Form | None
    ) -> Form | None:
        is_enforced = (
            offer.must_call or not offer.may_be_many or any(function.is_strict for function in offer.functions)
        )
        if form is not None and not offer.must_call and form.kind != "json":
            return form  # which leaves no room for a call
        if CALLS not in own.fields or not (is_enforced or form is not None):
            return form
        if own.written is None:
            if form is None and not offer.may_be_many:
                raise RequestError(
                    f"the model's format, {own.name}, has no way to keep calls to one: leave parallel_tool_calls out",
                    "parallel_tool_calls",
                )
            return form
        thinks = Regions(template, opening).begins_in in REASONING
        otherwise = None if form is None else {} if form.value is True else form.value
        if isinstance(otherwise, bool):
            return form
        special = {name: token_id for token_id, name in self._special.items()}
        ends = sorted(self._eos_ids)
        grammar = calls_grammar(own, offer, special, ends=ends, thinks=thinks, otherwise=otherwise)
        return Form("grammar", grammar, "tool_choice" if offer.must_call else "tools")

    def _decoder(self, markers: frozenset[int]) -> TextDecoder:
        if markers not in self._decoders:
            hidden = frozenset(self._special)
            self._decoders[markers] = TextDecoder(MarkedTokenizer(self._tokenizer, markers, hidden))
        return self._decoders[markers]

    def _with_way_to_write(self, own: ChatFormat) -> ChatFormat:
        """A format that the tokenizer describes says how to read calls, not how to write them: the family's way is
        taken if the format reads it."""
        family = nearest_family(self._tokenizer)
        if CALLS not in own.fields or family is None or family.written is None:
            return own
        written = family.written
        call = written["call"].replace("$name", "f").replace("$arguments", "" if "argument" in written else "{}")
        text = written.get("before", "") + call + written.get("after", "")
        template = own.regions(with_calls=True, with_reasoning=True)
        assert template is not None
        reader = AnswerReader(own, template, "", [{"type": "function", "function": {"name": "f"}}])
        deltas = [*reader.add(text), *reader.end(False)]
        is_read = [delta.name for delta in deltas if isinstance(delta, Called)] == ["f"]
        return replace(own, written=written) if is_read else own
