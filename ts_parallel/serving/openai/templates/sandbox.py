"""The sandbox in which chat templates run: transformers' own, in which a template may also not take what it likes.

A template is a program that comes with a checkpoint, and a thread cannot be ended from outside. So all that can take
long or grow is counted where Jinja lets us: each turn of a loop, each call, attribute and filter; before an operator, a
method or a filter makes something long of something short, how long that would be; and all text that is made. What a
template computes within its bounds is what it computes without any.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

LONGEST_SOURCE = 1 << 20
"""Characters of a template: to compile more keeps all threads waiting."""
_MOST_BITS = 4096  # of a whole number
_MOST_IN_ALL = 1 << 29  # characters and items of all that one rendering makes, be it thrown away
_TURNS_PER_LOOK = 64  # at the clock
# Of `%` and of `format`: a value of more than 9999 characters, or of as many as another value says.
_WIDE_PERCENT = re.compile(r"%[-#0 +.\d]*(?:\d{5}|\*)")
_WIDE_BRACES = re.compile(r"\{[^{}]*:[^{}]*(?:\d{5}|\{)")
_KEPT_TEMPLATES = 64
# What a filter makes of a text and a number may be as long as the text has lines, or items, times the number.
_WIDE_FILTERS = ("batch", "center", "indent", "slice", "tojson", "wordwrap", "round")
_WIDEST = 1000
_PADDING = ("ljust", "rjust", "center", "zfill", "expandtabs")


class TemplateBoundError(SecurityError):
    """A template takes more than it may."""


class TakesLongError(Exception):
    """A template takes more time than those can wait for it who are answered beside."""


class Budget:
    """What one rendering may take yet."""

    def __init__(self, seconds: float, most_letters: int, error: type[Exception] = TemplateBoundError) -> None:
        """
        Args:
            seconds: of processor time, of this thread's.
            most_letters: of one text, or items of one list.
            error: what to raise where the time is over.
        """
        self._seconds = seconds
        self._begin = time.thread_time()
        self._most = most_letters
        self._left = max(_MOST_IN_ALL, 8 * most_letters)
        self._turns = 0
        self._error = error

    @property
    def seconds_taken(self) -> float:
        return time.thread_time() - self._begin

    def turn(self) -> None:
        """
        Raises:
            Exception: the time is over.
        """
        self._turns += 1
        if self._turns % _TURNS_PER_LOOK == 0:
            self.look()

    def look(self) -> None:
        """At the clock."""
        if self.seconds_taken > self._seconds:
            raise self._error(f"it takes more than {self._seconds:g} s of processor time")

    def make(self, length: float) -> None:
        """Something so long is about to be.

        Raises:
            TemplateBoundError: that is too long, or all together is.
        """
        if length > self._most:
            raise TemplateBoundError(f"it makes a text or a list of more than {self._most} characters or items")
        self._left -= int(length)
        if self._left < 0:
            raise TemplateBoundError("it makes more characters and items in all than it may")


class _Running(threading.local):
    budget: Budget | None = None


_running = _Running()


@contextmanager
def bounded(budget: Budget) -> Iterator[None]:
    """What this thread renders inside, it renders within the budget."""
    before, _running.budget = _running.budget, budget
    try:
        yield
    finally:
        _running.budget = before


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' environment takes this class once it is made, so that it has the filters and globals of that."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _turn()
        _make(_length_of_operation(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        _turn()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        _turn()
        return super().getitem(obj, argument)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _turn()
        if getattr(obj, "__name__", "") == "join" and args and isinstance(args[0], Iterator):
            args = (list(args[0]), *args[1:])  # whose length is known
        _make(_length_of_call(obj, args, kwargs))
        made = super().call(context, obj, *args, **kwargs)
        _make(_length(made))
        return made

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        own = getattr(value, "__self__", None)
        if isinstance(own, str) and getattr(value, "__name__", "") in ("format", "format_map"):
            _refuse_wide(_WIDE_BRACES, own)
        return super().wrap_str_format(value)

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Of all that a template or a macro has written."""
        return _joined(pieces)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        """Loops go round by our leave, and `~` joins by it."""
        for loop in source.find_all(nodes.For):
            loop.iter = _filtered(loop.iter, "counted_by_us")
        for joined in list(source.find_all(nodes.Concat)):
            joined.nodes = [_filtered(nodes.List(list(joined.nodes), lineno=joined.lineno), "joined_by_us")]
        source.set_environment(self)
        return super()._generate(source, *args, **kwargs)


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _turn() -> None:
    if _running.budget is not None:
        _running.budget.turn()


def _make(length: float) -> None:
    if _running.budget is not None and length:
        _running.budget.make(length)


def _counted(items: Any) -> Iterator[Any]:
    for item in items:
        _turn()
        yield item


def _joined(pieces: Iterable[Any]) -> str:
    texts = []
    for piece in pieces:
        _turn()
        text = str(piece)
        _make(len(text))
        texts.append(text)
    _make(sum(map(len, texts)))
    return "".join(texts)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def _length_of_operation(operator: str, left: Any, right: Any) -> float:
    """Of what an operator would make.

    Raises:
        TemplateBoundError: a number that no template needs.
    """
    if isinstance(left, int) and isinstance(right, int):
        bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * max(0, right)}
        if bits.get(operator, 0) > _MOST_BITS:
            raise TemplateBoundError(f"it makes a number of more than {_MOST_BITS} bits")
        return 0
    if operator == "+":
        return _length(left) + _length(right)
    if operator == "*":
        times, items = (left, right) if isinstance(left, int) else (right, left)
        return _length(items) * max(0, times) if isinstance(times, int) else 0
    if operator == "%" and isinstance(left, str):
        _refuse_wide(_WIDE_PERCENT, left)
    return 0


def _length_of_call(obj: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """Of what a text's method would make, where that may be longer than the text."""
    own, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
    if not isinstance(own, str):
        return 0
    if name in _PADDING:
        return len(own) + max([0, *(value for value in (*args, *kwargs.values()) if isinstance(value, int))]) * (
            own.count("\t") or 1
        )
    if name == "replace" and len(args) > 1 and isinstance(args[0], str) and isinstance(args[1], str):
        return len(own) + own.count(args[0]) * len(args[1])
    if name == "join" and args and isinstance(args[0], (list, tuple, str, range)):
        return len(own) * len(args[0]) + sum(map(_length, args[0]))
    return 0


def _refuse_wide(wide: re.Pattern[str], form: str) -> None:
    """
    Raises:
        TemplateBoundError: a form asks for a long text of a short value.
    """
    if wide.search(form):
        raise TemplateBoundError("it asks for a value of more than 9999 characters by its format")


def _guarded(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose settings are small, where it makes long texts by them, and whose texts are counted."""
    at = 1 if hasattr(own, "jinja_pass_arg") else 0  # where its value is among its arguments

    @functools.wraps(own)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _turn()
        if name == "join" and isinstance(args[at], Iterator):
            args = (*args[:at], list(args[at]), *args[at + 1 :])
        _make(_length_of_filter(name, args[at] if len(args) > at else None, [*args[at + 1 :], *kwargs.values()]))
        made = own(*args, **kwargs)
        if isinstance(made, Iterator):
            return _counted(made)
        _make(_length(made))
        return made

    return guarded


def _length_of_filter(name: str, value: Any, settings: list[Any]) -> float:
    """Of what a filter would make, where that may be longer than its value.

    Raises:
        TemplateBoundError: it is asked for more than anybody needs.
    """
    texts = [own for own in settings if isinstance(own, str)]
    if name in _WIDE_FILTERS:
        numbers = [abs(own) for own in settings if isinstance(own, int)]
        widest = max([0, *numbers, *map(len, texts)])
        if widest > _WIDEST:
            raise TemplateBoundError(f"its filter {name!r} is asked for more than {_WIDEST}")
        return len(value) + (value.count("\n") + 1) * widest if isinstance(value, str) else 0
    if name == "format" and isinstance(value, str):
        _refuse_wide(_WIDE_PERCENT, value)
    if name == "replace" and isinstance(value, str) and len(texts) == 2:
        return len(value) + value.count(texts[0]) * len(texts[1])
    if name == "join" and texts and hasattr(value, "__len__"):
        return float(len(value) * len(texts[0]))
    return 0


@functools.lru_cache(maxsize=1)
def _environment() -> _Environment:
    """transformers' own for templates, in our class."""
    environment: Any = _compile("").environment
    environment.__class__ = _Environment
    environment.globals.pop("lipsum", None)
    environment.filters = {name: _guarded(name, own) for name, own in environment.filters.items()}
    environment.filters |= {"counted_by_us": _counted, "joined_by_us": _joined}
    made: _Environment = environment
    return made


@functools.lru_cache(maxsize=_KEPT_TEMPLATES)
def _compile_bounded(source: str) -> Any:
    if len(source) > LONGEST_SOURCE:
        raise TemplateBoundError(f"it has {len(source)} characters, at most {LONGEST_SOURCE} are compiled")
    return _environment().from_string(source)


# The one place where transformers compiles a template, whoever asks for it. Where it is no more, loading fails here.
_compile = chat_template_utils._compile_jinja_template
chat_template_utils._compile_jinja_template = _compile_bounded
