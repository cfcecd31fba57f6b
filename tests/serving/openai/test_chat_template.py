"""Templates of the kinds that models ship get messages as they read them, and none leaves one out unnoticed."""

from __future__ import annotations

from typing import Any

import pytest
from places import DEMO_MODEL
from transformers import AutoTokenizer

from ts_parallel.errors import RequestError
from ts_parallel.serving.openai.fields.messages import plain_messages
from ts_parallel.serving.openai.templates.chat_template import ChatTemplate

# Of the kind of ChatML: shows any role, and the calls of Hermes.
HERMES = (
    "{% if tools %}TOOLS {{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls %}<tool_call>"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen3-Coder, GLM: arguments by name.
ITEMS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for call in m.tool_calls %}"
    "<function={{ call.function.name }}>{% for key, value in call.function.arguments|items %}"
    "<parameter={{ key }}>{{ value }}</parameter>{% endfor %}"
    "</function>{% endfor %}{% endfor %}"
)
# Llama 3.1: one call at most, its text is not shown beside it, and what is not a text is written as JSON.
LLAMA = (
    "{% for m in messages %}{% if 'tool_calls' in m %}{% if m.tool_calls|length != 1 %}"
    "{{ raise_exception('only supports single tool-calls at once!') }}{% endif %}"
    '<|a|>{% set f = m.tool_calls[0].function %}{"name": "{{ f.name }}", "parameters": {{ f.arguments|tojson }}}'
    "{% elif m.role == 'tool' %}<|ipython|>{{ m.content | tojson }}"
    "{% else %}<|{{ m.role }}|>{{ m.content | trim }}{% endif %}{% endfor %}"
)
# DeepSeek V2.5: a message of calls is known by its content, which is none, and arguments are a text.
DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'assistant' and m['content'] is none %}{% for call in m['tool_calls'] %}"
    "<call>{{ call['function']['name'] + ' ' + call['function']['arguments'] }}</call>{% endfor %}"
    "{% else %}<{{ m.role }}>{{ m['content'] }}{% endif %}{% endfor %}"
)
# Kinds that read parts alone, or either.
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
EITHER = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p['text'] }}{% endfor %}{% endif %}{% endfor %}"
)
SYSTEM_TEXT = (
    "{% if messages[0].role == 'system' %}<s>{{ messages[0].content + '' }}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
)
# Gemma: no system; raises where roles do not take turns.
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('take turns') }}"
    "{% endif %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
)
# Shows the roles it knows, and nothing of others.
SILENT = (
    "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}<{{ m.role }}>{{ m.content }}{% endif %}"
    "{% endfor %}"
)
HARMONY = SILENT.replace("('system',", "('system', 'developer',")
# Qwen3: what was thought in earlier turns is left out.
THINKING = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}<no thought>{% endif %}"
)
ALL = (HERMES, ITEMS, LLAMA, DEEPSEEK, PARTS, EITHER, SYSTEM_TEXT, GEMMA, SILENT, HARMONY, THINKING)

USER = {"role": "user", "content": "How much is 3 times 4?"}


def call(arguments: Any = '{"a":3}', **message: Any) -> dict[str, Any]:
    calls = [{"id": "c1", "type": "function", "function": {"name": "mul", "arguments": arguments}}]
    return {"role": "assistant", "content": None, "tool_calls": calls, **message}


def tool(content: Any = "twelve") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "c1", "content": content}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO_MODEL, local_files_only=True)


@pytest.fixture
def render(tokenizer: Any) -> Any:
    def own(template: str, *messages: Any, **options: Any) -> str:
        tokenizer.chat_template = template
        return ChatTemplate(tokenizer).render(plain_messages(messages), **options)

    return own


@pytest.mark.parametrize("template", [HERMES, ITEMS, LLAMA, DEEPSEEK])
@pytest.mark.parametrize("arguments", ['{"a":3}', {"a": 3}])
def test_second_turn_of_a_tool_loop_has_call_and_result(render: Any, template: str, arguments: Any) -> None:
    prompt = render(template, USER, call(arguments), tool())
    assert "mul" in prompt and "twelve" in prompt and "None" not in prompt
    expected = {HERMES: '"arguments": {"a": 3}', ITEMS: "<parameter=a>3<", LLAMA: '"parameters": {"a": 3}'}
    assert expected.get(template, "<call>mul {") in prompt
    assert render(template, USER, call({"a": 3}), tool([{"type": "text", "text": "twelve"}])) == render(
        template, USER, call('{"a": 3}'), tool()
    )


def test_arguments_that_are_no_json_are_no_end_of_a_conversation(render: Any) -> None:
    assert '"{\\"a\\": "' in render(HERMES, USER, call('{"a": '), tool())
    with pytest.raises(RequestError, match="refuses the messages"):
        render(ITEMS, USER, call('{"a": '), tool())


@pytest.mark.parametrize("content", ["", None, []])
def test_message_of_calls_alone_is_known_as_such(render: Any, content: Any) -> None:
    assert "<call>mul" in render(DEEPSEEK, USER, call(content=content), tool())


@pytest.mark.parametrize("template", [LLAMA, DEEPSEEK])
def test_text_beside_a_call_makes_no_call_vanish(render: Any, template: str) -> None:
    assert "mul" in render(template, USER, call(content="Let me see."), tool())


def test_call_that_the_template_does_not_show_is_refused(render: Any) -> None:
    with pytest.raises(RequestError, match="leaves out the call of 'mul' in message 1"):
        render(GEMMA, USER, call(content="x"))


@pytest.mark.parametrize("calls", [[], None])
def test_empty_list_of_calls_is_none(render: Any, calls: Any) -> None:
    said = {"role": "assistant", "content": "hi", "tool_calls": calls, "refusal": None, "function_call": None}
    assert render(LLAMA, USER, said) == render(LLAMA, USER, {"role": "assistant", "content": "hi"})


def test_no_tools_are_no_tools(render: Any) -> None:
    template = "{% if tools is not none %}TOOLS{% endif %}{{ messages[0].content }}"
    assert render(template, USER, tools=[]) == render(template, USER) == USER["content"]
    assert render(template, USER, tools=[{"type": "function", "function": {"name": "f"}}]).startswith("TOOLS")


@pytest.mark.parametrize("template", ALL)
def test_text_is_in_the_prompt_in_either_form_and_its_parts_are_not_glued(render: Any, template: str) -> None:
    assert USER["content"] in render(template, USER)
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert "one\ntwo" in render(template, {"role": "user", "content": parts})


@pytest.mark.parametrize("template", [PARTS, EITHER, SYSTEM_TEXT])
def test_each_role_is_read_as_the_template_reads_it(render: Any, template: str) -> None:
    said = {"role": "assistant", "content": "12"}
    prompt = render(template, {"role": "system", "content": "Be brief."}, USER, said, USER)
    assert "Be brief." in prompt and prompt.count(USER["content"]) == 2 and "12" in prompt and "type" not in prompt


@pytest.mark.parametrize("template", [SILENT, HERMES, HARMONY])
def test_developer_is_the_system_where_the_template_knows_no_other(render: Any, template: str) -> None:
    prompt = render(template, {"role": "developer", "content": "Be brief."}, USER)
    role = "developer" if template == HARMONY else "system"
    assert prompt == render(template, {"role": role, "content": "Be brief."}, USER)
    assert "Be brief." in prompt


@pytest.mark.parametrize("role", ["system", "developer"])
def test_template_without_a_system_refuses_in_its_own_words(render: Any, role: str) -> None:
    with pytest.raises(RequestError, match="System role not supported"):
        render(GEMMA, {"role": role, "content": "Be brief."}, USER)


@pytest.mark.parametrize("role", ["tool", "critic"])
def test_message_that_would_be_left_out_is_refused_with_its_number(render: Any, role: str) -> None:
    with pytest.raises(RequestError, match=f"leaves out message 1 .*'{role}'") as refusal:
        render(SILENT, USER, {"role": role, "content": "secret"})
    assert refusal.value.parameter == "messages"
    assert "user" in render(SILENT, USER, {"role": role, "content": " \n"})  # of which nothing is lost


@pytest.mark.parametrize("content", ["\n  a  \n", 'a "b" \\ c', "<a>&'é\u2028", "a\tb\n\nc"])
@pytest.mark.parametrize("template", ALL)
def test_text_that_is_trimmed_or_written_as_json_is_not_taken_for_lost(
    render: Any, template: str, content: str
) -> None:
    render(template, {"role": "user", "content": content})
    if template in (HERMES, LLAMA, ITEMS, DEEPSEEK):
        render(template, USER, call(), tool(content))


def test_thoughts_of_earlier_turns_may_go(render: Any) -> None:
    said = {"role": "assistant", "content": "<think>\nhm\n</think>\n\ntwelve"}
    assert render(THINKING, USER, said, USER).count("hm") == 0
    with pytest.raises(RequestError, match="leaves out message 1"):
        render("{{ messages[0].content }}", USER, said)


def test_variables_reach_the_template(render: Any) -> None:
    assert "<no thought>" in render(THINKING, USER, variables={"enable_thinking": False})
    assert "<no thought>" not in render(THINKING, USER, variables={"enable_thinking": True})


def test_last_message_is_gone_on_with(render: Any) -> None:
    said = {"role": "assistant", "content": "Sure, "}
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert render(HERMES, USER, said, **options).endswith("<|im_start|>assistant\nSure, ")
    assert render(PARTS, USER, said, **options).endswith("<assistant>Sure, ")


def test_model_without_a_template_is_refused(render: Any, tokenizer: Any) -> None:
    with pytest.raises(RequestError, match="no chat template"):
        render(None, USER)


def test_template_for_tools_is_asked_for_its_own_habits(tokenizer: Any) -> None:
    tokenizer.chat_template = {"default": EITHER, "tool_use": PARTS}
    template = ChatTemplate(tokenizer)
    messages = plain_messages([USER])
    assert template.render(messages, [{"type": "function", "function": {"name": "f"}}]) == template.render(messages)
