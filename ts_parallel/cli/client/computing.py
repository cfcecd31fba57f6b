"""By what a server computes: a speed says little without its processor. Asks the server; where that does not say and is
on this machine, this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from ts_parallel.cli.client.stream_client import Client, RemoteError
from ts_parallel.machine import is_loopback, this_machine

KEYS = ("processor", "num_cores", "device", "backend", "instruction_set", "dtype")
"""What is known of it is a text, or the number of cores; what is not, is None."""


def find_computing(client: Client, model: str) -> dict[str, Any]:
    """Every one of `KEYS`, and `told_by`: `server`, `client` where this machine was looked at, or None."""
    try:
        told = client.model_cards().get(model, {}).get("computed_by")
    except RemoteError:  # some servers list no models
        told = None
    if isinstance(told, dict):
        return {**{key: told.get(key) for key in KEYS}, "told_by": "server"}
    nothing: dict[str, Any] = dict.fromkeys(KEYS)
    if not is_loopback(urlsplit(client.url).hostname or ""):
        return {**nothing, "told_by": None}
    machine = this_machine()
    known = {"processor": machine.processor, "num_cores": machine.num_cores}
    return {**nothing, **known, "instruction_set": " ".join(machine.instruction_sets) or None, "told_by": "client"}


def computing_line(computed_by: Mapping[str, Any]) -> str:
    """All of it in a line, what is not known said as such."""
    cores = computed_by["num_cores"]
    parts = [computed_by["processor"] or "an unknown processor", f"{cores} cores" if cores else ""]
    parts += [computed_by["instruction_set"], computed_by["dtype"] or "an unknown dtype"]
    backend = computed_by["backend"]
    return ", ".join(part for part in parts if part) + (f" by the {backend} backend" if backend else "")
