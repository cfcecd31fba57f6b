"""One page to chat with a model: three files, served as they are, that ask nobody but this gateway."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

# Nothing from elsewhere, nothing inline, and no other page around it.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
PATHS = tuple(_FILES)


async def page(request: Request) -> Response:
    """`GET /` and the files that it names."""
    name, kind = _FILES[request.url.path]
    headers = {
        "Content-Security-Policy": _POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    content = Path(__file__).with_name(name).read_bytes()
    return Response(content, headers=headers, media_type=f"{kind}; charset=utf-8")
