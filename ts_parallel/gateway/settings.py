"""What a gateway is told when it starts: its models, its keys, its limits."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ts_parallel.config import ARCHIVE_VERSION
from ts_parallel.errors import ConfigError

_NAME = re.compile(r"[^\s/=?#]+")
_EXAMPLE = "demo=http://127.0.0.1:8080/predictions/demo"


@dataclass(frozen=True)
class UpstreamSettings:
    """One model behind a TorchServe. `name` is what clients call it."""

    name: str
    host: str
    port: int
    path: str
    """`/predictions/NAME/VERSION`, below which its routes are."""
    is_https: bool = False
    key_file: Path | None = None
    """TorchServe's key_file.json, where it asks for a key. Read when a request is sent, for TorchServe writes it when
    it starts."""

    @property
    def served_name(self) -> str:
        """What TorchServe calls it, and what stands in its answers."""
        return self.path.split("/")[2]

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def key(self) -> str | None:
        """
        Raises:
            OSError, ValueError: there is no such file, or it has no inference key.
        """
        if self.key_file is None:
            return None
        try:
            return str(json.loads(self.key_file.read_text())["inference"]["key"])
        except (KeyError, TypeError):
            raise ValueError(f"{self.key_file} has no inference key") from None


@dataclass(frozen=True)
class GatewaySettings:
    upstreams: tuple[UpstreamSettings, ...]
    api_keys: tuple[str, ...] = ()
    """Any of these opens it; none: nobody is asked."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may ask; `*` is any."""
    max_request_size: int = 64 << 20
    """Bytes of a body."""
    max_silence: float = 600.0
    """Seconds for which an upstream may say nothing while its answer is waited for."""


def parse_upstream(text: str, key_file: Path | None = None) -> UpstreamSettings:
    """`NAME=URL` or `URL`; the URL's own name of the model and version 1.0 where those are left out.

    Raises:
        ConfigError: it is no URL of a model.
    """
    name, _, url = text.rpartition("=") if re.match(r"[^/]*=", text) else ("", "", text)
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise ConfigError(f"--upstream {text}: {error}") from None
    found = re.fullmatch(r"/predictions/([^/]+)(?:/([^/]+))?/?", parts.path)
    if parts.scheme not in ("http", "https") or not parts.hostname or not found or parts.query or parts.fragment:
        raise ConfigError(f"--upstream {text} is no model of a TorchServe, such as {_EXAMPLE}")
    name = name or found[1]
    if not _NAME.fullmatch(name):
        raise ConfigError(f"--upstream {text}: a model's name has no blanks and none of '/=?#', got {name!r}")
    path = f"/predictions/{found[1]}/{found[2] or ARCHIVE_VERSION}"
    return UpstreamSettings(name, parts.hostname, port, path, parts.scheme == "https", key_file)


def parse_upstreams(texts: list[str], key_file: Path | None = None) -> tuple[UpstreamSettings, ...]:
    """
    Raises:
        ConfigError: there is none, two have one name, or as `parse_upstream`.
    """
    if not texts:
        raise ConfigError(f"a gateway needs at least one model: --upstream {_EXAMPLE}")
    upstreams = tuple(parse_upstream(text, key_file) for text in texts)
    for number, own in enumerate(upstreams):
        if any(own.name == other.name for other in upstreams[:number]):
            raise ConfigError(f"two upstreams are called {own.name!r}: name one otherwise, --upstream NAME=URL")
    return upstreams
