"""Answers in a wanted form: a JSON schema, a regular expression, a choice or a grammar, by llguidance.

A guide says before each token which ones keep the answer within its form. It lives beside its request, where the tokens
are counted, and its masks travel with the step plan: so it needs no rank of its own, and survives a preemption.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from typing import Any

from ts_parallel.errors import RequestError
from ts_parallel.serving.text.form_vocabulary import FormVocabulary
from ts_parallel.serving.text.forms import Form, FormKind

logger = logging.getLogger(__name__)

# One space, or a new line that is indented: a greedy model that may put more there is known to go on with it for ever.
WHITESPACE = r"\x20|\n(\x20{0,32}|\t{0,8})"
_LONGEST_MESSAGE = 300
# A form is compiled beside the streams: up to these limits mostly in less than 0.1 s, 0.7 s at the worst found.
MOST_CHOICES = 4096
_MOST_ITEMS_IN_A_ROW = 2 * MOST_CHOICES  # which they are while all of them begin alike; its own 2000 ends the answer
LONGEST_FORM = 65536  # characters, of a schema or of all choices as JSON


class Guide:
    """One answer's guide, an `engine.request.TokenGuide`. Owns a matcher of llguidance's."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def is_finished(self) -> bool:
        stopped: bool = self._matcher.is_stopped()
        return stopped

    @property
    def error(self) -> str | None:
        """Why it cannot go on, where the form became too complex on the way."""
        return _reason(self._matcher.get_error()) or None

    def allowed(self) -> bytes:
        mask: bytes = self._matcher.compute_bitmask()
        return mask + bytes(-len(mask) % 8)

    def accept(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)


class GuideMaker:
    """Makes guides, in any thread. Owns the vocabulary as llguidance wants it, from the first request that needs
    one."""

    def __init__(self, tokenizer: Any, eos_ids: frozenset[int], num_tokens: int) -> None:
        """
        Args:
            num_tokens: of the model, which may be fewer than the tokenizer's.
        """
        self._tokenizer = tokenizer
        self._eos_ids = sorted(eos_ids)
        self._num_tokens = num_tokens
        self._vocabulary: Any = None
        self._lock = threading.Lock()

    def make(self, form: Form, num_guides: int) -> list[Guide]:
        """Guides that know nothing of one another.

        Raises:
            RequestError: the form is no valid one, is too long or too complex, or nothing could ever be of it.
        """
        text = _text(form)
        # Most servers never need it: neither the library nor a second copy of the vocabulary is worth their memory.
        import llguidance

        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._read_vocabulary(form.parameter)
        limits = llguidance.LLParserLimits(verbose_errors=False, max_items_in_row=_MOST_ITEMS_IN_A_ROW)
        try:
            grammar = _grammar(form.kind, text)
        except ValueError as error:
            raise RequestError(f"{form.parameter}: {_reason(str(error))}", form.parameter) from None
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # which may be too much for its limits
        if matcher.is_error():
            raise RequestError(f"{form.parameter}: {_reason(matcher.get_error())}", form.parameter)
        if matcher.is_stopped():
            raise RequestError(f"{form.parameter}: no answer is of this form", form.parameter)
        return [Guide(matcher.deep_copy()) for _ in range(num_guides)]

    def _read_vocabulary(self, parameter: str) -> Any:
        import llguidance

        if getattr(self._tokenizer, "backend_tokenizer", None) is None or not self._eos_ids:
            raise RequestError(
                f"{parameter}: needs a fast tokenizer and an end token, which this model has not", parameter
            )
        started = time.perf_counter()
        try:
            own = FormVocabulary(self._tokenizer, self._num_tokens, self._eos_ids[0])
            vocabulary = llguidance.LLTokenizer(llguidance.TokenizerWrapper(own), eos_token=self._eos_ids)
        except ValueError as error:
            raise RequestError(f"{parameter}: the model's tokenizer: {_reason(str(error))}", parameter) from None
        logger.info("read the vocabulary for structured output in %.2f s", time.perf_counter() - started)
        return vocabulary


def _text(form: Form) -> str:
    """The form as llguidance reads it.

    Raises:
        RequestError: it is longer than it may be.
    """
    if form.kind == "choice" and len(form.value) > MOST_CHOICES:
        raise RequestError(
            f"{form.parameter}: {len(form.value)} choices, at most {MOST_CHOICES} can be chosen from", form.parameter
        )
    try:
        value: Any = {} if form.kind == "json" and form.value is True else form.value
        text: str = json.dumps(value) if form.kind in ("json", "choice") else value
    except RecursionError:
        raise RequestError(f"{form.parameter}: nested too deep", form.parameter) from None
    if len(text) > LONGEST_FORM:
        raise RequestError(
            f"{form.parameter}: {len(text)} characters, at most {LONGEST_FORM} are compiled", form.parameter
        )
    return text


def _grammar(kind: FormKind, text: str) -> str:
    """In llguidance's own notation.

    Raises:
        ValueError: it has none.
    """
    import llguidance

    grammar: str
    if kind == "json":
        grammar = llguidance.LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": WHITESPACE})
    elif kind == "regex":
        grammar = llguidance.LLMatcher.grammar_from_regex(text)
    else:
        grammar = llguidance.grammar_from(kind, text)
    return grammar


def _reason(message: str) -> str:
    """What a client needs of an error: one line, without the place in the grammar or in llguidance's own code."""
    line = next((line.strip() for line in message.splitlines() if line.strip()), "")
    return "too complex" if line.startswith("panic") else line[:_LONGEST_MESSAGE]
