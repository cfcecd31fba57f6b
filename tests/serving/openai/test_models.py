"""The model is asked for by its names, and by no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ts_parallel.errors import NotFoundError
from ts_parallel.serving.openai.about.models import ModelCards, ModelNames


def test_names_of_archive_folder_and_hub_are_taken() -> None:
    names = ModelNames("demo", Path("/cache/models--org--a--b/snapshots/0123"))
    for name in (None, "", "demo", "org/a--b", "0123"):
        names.check(name)
    for name in ("Demo", "demo2", "org", "models--org--a--b"):
        with pytest.raises(NotFoundError, match="does not exist: this server has 'demo'") as refusal:
            names.check(name)
        assert (refusal.value.parameter, refusal.value.code, refusal.value.status) == ("model", "model_not_found", 404)
    assert (names.own, names.shown) == ("demo", ("demo",))


def test_first_of_the_served_names_is_the_models_own() -> None:
    names = ModelNames("demo", Path("/models/llama"), " gpt-4o ,a/b, gpt-4o,")
    assert (names.own, names.shown) == ("gpt-4o", ("gpt-4o", "a/b"))
    for name in ("gpt-4o", "a/b", "demo", "llama"):
        names.check(name)


def test_long_name_is_not_repeated_whole() -> None:
    with pytest.raises(NotFoundError) as refusal:
        ModelNames("demo", Path("m")).check("x" * 10**6)
    assert len(str(refusal.value)) < 200


def test_cards_say_by_what_they_are_computed_where_that_is_known() -> None:
    names = ModelNames("demo", Path("m"), "a,b")
    first, second = json.loads(ModelCards(names, 7, 512).all())["data"]
    assert first == {"id": "a", "object": "model", "created": 7, "owned_by": "ts_parallel", "max_model_len": 512}
    assert second == {**first, "id": "b"}
    told = json.loads(ModelCards(names, 7, 512, {"dtype": "bfloat16"}).one("b"))
    assert told == {**second, "computed_by": {"dtype": "bfloat16"}}
    assert json.loads(ModelCards(names, 7, 512).one("demo"))["id"] == "demo"
    with pytest.raises(NotFoundError):
        ModelCards(names, 7, 512).one("c")
