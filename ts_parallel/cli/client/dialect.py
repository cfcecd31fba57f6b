"""What a server accepts of a bench's request, found out by asking. Knows bodies of `v1/completions`, no load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ts_parallel.cli.client.stream_client import Client, RemoteError
from ts_parallel.cli.client.workload import Ask, as_words
from ts_parallel.errors import ConfigError

_IDS = "token ids as prompts"

# What not every server takes, in the order in which it is given up, with the words by which a refusal names it.
_EXTRAS = {
    "continuous_usage_stats": ("continuous_usage_stats", "stream_options"),
    "ignore_eos": ("ignore_eos",),
    "stream_options": ("stream_options",),
    _IDS: ("prompt",),
}
_REFUSALS = (400, 422)


@dataclass(frozen=True)
class Dialect:
    """How one server is asked: greedily, and with all extras but those that it refuses."""

    model: str
    refused: frozenset[str] = frozenset()

    def body(self, ask: Ask) -> dict[str, Any]:
        """
        Raises:
            ConfigError: the prompt is token ids that words cannot stand for, and the server takes none.
        """
        prompt: Any = ask.prompt
        if isinstance(prompt, tuple) and _IDS in self.refused:
            if not ask.is_random:
                raise ConfigError("the trace's prompts are token ids, and the server takes none")
            prompt = as_words(prompt)
        body = {"model": self.model, "prompt": prompt, "max_tokens": ask.num_output_tokens, "temperature": 0}
        if "ignore_eos" not in self.refused:
            body["ignore_eos"] = True
        if "stream_options" not in self.refused:
            is_counting = "continuous_usage_stats" not in self.refused
            counting = {"continuous_usage_stats": True} if is_counting else {}
            body["stream_options"] = {"include_usage": True, **counting}
        return body


def find_dialect(client: Client, model: str, probe: Ask) -> Dialect:
    """Ask `probe` with one extra less each time that the server refuses it, until it answers.

    A refusal that names an extra takes that one away, any other takes the next. The probe should be tiny, so that no
    refusal is about its size.

    Raises:
        RemoteError: it answers to nothing; the first refusal that named no extra, else the last.
    """
    dialect = Dialect(model)
    unexplained: RemoteError | None = None
    while True:
        try:
            for _ in client.complete(dialect.body(probe)):
                pass
            return dialect
        except RemoteError as error:
            left = [extra for extra in _EXTRAS if extra not in dialect.refused]
            if error.status not in _REFUSALS or not left:
                raise unexplained or error from None
            complaint = f"{error} {error.parameter}"
            named = [extra for extra in left if any(word in complaint for word in _EXTRAS[extra])]
            if not named:
                unexplained = unexplained or error
            dialect = Dialect(model, dialect.refused | {(named or left)[0]})
