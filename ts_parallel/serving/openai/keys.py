"""Keys of clients: who shows none of them is refused."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping

from ts_parallel.errors import UnauthorizedError

_HEADERS = ("authorization", "api-key", "x-api-key")  # OpenAI's; Azure's; Anthropic's


class APIKeys:
    """Those that are taken; any client where there are none. They stand in no log and in no message."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._keys = [key.encode() for key in keys]

    @property
    def are_asked_for(self) -> bool:
        return bool(self._keys)

    def check(self, headers: Mapping[str, str]) -> None:
        """
        Raises:
            UnauthorizedError: the headers have none of the keys.
        """
        if not self._keys:
            return
        shown = next((headers[name] for name in _HEADERS if headers.get(name)), None)
        if shown is None:
            raise UnauthorizedError("no API key: send the header 'Authorization: Bearer KEY'")
        own = shown.removeprefix("Bearer ").strip().encode()
        if not any([hmac.compare_digest(own, key) for key in self._keys]):  # all of them: time tells nothing
            raise UnauthorizedError("the API key is none of this server's")
