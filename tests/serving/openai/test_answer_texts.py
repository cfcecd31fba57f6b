"""An answer's text goes on with its prompt, and is of its form, whichever kind of tokenizer the model has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from small_service import SmallService, checkpoint_with, small_service
from small_tokenizers import legacy_sentencepiece


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallService]:
    """A model whose tokenizer drops the first space of a text."""
    tokenizer = legacy_sentencepiece()
    folder = checkpoint_with(tmp_path_factory.mktemp("model") / "demo", tokenizer)
    with small_service(folder, tokenizer) as service:
        yield service


def test_completion_keeps_its_first_space(served: SmallService) -> None:
    fields = {**served.forced("▁token"), "max_tokens": 2}
    assert served.complete("the", **fields)["text"] == " token token"
    assert served.complete(served.ids("<s>", "▁the"), **fields)["text"] == " token token"
    whole = served.complete("the", **fields, logprobs=0)
    assert "".join(whole["logprobs"]["tokens"]) == whole["text"]


def test_echo_joins_prompt_and_answer_as_they_are(served: SmallService) -> None:
    fields = {**served.forced("▁token"), "max_tokens": 1, "echo": True}
    assert served.complete("the", **fields)["text"] == "the token"
    assert served.complete(served.ids("<s>", "▁the"), **fields)["text"] == "the token"
    scored = served.complete(served.ids("<s>", "▁the"), **fields, logprobs=0)
    assert (scored["text"], scored["logprobs"]["text_offset"]) == ("the token", [0, 0, 3])


def test_stop_string_that_begins_with_the_first_space_is_found(served: SmallService) -> None:
    choice = served.complete("the", **served.forced("▁token"), max_tokens=5, stop=[" token"])
    assert (choice["text"], choice["finish_reason"], choice["usage"]["completion_tokens"]) == ("", "stop", 1)


@pytest.mark.parametrize("prompt", ["the", [1]])
def test_form_that_begins_with_spaces_has_them_all(served: SmallService, prompt: str | list[int]) -> None:
    text = served.complete(prompt, guided_regex=" {4}[a-z]{3}", max_tokens=20)["text"]
    assert text[:4] == "    " and text[4:].isalpha() and len(text) == 7


def test_prompt_that_ends_within_a_character_is_no_part_of_the_answer(served: SmallService) -> None:
    prompt, last = served.ids("<s>", "▁the", "▁", "<0xE4>", "<0xBE>"), "<0x8B>"
    fields = {**served.forced(last), "max_tokens": 1}
    assert served.complete(prompt, **fields)["text"] == "例"
    assert served.complete(prompt, **fields, echo=True)["text"] == "the 例"
    assert served.complete(prompt, echo=True, max_tokens=0)["text"] == "the \ufffd\ufffd"
    broken = served.complete(prompt, **served.forced("▁token"), max_tokens=2, echo=True)["text"]
    assert broken.startswith("the ") and broken.endswith(" token token")


def test_chat_answer_is_what_decoding_adds_to_the_prompt(served: SmallService) -> None:
    template = "<s>{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}<|im_start|>"
    served.service._tokenizer.chat_template = template
    fields = {"messages": [{"role": "user", "content": "the"}], **served.forced("▁token"), "max_tokens": 1}
    status, answer = served.send("v1/chat/completions", temperature=0, **fields)
    prompt = served.tokenizer("<s><|im_start|>the<|im_end|><|im_start|>", add_special_tokens=False).input_ids
    before, whole = (
        served.tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, [*prompt, *served.ids("▁token")])
    )
    assert status == 200 and answer["choices"][0]["message"]["content"] == whole.removeprefix(before) == " token"
