"""No part of a stop string gets out, however the text is cut into pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ts_parallel.serving.text.stop_strings import StopStrings


def sent(stops: list[str], pieces: list[str], is_included: bool = False) -> tuple[str, bool]:
    """All that goes out for `pieces`, and whether the answer was stopped."""
    watch, out = StopStrings(stops, is_included), ""
    for number, piece in enumerate(pieces, 1):
        out += watch.add(piece, is_last=number == len(pieces))
        if watch.has_stopped:
            break
    return out, watch.has_stopped


@pytest.mark.parametrize("pieces", [["abc STOP def"], ["abc S", "TO", "P def"], list("abc STOP def")])
def test_answer_ends_before_the_stop_string_wherever_its_borders_are(pieces: list[str]) -> None:
    assert sent(["STOP"], pieces) == ("abc ", True)
    assert sent(["STOP"], pieces, is_included=True) == ("abc STOP", True)


def test_what_only_begins_like_a_stop_string_comes_out_late_but_whole() -> None:
    watch = StopStrings(["STOP"])
    assert watch.add("a ST", is_last=False) == "a "
    assert watch.add("AND", is_last=False) == "STAND"
    assert watch.add(" ST", is_last=True) == " ST"


def test_first_of_several_stop_strings_counts_and_then_the_longest() -> None:
    assert sent(["\n\n", "END"], ["one END two\n\n"]) == ("one ", True)
    assert sent(["ab", "abc"], ["xabcd"], is_included=True) == ("xabc", True)


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert StopStrings(()).add("abc", is_last=False) == "abc"


@given(
    text=st.text("ab", max_size=20),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 20), max_size=6),
)
def test_pieces_say_the_same_as_the_whole(text: str, stops: list[str], cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in pairwise(edges)] or [""]
    found = min((text.find(stop) for stop in stops if stop in text), default=None)
    out, has_stopped = sent(stops, pieces)
    assert has_stopped == (found is not None)
    # A stop string that ends earlier may begin later than one that is not whole yet when it ends.
    assert text.startswith(out)
    assert not any(stop in out for stop in stops)
    if found is None:
        assert out == text


def test_stop_string_that_ends_too_early_is_text_and_its_end_may_begin_another() -> None:
    watch = StopStrings(["aa"])
    assert watch.add("xaa", is_last=False, may_stop=False) == "xa"
    assert watch.add("b", is_last=False) == "ab"
    assert watch.add("aa", is_last=False, may_stop=False) + watch.add("ac", is_last=False) == "a"
    assert watch.has_stopped


@pytest.mark.parametrize("is_included", [False, True])
def test_name_of_a_special_token_is_found_where_it_stands_and_never_shown(is_included: bool) -> None:
    def shown(*tokens: tuple[str, int], stops: tuple[str, ...]) -> tuple[str, bool]:
        watch, out = StopStrings(stops, is_included, {7: "<end>", 8: "<other>"}), ""
        for number, (text, token_id) in enumerate(tokens, 1):
            out += watch.add(text, number == len(tokens), token_id)
            if watch.has_stopped:
                break
        return out, watch.has_stopped

    a, end, other, line, b = ("a", 1), ("", 7), ("", 8), ("\n", 2), ("b", 3)
    assert shown(a, end, line, b, stops=("<end>\n",)) == ("a\n" if is_included else "a", True)
    assert shown(a, end, b, line, stops=("<end>\n",)) == ("ab\n", False)
    assert shown(a, line, end, end, b, stops=("\n<end><end>",)) == ("a\n" if is_included else "a", True)
    assert shown(a, line, end, other, b, stops=("\n<end><end>", "z")) == ("a\nb", False)
    assert shown(a, end, stops=("<end>",)) == ("a", True)
    assert shown(("<e", 4), ("nd", 5), (">", 6), b, stops=("<end>",)) == ("<end>" if is_included else "", True)
