"""What models of each family write, with the tokens that they write it with, and what it says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "more": {"type": "object"}},
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "add", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]

# Arguments that are awkward for whoever looks for their end.
WRITTEN = r'{"city": "Pa}r\"is é 例 [", "days": 3, "more": {"x": [1, {"y": "{"}]}}'
ARGUMENTS = json.loads(WRITTEN)
WEATHER, NOW = ("get_weather", ARGUMENTS), ("now", {})


@dataclass(frozen=True)
class Written:
    """One answer as it is written, and what it says."""

    text: str
    calls: Sequence[tuple[str, Any]] = ()
    content: str | None = None
    """None: the text itself."""
    reasoning: str = ""

    @property
    def said(self) -> str:
        return self.text if self.content is None else self.content


@dataclass(frozen=True)
class Family:
    """Signs by which its tokenizers are known, and answers."""

    special: Sequence[str]
    added: Sequence[str]
    template: str
    answers: Sequence[Written]


def _hermes(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


_CALL = f'{{"name": "get_weather", "arguments": {WRITTEN}}}'
_NOW = '{"name": "now", "arguments": {}}'
_NOW_OF_LLAMA = '{"name": "now", "parameters": {}}'
_THINK = ("<think>", "</think>")
_SEP = "<｜tool▁sep｜>"
_DEEPSEEK = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    _SEP,
)
_BEGIN, _END, _ONE, _OF_ONE, _ = _DEEPSEEK
_HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>")
_KIMI = (
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
)
_QUOTED = '<|"|>'

FAMILIES: dict[str, Family] = {
    "hermes": Family(
        (),
        ("<tool_call>", "</tool_call>", *_THINK),
        "<tool_call> </tool_call> <think> </think>",
        [
            Written(_hermes(_CALL), [WEATHER], ""),
            Written(
                f"<think>\nhm <b>\n</think>\n\nLet me see.\n{_hermes(_CALL)}\n{_hermes(_NOW)}",
                [WEATHER, NOW],
                "Let me see.",
                "hm <b>",
            ),
            Written(_hermes(f'{{"arguments": {WRITTEN}, "name": "get_weather"}}'), [WEATHER], ""),
            Written(_hermes('{"name": "now"}'), [NOW], ""),
            Written(_hermes('{"name": "now", "arguments": "{\\"a\\": 1}", "id": "x"}'), [("now", {"a": 1})], ""),
            Written(
                _hermes('{"name": "now", "arguments": {"a": "</tool_call> <tool_call>"}}') + "\nbye",
                [("now", {"a": "</tool_call> <tool_call>"})],
                "bye",
            ),
            Written(" plain text <b> \n"),
            Written("a <tool_call>\nno call\n</tool_call> tail "),
            Written('<tool_call>{"name": "now", "arguments": [1]}</tool_call>'),
            Written("<tool_call>{}</tool_call>"),
            Written("<tool_call>"),
            Written('<tool_call>{"name": "no'),
        ],
    ),
    "qwen3_coder": Family(
        (),
        ("<tool_call>", "</tool_call>"),
        "<tool_call> <function=name> <parameter=key>",
        [
            Written(
                'Well.\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nPa"ris\n\n<b>\n</parameter>\n'
                '<parameter=days>\n3\n</parameter>\n<parameter=more>\n{"x": null}\n</parameter>\n</function>\n'
                "</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
                [("get_weather", {"city": 'Pa"ris\n\n<b>', "days": 3, "more": {"x": None}}), NOW],
                "Well.",
            ),
            Written(
                "<tool_call>\n<function=get_weather>\n<parameter=days>\nmany\n</parameter>\n</tool_call>",
                [("get_weather", {"days": "many"})],
                "",
            ),
            Written("<tool_call>\nI do not know\n</tool_call>"),
        ],
    ),
    "glm": Family(
        (),
        ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", *_THINK),
        "<tool_call> <arg_key> <arg_value> <think></think>",
        [
            Written(
                "<think>x</think>\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris\n</arg_value>\n"
                "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
                [("get_weather", {"city": "Paris\n", "days": 3}), NOW],
                "",
                "x",
            ),
            Written("<tool_call>I do not know</tool_call>"),
        ],
    ),
    "llama3": Family(
        ("<|python_tag|>", "<|eom_id|>"),
        (),
        '{"name": function name, "parameters": dictionary of argument name and its value}',
        [
            Written(f'{{"name": "get_weather", "parameters": {WRITTEN}}}', [WEATHER], ""),
            Written(
                f'<|python_tag|>{{"name": "get_weather", "parameters": {WRITTEN}}}; {_NOW_OF_LLAMA}',
                [WEATHER, NOW],
                "",
            ),
            Written('{"type": "function", "name": "now", "parameters": {}}', [NOW], ""),
            Written(' {"name": "Bob", "parameters": {}} '),
            Written('{"answer": {"name": "now"}}'),
            Written("<|python_tag|>print(1)"),
            Written('I say {"name": "now", "parameters": {}}'),
        ],
    ),
    "mistral": Family(
        ("[TOOL_CALLS]", "[/TOOL_CALLS]"),
        (),
        "[TOOL_CALLS]",
        [
            Written(f'[TOOL_CALLS] [{_CALL}, {{"name": "now", "arguments": {{}}}}]', [WEATHER, NOW], ""),
            Written(f"Well.[TOOL_CALLS]get_weather[ARGS]{WRITTEN}[TOOL_CALLS]now[ARGS]{{}}", [WEATHER, NOW], "Well."),
            Written(f"[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{WRITTEN}", [WEATHER], ""),
            Written(f"[TOOL_CALLS]get_weather{WRITTEN}", [WEATHER], ""),
            Written("[TOOL_CALLS]now", [NOW], ""),
            Written("[TOOL_CALLS]hello there"),
        ],
    ),
    "mistral_args": Family(
        ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"),
        (),
        "[TOOL_CALLS] [ARGS]",
        [
            Written(
                f"[THINK]hm[/THINK]Well.[TOOL_CALLS]get_weather[ARGS]{WRITTEN}[TOOL_CALLS]now[ARGS]{{}}",
                [WEATHER, NOW],
                "Well.",
                "hm",
            )
        ],
    ),
    "deepseek": Family(
        (),
        _DEEPSEEK,
        f"{_BEGIN} ```json",
        [
            Written(
                f"Well.{_BEGIN}{_ONE}function{_SEP}get_weather\n```json\n{WRITTEN}\n```{_OF_ONE}\n"
                f"{_ONE}function{_SEP}now\n```json\n{{}}\n```{_OF_ONE}{_END}",
                [WEATHER, NOW],
                "Well.",
            ),
            Written(f"{_BEGIN}nothing{_END}"),
        ],
    ),
    "deepseek_v31": Family(
        _DEEPSEEK,
        _THINK,
        f"{_BEGIN} <think></think>",
        [
            Written(
                f"<think>hm</think>{_BEGIN}{_ONE}get_weather{_SEP}{WRITTEN}{_OF_ONE}{_ONE}now{_SEP}{{}}{_OF_ONE}{_END}",
                [WEATHER, NOW],
                "",
                "hm",
            )
        ],
    ),
    "kimi": Family(
        _KIMI,
        (),
        _KIMI[0],
        [
            Written(
                f"{_KIMI[0]}{_KIMI[2]}functions.get_weather:0{_KIMI[3]}{WRITTEN}{_KIMI[4]}"
                f"{_KIMI[2]}functions.now:1{_KIMI[3]}{{}}{_KIMI[4]}{_KIMI[1]}",
                [WEATHER, NOW],
                "",
            )
        ],
    ),
    "phi4": Family(
        (),
        ("<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>"),
        "<|tool|>",
        [Written(f'<|tool_call|>[{_CALL},{{"name": "now"}}]<|/tool_call|>', [WEATHER, NOW], "")],
    ),
    "granite": Family(
        ("<|tool_call|>",),
        (),
        "<|tool_call|>",
        [
            Written(f"<|tool_call|>[{_CALL}]", [WEATHER], ""),
            Written(f'<|tool_call|>[{_CALL}, {{"no": 1}}] end', [WEATHER], ', {"no": 1}] end'),
        ],
    ),
    "command_r": Family(
        (
            "<|START_ACTION|>",
            "<|END_ACTION|>",
            "<|START_RESPONSE|>",
            "<|END_RESPONSE|>",
            "<|START_THINKING|>",
            "<|END_THINKING|>",
        ),
        (),
        "<|START_ACTION|> <|END_ACTION|>",
        [
            Written(
                "<|START_THINKING|>hm<|END_THINKING|><|START_ACTION|>[\n"
                f'    {{"tool_call_id": "0", "tool_name": "get_weather", "parameters": {WRITTEN}}}\n]<|END_ACTION|>',
                [WEATHER],
                "",
                "hm",
            ),
            Written("<|START_RESPONSE|>Hello<|END_RESPONSE|>", content="Hello"),
        ],
    ),
    "gpt_oss": Family(
        _HARMONY,
        (),
        "<|channel|> <|message|> <|call|>",
        [
            Written(
                "<|channel|>analysis<|message|>hm to=x<|end|><|start|>assistant<|channel|>commentary "
                f"to=functions.get_weather <|constrain|>json<|message|>{WRITTEN}<|call|>",
                [WEATHER],
                "",
                "hm to=x",
            ),
            Written(" to=functions.now<|channel|>commentary json<|message|>{}", [NOW], ""),
            Written(
                "<|channel|>commentary<|message|>Well.<|end|>"
                "<|start|>assistant<|channel|>final<|message|>Hello to=x<|return|>",
                content="Well.\nHello to=x",
            ),
            Written("no channel at all"),
        ],
    ),
    "gemma4": Family(
        ("<|tool_call>", "<tool_call|>", "<|channel>", "<channel|>", _QUOTED),
        (),
        "<|tool_call> <tool_call|>",
        [
            Written(
                f"Well.<|tool_call>call:get_weather{{city:{_QUOTED}Pa,b:ris{_QUOTED},days:3,more:{{a:[1,true]}}}}<tool_call|>",
                [("get_weather", {"city": "Pa,b:ris", "days": 3, "more": {"a": [1, True]}})],
                "Well.",
            ),
            Written('<|tool_call>call:add{"city": "x,b:c"}<tool_call|>', [("add", {"city": "x,b:c"})], ""),
            Written("<|channel>thought\nhm\n<channel|>Hello", content="Hello", reasoning="hm"),
            Written("<|tool_call>call:add{city:<tool_call|>"),
        ],
    ),
    "function_gemma": Family(
        ("<start_function_call>", "<end_function_call>", "<escape>"),
        (),
        "<start_function_call>",
        [
            Written(
                "<start_function_call>call:get_weather{city:<escape>Paris<escape>}<end_function_call>",
                [("get_weather", {"city": "Paris"})],
                "",
            )
        ],
    ),
    "minimax": Family(
        ("<minimax:tool_call>", "</minimax:tool_call>"),
        (),
        "<minimax:tool_call>",
        [
            Written(
                '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris</parameter>\n'
                '<parameter name="days">3</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
                [("get_weather", {"city": "Paris", "days": 3}), NOW],
                "",
            )
        ],
    ),
}
