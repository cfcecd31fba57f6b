"""Chat templates that never end, or make more than there is memory for: a 400 of that request, and streams go on."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_client import events
from places import DEMO_MODEL
from small_service import SmallService, checkpoint_with, small_service
from transformers import AutoTokenizer

from ts_parallel.errors import RequestError
from ts_parallel.serving.openai.templates import chat_template
from ts_parallel.serving.openai.templates.chat_template import ChatTemplate
from ts_parallel.serving.openai.templates.sandbox import (
    LONGEST_SOURCE,
    Budget,
    TakesLongError,
    TemplateBoundError,
    bounded,
)

SHOWN = "{% for m in messages %}{{ m.content }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "hi"}]
THOUSANDS = "{% set r = range(99999) %}"
ENDLESS = {
    "loops in loops": THOUSANDS
    + "{% for i in r %}{% for j in r %}{% for k in r %}{% endfor %}{% endfor %}{% endfor %}",
    "loops that write": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "loops over a text": "{% set t = 'ab' * 50000 %}{% for i in t %}{% for j in t %}{% endfor %}{% endfor %}",
    "loops with a condition": THOUSANDS + "{% for i in r if i < 0 %}{% endfor %}" * 400,
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "a loop that calls itself": (
        "{% for i in [1, 2] recursive %}{% if loop.depth < 60 %}{{ loop([1, 2]) }}{% endif %}{% endfor %}"
    ),
    "filters over and over": "{% for i in range(99999) %}{{ range(99999) | map('string') | list }}{% endfor %}",
}
HUGE = {
    "a text times a number": "{{ 'x' * 10 ** 10 }}",
    "a list times a number": "{{ [1] * 10 ** 10 }}",
    "a power": "{{ 10 ** (10 ** 9) }}",
    "a product": "{% set ns = namespace(n=99999) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "twice as long each time": (
        "{% set ns = namespace(t='xy') %}{% for i in range(99) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}"
    ),
    "the same by a plus": (
        "{% set ns = namespace(t='xy') %}{% for i in range(99) %}{% set ns.t = ns.t + ns.t %}{% endfor %}"
    ),
    "lists that grow": (
        "{% set ns = namespace(t=[1]) %}{% for i in range(99) %}{% set ns.t = ns.t + ns.t %}{% endfor %}"
    ),
    "all that is written": "{% set t = 'x' * 999999 %}{% for i in range(9999) %}{{ t }}{% endfor %}",
    "the same in a block": (
        "{% set t = 'x' * 999999 %}{% set u %}{% for i in range(9999) %}{{ t }}{% endfor %}{% endset %}"
    ),
    "a method that fills up": "{{ 'x'.ljust(10 ** 10) }}",
    "zeros": "{{ 'x'.zfill(10 ** 10) }}",
    "tabs": "{{ ('\\t' * 99999).expandtabs(99999) }}",
    "a method that replaces": "{{ ('x' * 99999).replace('x', 'y' * 99999) }}",
    "a method that joins": "{{ ('x' * 99999).join(range(99999) | map('string') | list) }}",
    "a method that joins what comes": "{{ ('x' * 99999).join(range(99999) | map('string')) }}",
    "a format": "{{ '{:99999999999}'.format('x') }}",
    "a format within a format": "{{ '{:{}}'.format('x', 99999999999) }}",
    "percent": "{{ '%99999999999d' % 1 }}",
    "percent and a star": "{{ '%*d' % (99999999999, 1) }}",
    "the filter center": "{{ 'x' | center(10 ** 10) }}",
    "the filter indent": "{{ ('x\\n' * 99999) | indent(999) }}",
    "the filter tojson": "{{ messages | tojson(indent=10 ** 10) }}",
    "the filter join": "{{ range(99999) | join('x' * 99999) }}",
    "the filter replace": "{{ ('x' * 99999) | replace('x', 'y' * 99999) }}",
    "the filter format": "{{ '%99999999999d' | format(1) }}",
    "the filter slice": "{{ [1] | slice(10 ** 10) | list }}",
    "the filter batch": "{{ [1] | batch(10 ** 10, 0) | list }}",
    "words of nobody": "{{ lipsum(n=10 ** 10) }}",
}


@pytest.mark.parametrize("source", [*ENDLESS.values(), *HUGE.values()], ids=[*ENDLESS, *HUGE])
def test_template_without_bounds_is_refused_for_this_request(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_MOST_SECONDS", 0.3)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL, local_files_only=True)
    tokenizer.chat_template = SHOWN + source
    template = ChatTemplate(tokenizer)
    begin = time.thread_time()
    with pytest.raises(RequestError, match="chat template refuses the messages") as refusal:
        template.render(MESSAGES)
    assert refusal.value.status == 400 and len(str(refusal.value)) < 700
    assert time.thread_time() - begin < 10  # of which 0.3 are allowed
    # What was found is of this template alone.
    tokenizer.chat_template = SHOWN
    assert template.render(MESSAGES) == "hi"


def test_template_that_is_too_long_is_not_compiled() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL, local_files_only=True)
    tokenizer.chat_template = SHOWN + "{{ 1 }}" * (LONGEST_SOURCE // 7 + 1)
    with pytest.raises(RequestError, match=f"at most {LONGEST_SOURCE}"):
        ChatTemplate(tokenizer).render(MESSAGES)


# What templates of real models do, and more of it than they do.
RIGHT = {
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}{% endfor %}": "1/2,2/2",
    "{{ messages | map(attribute='content') | join('|') }}": "hi|yes",
    "{{ '|'.join(messages | map(attribute='role')) }}": "user|assistant",
    "{% for m in messages if m.role == 'user' %}{{ m.content ~ '!' ~ 5 }}{% else %}none{% endfor %}": "hi!5",
    "{% for m in none_there %}x{% else %}none{% endfor %}": "none",
    "{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}{{ v }}{% endfor %}": "a1b2",
    "{% for a in [1, [2, [3]]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}": "123",
    "{{ 123456 | tojson }}{{ 99999.7 | round | int }}{{ '%05d' % 42 }}{{ '%s' | format('x') }}": "12345610000000042x",
    "{{ '{:>5}|{:.2f}'.format('x', 1.5) }}": "    x|1.50",
    "{{ messages[::-1][0].content.upper().split('E') }}": "['Y', 'S']",
    "{{ ('a\\nb') | indent(2) }}{{ 7 // 2 }}{{ 2 ** 10 }}{{ 7 % 4 }}{{ -3 }}": "a\n  b310243-3",
    "{% set ns = namespace(n=0) %}{% for i in range(500) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}": "124750",
    "{% macro f(x, obj='', context='') %}<{{ x }}{{ obj }}>{% endmacro %}{{ f('a', obj='b') }}": "<ab>",
    "{% for x in 'abc' | batch(2) %}{{ x }}{% endfor %}{{ ['b', 'a'] | sort }}": "['a', 'b']['c']['a', 'b']",
    "{% for x in [3, 1] %}{% if loop.first %}{{ loop.nextitem }}{% endif %}{{ loop.revindex }}{% endfor %}": "121",
    "{% for x in [1, 2, 3] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{% endfor %}": "13",
}


@pytest.mark.parametrize("source", RIGHT)
def test_template_within_its_bounds_makes_what_it_makes_without_any(source: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL, local_files_only=True)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    with bounded(Budget(60, 1 << 20)):
        assert tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False) == RIGHT[source]
    assert tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False) == RIGHT[source]


def test_long_conversation_is_rendered_by_a_template_that_writes_it_piece_by_piece() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL, local_files_only=True)
    tokenizer.chat_template = (
        "{% set ns = namespace(t='') %}{% for m in messages %}"
        "{% set ns.t = ns.t + m.role + ': ' + m.content + '\\n' %}{% endfor %}{{ ns.t }}"
    )
    messages = [{"role": "user", "content": f"{number} {'a' * 100}"} for number in range(1000)]
    prompt = ChatTemplate(tokenizer).render(messages)
    assert prompt == "".join(f"{own['role']}: {own['content']}\n" for own in messages)


def test_budget_is_of_one_thread_alone() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL, local_files_only=True)
    made: list[str] = []

    def render() -> None:
        source = "{{ 'x' * 100 }}"
        made.append(tokenizer.apply_chat_template(MESSAGES, chat_template=source, tokenize=False))

    with bounded(Budget(60, 10)):
        other = threading.Thread(target=render)
        other.start()
        other.join()
        with pytest.raises(TemplateBoundError):
            render()
    assert made == ["x" * 100]


def test_template_that_was_quick_and_is_not_for_one_request_is_asked_again_where_it_has_time() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL, local_files_only=True)
    tokenizer.chat_template = SHOWN + "{% for i in range(times or 0) %}{% for j in range(99) %}{% endfor %}{% endfor %}"
    template = ChatTemplate(tokenizer)
    assert template.takes_long
    for _ in range(20):  # of which one is quick, however busy the machine is
        template.render(MESSAGES)
    assert not template.takes_long
    long = {"times": 9999}
    with pytest.raises(TakesLongError):
        template.render(MESSAGES, variables=long)
    assert template.takes_long
    assert template.render(MESSAGES, variables=long) == "hi"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallService]:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL, local_files_only=True)
    tokenizer.chat_template = SHOWN + "{% if endless %}" + ENDLESS["loops in loops"] + "{% endif %}"
    folder = checkpoint_with(tmp_path_factory.mktemp("served") / "model", tokenizer)
    with small_service(folder, tokenizer) as own:
        yield own


def test_stream_goes_on_while_templates_do_not_end(served: SmallService) -> None:
    body = {"prompt": "def", "max_tokens": 200, "ignore_eos": True, "temperature": 0, "stream": True}
    _, alone = served.read(*served.open("v1/completions", body))
    chat = {"messages": MESSAGES, "max_tokens": 1, "chat_template_kwargs": {"endless": True}}
    for _ in range(20):  # until it is thought to be quick
        assert served.send("v1/chat/completions", messages=MESSAGES, max_tokens=1)[0] == 200
    stream = served.open("v1/completions", body)
    endless = [served.open("v1/chat/completions", chat) for _ in range(3)]
    _, pieces = served.read(*stream)
    assert texts(pieces) == texts(alone)
    for own in endless:
        status, (refusal,) = served.read(*own)
        assert status == 400
        assert "processor time" in json.loads(refusal)["error"]["message"]
    assert served.send("v1/chat/completions", messages=MESSAGES, max_tokens=1)[0] == 200


def texts(pieces: list[str]) -> str:
    return "".join(own["choices"][0]["text"] for own in events("".join(pieces)) if own != "[DONE]" and own["choices"])


def test_source_of_the_package_has_the_one_place_where_templates_are_compiled() -> None:
    """Nobody compiles one beside the sandbox."""
    package = Path(__file__).parents[3] / "ts_parallel"
    users = [file.name for file in package.rglob("*.py") if "jinja2" in file.read_text()]
    assert users == ["sandbox.py"]
