"""What is asked of every HTTP request before it is looked at, and said with every answer."""

import asyncio
import urllib.parse
from collections.abc import Collection
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# A prompt of 1000 characters, each written as two \uXXXX, has 12,000.
MOST_BYTES = 16_384
# A client that sends its few bytes more slowly holds a connection for nothing.
_BODY_SECONDS = 10.0
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

# The page loads nothing from elsewhere, runs no script but its own, and stands in nobody's frame.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class Guard:
    """Refuses hosts that are not ours and bodies that are too large or too slow; adds headers to all answers.

    The host is looked at because of DNS rebinding: a page from elsewhere may give its own name this machine's address,
    and then ask a server here as if it were its own. A browser says by which name it asked.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str]):
        """Args: what answers; the names, in lower case, by which it may be asked, or none where all will do."""
        self.app, self.hosts = app, frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        headers = Headers(scope=scope)
        host = _name(headers.get("host", ""))
        if self.hosts and host not in self.hosts:
            names = ", ".join(sorted(self.hosts))
            refusal = error(f"this server is asked as {names}, and not as {host!a}; --allowed_hosts adds names", 400)
            return await refusal(scope, receive, answer)
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                body = await _read(headers, receive)
        except TimeoutError:
            return await error("the request did not arrive in time", 408)(scope, receive, answer)
        except _TooLarge:
            refusal = error(f"the request is too large; {MOST_BYTES:,} bytes are enough for any prompt", 413)
            return await refusal(scope, receive, answer)
        if body is None:  # the client left
            return

        async def again() -> Message:
            nonlocal body
            if body is None:
                return await receive()
            message = {"type": "http.request", "body": body, "more_body": False}
            body = None
            return message

        await self.app(scope, again, answer)


def error(sentence: str, status: int, headers: dict[str, str] | None = None, **more: Any) -> JSONResponse:
    """Returns an answer that says in one sentence what is wrong."""
    return JSONResponse({"error": sentence, **more}, status_code=status, headers=headers)


class _TooLarge(Exception):
    pass


async def _read(headers: Headers, receive: Receive) -> bytes | None:
    """Returns the body; None where the client left before it was whole."""
    length = headers.get("content-length", "0")
    if length.isdecimal() and int(length) > MOST_BYTES:
        raise _TooLarge
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if len(body) > MOST_BYTES:
            raise _TooLarge
        if not message.get("more_body", False):
            return body


def _name(host: str) -> str:
    """Returns the name of a Host header, without the port, in lower case; "" where it is none."""
    try:
        return (urllib.parse.urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""
