"""Pickles read as data: of all that a pickle may name, only what is listed is let through, and nothing of it is run.

A pickle names classes and functions which the usual reader then imports and calls. This one puts stand-ins in their
place, which keep what they are given. Knows what torch's own pickles are made of, not which file they come from.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from io import BufferedIOBase, BytesIO
from typing import Any

import torch

from ts_parallel.errors import CheckpointError


class Record:
    """Stands for an object of a class that is only looked at: its state, or what it would be made of."""

    def __init__(self, *arguments: Any) -> None:
        self.state: Any = arguments

    def __new__(cls, *_: Any) -> Record:
        record = super().__new__(cls)
        record.state = ()
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __getitem__(self, field: str) -> Any:
        return self.state[field]

    def get(self, field: str) -> Any:
        """None where the writer left it out."""
        return self.state.get(field)


class OrderedDict(dict[Any, Any]):
    """A state dict. transformers and torch hang a note on theirs, which is dropped."""

    def __setstate__(self, state: Any) -> None:
        pass


Names = Mapping[tuple[str, str], Any]
"""Module and name → what is put in its place."""

HARMLESS: Names = {
    ("torch", "Size"): tuple,
    ("torch", "device"): Record,
    ("torch.serialization", "_get_layout"): Record,
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "Counter"): Record,
    ("builtins", "set"): Record,
    ("__builtin__", "set"): Record,
    ("builtins", "complex"): Record,
    ("__builtin__", "complex"): Record,
    ("_codecs", "encode"): Record,
    **{
        (module, f"{flavour}Path"): Record
        for module in ("pathlib", "pathlib._local")
        for flavour in ("Posix", "Windows", "PurePosix", "PureWindows")
    },
}


class DataUnpickler(pickle.Unpickler):
    """Lets through `HARMLESS`, torch's dtypes and `names`."""

    def __init__(self, content: bytes | BufferedIOBase, names: Names, source: object) -> None:
        """
        Args:
            content: a stream is left behind the pickle.
        """
        super().__init__(BytesIO(content) if isinstance(content, bytes) else content)
        self._names, self._source = {**HARMLESS, **names}, source

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._names:
            return self._names[module, name]
        dtype = getattr(torch, name, None) if module == "torch" and name.isidentifier() else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise CheckpointError(
            f"{self._source} holds a {module}.{name}, which is not read from a pickle and was not run: "
            "save the model's tensors alone, or as safetensors"
        )

    def load(self) -> Any:
        """The content, stand-ins in it.

        Raises:
            CheckpointError: it names anything else, or is no pickle.
        """
        try:
            return super().load()
        except CheckpointError:
            raise
        except Exception as error:  # a torn pickle raises whatever its bytes happen to say
            raise CheckpointError(f"{self._source} is damaged: its pickle cannot be read ({error!r})") from None
