"""Under which names the model is asked for, and what `v1/models` says of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ts_parallel.errors import NotFoundError
from ts_parallel.serving.exchange import echo


class ModelNames:
    """The model's own name, those beside it that `v1/models` shows, and those that are taken without being shown."""

    def __init__(self, name: str, folder: Path, served: str | None = None) -> None:
        """
        Args:
            name: as TorchServe has it.
            folder: of the checkpoint: its name, and the id on the hub that it has in the hub's cache, are taken too.
            served: other names, separated by commas, of which the first is the model's own.
        """
        own = [part.strip() for part in (served or "").split(",") if part.strip()]
        self.shown: tuple[str, ...] = tuple(dict.fromkeys(own)) or (name,)
        self._taken = {"", name, *self.shown, *_names_of(folder)}

    @property
    def own(self) -> str:
        return self.shown[0]

    def check(self, model: str | None) -> None:
        """
        Raises:
            NotFoundError: a request names another model.
        """
        if model is not None and model not in self._taken:
            raise NotFoundError(
                f"The model {echo(model)} does not exist: this server has {', '.join(map(repr, self.shown))}",
                "model",
                "model_not_found",
            )


def _names_of(folder: Path) -> Iterator[str]:
    yield folder.name
    for part in folder.parts:
        if match := re.fullmatch(r"models--(.+)", part):
            yield match[1].replace("--", "/", 1)


class ModelCards:
    """OpenAI's descriptions of a model, one for each name, with vLLM's `max_model_len`."""

    def __init__(
        self, names: ModelNames, created: int, max_model_len: int, computed_by: Mapping[str, Any] | None = None
    ) -> None:
        """
        Args:
            computed_by: what the machine is; left out where it is not known.
        """
        self._names = names
        self._facts: dict[str, Any] = {"object": "model", "created": created, "owned_by": "ts_parallel"}
        self._facts |= {"max_model_len": max_model_len, **({"computed_by": dict(computed_by)} if computed_by else {})}

    def all(self) -> str:
        return json.dumps({"object": "list", "data": [self._card(name) for name in self._names.shown]})

    def one(self, name: str) -> str:
        """
        Raises:
            NotFoundError: as `ModelNames.check`.
        """
        self._names.check(name)
        return json.dumps(self._card(name))

    def _card(self, name: str) -> dict[str, Any]:
        return {"id": name, **self._facts}
