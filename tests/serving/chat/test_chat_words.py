"""A template that knows no tools is told of them in words, in the form that answers are read in."""

from __future__ import annotations

import json
from typing import Any

import pytest
from chat_answers import TOOLS
from chat_tokenizers import chat_tokenizer

from ts_parallel.serving.chat.reader import Called
from ts_parallel.serving.chat.tools import offer_of
from ts_parallel.serving.chat.turns import Turns
from ts_parallel.serving.openai.fields.messages import plain_messages
from ts_parallel.serving.openai.templates.chat_template import ChatTemplate

PLAIN = "{% for message in messages %}[{{ message.role }}] {{ message.content + '' }}\n{% endfor %}[assistant] "
ALTERNATING = (
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant take turns') }}{% endif %}[{{ message.role }}] {{ message.content }}\n"
    "{% endfor %}[assistant] "
)
CALLS: Any = [
    {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}},
    {"id": "b", "type": "function", "function": {"name": "now", "arguments": "{}"}},
]
MESSAGES: Any = [
    {"role": "user", "content": "How is it?"},
    {"role": "assistant", "content": None, "tool_calls": CALLS},
    {"role": "tool", "tool_call_id": "a", "content": "sunny"},
    {"role": "tool", "tool_call_id": "b", "content": "noon"},
]


def turns_of(template: str, **markers: Any) -> tuple[Any, Turns]:
    tokenizer = chat_tokenizer(template=template, **markers)
    return tokenizer, Turns(tokenizer, frozenset({tokenizer.eos_token_id}))


def prompt_of(template: str, messages: Any, tools: Any = TOOLS, **markers: Any) -> str:
    tokenizer, turns = turns_of(template, **markers)
    own, told = turns.conversation(plain_messages(messages), offer_of(tools, "auto", None))
    assert told is None
    return ChatTemplate(tokenizer).render(own, told)


def test_functions_calls_and_results_are_in_the_prompt() -> None:
    template = f"{{# system #}}{PLAIN}"
    prompt = prompt_of(template, MESSAGES)
    system, user, *calls, results, more, last = prompt.rsplit("\n", 6)
    assert system.startswith("[system] ") and all(json.dumps(own["function"]) in system for own in TOOLS)
    assert '{"name": "NAME", "arguments": ARGUMENTS}' in system
    assert user == "[user] How is it?"
    written = ['{"name": "get_weather", "arguments": {"city": "Paris"}}', '{"name": "now", "arguments": {}}']
    assert calls == [f"[assistant] {written[0]}", written[1]]
    assert (results, more, last) == ("[user] get_weather returned: sunny", "now returned: noon", "[assistant] ")


def test_first_message_says_it_where_a_template_has_no_system() -> None:
    prompt = prompt_of(ALTERNATING, MESSAGES)
    assert prompt.startswith("[user] You can call functions.") and "How is it?\n[assistant] {" in prompt


def test_call_is_asked_for_in_the_familys_form() -> None:
    prompt = prompt_of(PLAIN, MESSAGES, added=("<tool_call>", "</tool_call>"))
    assert '<tool_call>\n{"name": "NAME", "arguments": ARGUMENTS}\n</tool_call>' in prompt
    assert '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>' in prompt


def test_history_is_told_though_there_are_no_tools_any_more() -> None:
    prompt = prompt_of(PLAIN, MESSAGES, tools=None)
    assert "You can call" not in prompt and "get_weather returned: sunny" in prompt


def test_template_that_reads_tools_gets_them() -> None:
    _, turns = turns_of("{{ tools }}{{ messages }}")
    offer = offer_of(TOOLS, "auto", None)
    assert turns.conversation(MESSAGES, offer) == (MESSAGES, TOOLS)


@pytest.mark.parametrize(("text", "name"), [('{"name": "now", "arguments": {}}', "now"), ('{"name": "x"}', None)])
def test_answer_in_the_form_that_the_words_ask_for_is_a_call(text: str, name: str | None) -> None:
    _, turns = turns_of(PLAIN)
    (reader,) = turns.open(offer_of(TOOLS, "auto", None), "").readers(1) or []
    deltas = [*reader.add(text), *reader.end(False)]
    assert [own.name for own in deltas if isinstance(own, Called)] == ([name] if name else [])
