"""Where an answer ends: at any end that the checkpoint names, and at a stop string, but not too early."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from small_service import SmallService, checkpoint_with, small_service
from small_tokenizers import byte_level


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallService]:
    """A model of which each file names another end."""
    tokenizer = byte_level()
    tokenizer.eos_token = "<|im_end|>"
    tool, start = tokenizer.convert_tokens_to_ids(["<tool_call>", "<|im_start|>"])
    settings = {"config": {"eos_token_id": [1, start]}, "generation_config": {"eos_token_id": tool}}
    folder = checkpoint_with(tmp_path_factory.mktemp("model") / "demo", tokenizer, **settings)
    with small_service(folder, tokenizer) as service:
        yield service


@pytest.mark.parametrize("end", ["</s>", "<|im_start|>", "<tool_call>", "<|im_end|>"])
def test_end_that_any_file_names_is_one(ended: SmallService, end: str) -> None:
    choice = ended.complete("the", **ended.forced(end), max_tokens=5)
    assert (choice["finish_reason"], choice["usage"]["completion_tokens"]) == ("stop", 1)
    ignored = ended.complete("the", **ended.forced(end), max_tokens=5, ignore_eos=True)
    assert (ignored["finish_reason"], ignored["usage"]["completion_tokens"]) == ("length", 5)
    later = ended.complete("the", **ended.forced(end), max_tokens=9, min_tokens=3)
    assert (later["finish_reason"], later["usage"]["completion_tokens"]) == ("stop", 4)


def test_stop_string_that_is_a_special_tokens_name_stops_at_the_token(ended: SmallService) -> None:
    fields = {**ended.forced("<s>"), "max_tokens": 8}
    unstopped = ended.complete("the", **fields)
    assert (unstopped["text"], unstopped["finish_reason"]) == ("", "length")
    stopped = ended.complete("the", **fields, stop=["<s>"])
    assert (stopped["finish_reason"], stopped["usage"]["completion_tokens"]) == ("stop", 1)
    later = ended.complete("the", **fields, stop=["<s>"], min_tokens=4, ignore_eos=True)
    assert (later["finish_reason"], later["usage"]["completion_tokens"]) == ("stop", 5)


def test_stop_string_that_holds_a_special_tokens_name_stops_there(ended: SmallService) -> None:
    fields = {**ended.forced("<s>"), "max_tokens": 8}
    twice = ended.complete("the", **fields, stop=["<s><s>"])
    assert (twice["text"], twice["finish_reason"], twice["usage"]["completion_tokens"]) == ("", "stop", 2)
    assert ended.complete("the", **fields, stop=["x<s>"])["finish_reason"] == "length"


def test_stop_string_ends_nothing_before_min_tokens(ended: SmallService) -> None:
    fields = {**ended.forced("Ġtoken"), "max_tokens": 40, "stop": ["e"]}
    assert ended.complete("the", **fields)["text"] == " tok"
    choice = ended.complete("the", **fields, min_tokens=20)
    assert choice["text"] == " token" * 20 + " tok"
    assert (choice["finish_reason"], choice["usage"]["completion_tokens"]) == ("stop", 21)
    assert ended.complete("the", **fields, min_tokens=40)["finish_reason"] == "length"


def test_min_tokens_and_a_form_are_refused_by_name(ended: SmallService) -> None:
    assert ended.refuse(prompt="the", guided_regex="a+", min_tokens=2)["param"] == "min_tokens"
