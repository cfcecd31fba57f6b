"""What every format of quantised weights has to say, and what they share in saying it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ts_parallel.checkpoint.stored import CheckpointIndex, Codes, StoredTensor
from ts_parallel.errors import CheckpointError

INSTEAD = "serve the checkpoint in bfloat16 or float16"


@dataclass(frozen=True)
class Made:
    """A weight that is computed, and the names of all stored tensors that go with it; of no weight where those are
    about activations or the KV cache alone, which stay as they are computed."""

    weight: StoredTensor | None
    uses: tuple[str, ...]


class Scheme(Protocol):
    """How a checkpoint is quantised, parsed from its section. Two of one checkpoint that say the same are equal."""

    @staticmethod
    def parse(section: Mapping[str, Any], said: str) -> Scheme:
        """
        Raises:
            CheckpointError: it has a key or value that is not read here.
        """

    def make(self, index: CheckpointIndex, dtype: torch.dtype) -> Iterator[Made]:
        """The weights that are stored as codes.

        Args:
            dtype: what the checkpoint's configuration says that weights are.

        Raises:
            CheckpointError: a tensor is missing or of another shape or dtype than this format's.
        """

    def __str__(self) -> str:
        """For the log: what the weights are stored as."""


def made(name: str, dtype: torch.dtype, shape: tuple[int, ...], codes: Codes, main: StoredTensor, *uses: str) -> Made:
    """
    Args:
        main: the largest of what is stored.
    """
    return Made(StoredTensor(name, dtype, shape, main.parts, codes), (main.name, *uses))


def refuse_unknown(section: Mapping[str, Any], known: Mapping[str, tuple[Any, ...] | None], said: str) -> None:
    """
    Args:
        known: the keys of a section, with the values that change nothing here; None where any can be borne.
        said: where the section stands.

    Raises:
        CheckpointError: there is another key or value.
    """
    for key, value in section.items():
        if key not in known:
            if value not in (None, False, [], {}, ""):
                raise CheckpointError(
                    f"{said} has {key!r}, and what it does to the weights is not known here: {INSTEAD}"
                )
        elif (borne := known[key]) is not None and value not in borne:
            raise CheckpointError(f"{said} has {key} {value!r}, which is not read here: {INSTEAD}")


def misfit(stored: StoredTensor, shape: tuple[int, ...] | None, of: str) -> CheckpointError:
    wanted = "" if shape is None else f", not {list(shape)}"
    return CheckpointError(
        f"{stored.name!r} in {stored.file} has shape {list(stored.shape)} of {_short(stored.dtype)}{wanted}, "
        f"which does not fit {of!r}"
    )


def lacks(stored: StoredTensor, name: str) -> CheckpointError:
    return CheckpointError(f"{stored.file} holds {stored.name!r}, which is made of codes, but no {name!r}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
