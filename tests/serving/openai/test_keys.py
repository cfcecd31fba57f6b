"""Who shows one of the keys may ask; all others learn nothing of them."""

from __future__ import annotations

import pytest

from ts_parallel.config import parse_api_keys
from ts_parallel.errors import ConfigError, UnauthorizedError
from ts_parallel.serving.openai.keys import APIKeys


def test_anybody_may_ask_where_there_are_no_keys() -> None:
    APIKeys().check({})
    APIKeys(parse_api_keys(None)).check({"authorization": "Bearer x"})


@pytest.mark.parametrize(
    "headers",
    [{"authorization": "Bearer one"}, {"authorization": "Bearer  two "}, {"api-key": "two"}, {"x-api-key": "one"}],
)
def test_each_key_is_taken_under_each_clients_header(headers: dict[str, str]) -> None:
    APIKeys(parse_api_keys(" one, two,")).check(headers)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer On"},
        {"authorization": "Bearer one,two"},
        {"authorization": "Basic one"},
        {"authorization": "Bearer ö"},
        {"authorization": "Bearer wrong", "api-key": "one"},
        {"cookie": "one"},
    ],
)
def test_no_key_and_a_wrong_key_are_refused_without_naming_any(headers: dict[str, str]) -> None:
    with pytest.raises(UnauthorizedError) as refusal:
        APIKeys(["one", "two"]).check(headers)
    assert (refusal.value.status, refusal.value.code) == (401, "invalid_api_key")
    assert "two" not in str(refusal.value) and "wrong" not in str(refusal.value)
    assert refusal.value.headers == {"WWW-Authenticate": "Bearer"}


@pytest.mark.parametrize("text", ["", " , ", "a b", "schlüssel", "a\nb"])
def test_key_that_no_header_can_have_is_no_key(text: str) -> None:
    with pytest.raises(ConfigError, match="--api-key") as refusal:
        parse_api_keys(text)
    assert not text.strip(" ,") or text not in str(refusal.value)
