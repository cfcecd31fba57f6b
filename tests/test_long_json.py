"""JSON in parts is JSON: what comes of its parts is what Python's own reader makes of the whole, refusals too."""

from __future__ import annotations

import gc
import json
import threading
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ts_parallel import long_json

SMALL = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda own: st.lists(own, max_size=5) | st.dictionaries(st.text(max_size=4), own, max_size=4),
    max_leaves=12,
)
# What is refused or read otherwise than it looks: ends in strings and brackets that are no ends.
TRAPS: list[Any] = ["],", "},", '",', "[1, 2], ", '{"a": 1}, ', "\\", '\\"', [], {}, [[]], {"": {}}, "é🙂\u2028", 1e300]


@pytest.fixture(autouse=True, scope="module")
def nothing_is_frozen() -> None:
    """Else what other tests have left in this process would be looked through before each reading."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def parts_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_json, "LONG", 1)
    monkeypatch.setattr(long_json, "_PART", 24)
    monkeypatch.setattr(long_json, "_ITEMS_OF_A_PART", 3)


def read(loads: Any, text: str | bytes) -> Any:
    """What a reader makes of a text; ValueError where it refuses it."""
    try:
        return loads(text)
    except ValueError:
        return ValueError


def assert_is_read_alike(text: str | bytes) -> None:
    own, expected = read(long_json.loads, text), read(json.loads, text)
    assert repr(own) == repr(expected), text


@settings(max_examples=150, deadline=None)
@given(st.lists(SMALL | st.sampled_from(TRAPS), max_size=12), st.sampled_from([None, 0, 3]), st.booleans())
def test_value_is_read_and_written_as_by_json(items: list[Any], indent: int | None, is_ascii: bool) -> None:
    for value in (items, {"a": items, "b": {str(at): own for at, own in enumerate(items)}}):
        text = json.dumps(value, indent=indent, ensure_ascii=is_ascii)
        assert_is_read_alike(text)
        assert_is_read_alike(f" \n{text}\t".encode())
        assert long_json.dumps(value) == json.dumps(value)


@settings(max_examples=150, deadline=None)
@given(st.lists(SMALL | st.sampled_from(TRAPS), min_size=1, max_size=6), st.data())
def test_broken_text_is_refused_as_by_json(items: list[Any], data: st.DataObject) -> None:
    text = json.dumps({"a": items, "b": items})
    at = data.draw(st.integers(0, len(text) - 1))
    put = data.draw(st.sampled_from(["", ",", "]", "}", '"', ":", " ", "1", "[", "{", "\\", "\n", "nul", "NaN"]))
    for broken in (text[:at], text[:at] + put + text[at:], text[:at] + put + text[at + 1 :]):
        assert_is_read_alike(broken)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-le"])
def test_bytes_of_any_encoding_are_read(encoding: str) -> None:
    value = {"prompt": ["aé🙂"] * 9, "ids": list(range(99))}
    assert long_json.loads(json.dumps(value, ensure_ascii=False).encode(encoding)) == value


def test_later_of_two_values_of_one_name_counts() -> None:
    text = '{"a": 1, ' + ", ".join(f'"k{at}": {at}' for at in range(30)) + ', "a": 2}'
    assert long_json.loads(text) == json.loads(text) and list(long_json.loads(text)) == list(json.loads(text))


def test_error_names_the_place() -> None:
    text = json.dumps({"ids": list(range(100))})[:-1] + " x}"
    with pytest.raises(json.JSONDecodeError) as own:
        long_json.loads(text)
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    assert own.value.pos == expected.value.pos and own.value.msg == expected.value.msg


@pytest.mark.parametrize("levels", [150, 100_000])
def test_what_lies_deep_is_read_or_refused(levels: int) -> None:
    text = '{"a": ' * levels + "[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]" + "}" * levels
    if levels < 200:
        assert long_json.loads(text) == json.loads(text)
    else:
        with pytest.raises(RecursionError):
            long_json.loads(text)


def test_others_go_on_while_megabytes_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own reader lets nobody on before it is done."""
    monkeypatch.undo()
    text = '{"messages": [' + '{"role": "user", "content": "x"}, ' * 200_000 + "{}]}"
    has_ended, num_turns = threading.Event(), 0

    def count() -> None:
        nonlocal num_turns
        while not has_ended.is_set():
            num_turns += 1
            time.sleep(0)

    thread = threading.Thread(target=count)
    thread.start()
    try:
        begin = num_turns
        value = long_json.loads(text)
        while_it_was_read = num_turns - begin
    finally:
        has_ended.set()
        thread.join()
    assert value == json.loads(text) and while_it_was_read > 20
    assert gc.isenabled()
