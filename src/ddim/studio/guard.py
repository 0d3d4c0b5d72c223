"""What stands between the network and the page."""

from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from ddim.files import parse_json

__all__ = ["Guard", "LARGEST_UPLOAD"]

LARGEST_UPLOAD = 16 * 2**20
"""Bytes of a file that a visitor gives."""

_HEADERS = {
    # Nothing from elsewhere, whatever a library puts into the page.
    "content-security-policy": "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; "
    "frame-ancestors 'none'; base-uri 'self'; form-action 'self'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """Stands before the page: refuses names of hosts that are not this server's, so that no page
    from elsewhere is taken for it; bodies that are too large; and files that nobody gave to the
    page. Tells the browser to load nothing from elsewhere.

    Args:
        app: What is guarded.
        hosts: The names of this server; None for any.
        uploads: The folder of the files that visitors gave.
    """

    def __init__(self, app: Any, *, hosts: set[str] | None, uploads: Path) -> None:
        self.app, self.hosts, self.uploads = app, hosts, uploads.resolve()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        named = headers.get(b"host", b"").decode("latin-1")
        host = named.rsplit(":", 1)[0] if not named.endswith("]") else named
        if self.hosts is not None and host not in self.hosts:
            await _refuse(send, 421, "this server has another name")
            return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > LARGEST_UPLOAD + 2**16:
            await _refuse(send, 413, f"a file has at most {LARGEST_UPLOAD // 2**20} MiB here")
            return

        if scope["method"] == "POST" and not scope["path"].endswith("/upload"):
            body = await _body(receive)
            if body is None or not self._may_read(body):
                await _refuse(send, 403, "that is no file that was given to the page")
                return
            receive = _replay(body, receive)

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(k.encode(), v.encode()) for k, v in _HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *added]
            await send(message)

        await self.app(scope, receive, sending)

    def _may_read(self, body: bytes) -> bool:
        """Whether all files that a request names were given to the page. A library would copy
        others of this machine to where the page can read them, and fetch those of other hosts."""
        try:
            waiting = [parse_json(body.decode())]
        except ValueError:
            return True  # no request that names files
        while waiting:
            found = waiting.pop()
            if isinstance(found, list):
                waiting += found
            elif isinstance(found, dict):
                waiting += found.values()
                if "path" in found and not self._is_given(found["path"]):
                    return False
        return True

    def _is_given(self, path: object) -> bool:
        try:
            return path is None or Path(str(path)).resolve().is_relative_to(self.uploads)
        except (OSError, ValueError):  # a name that no file can have
            return False


async def _body(receive: Receive) -> bytes | None:
    """The whole body of a request; None if it is too large, or is not sent to its end."""
    body = bytearray()
    while len(body) <= LARGEST_UPLOAD:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body)
    return None


def _replay(body: bytes, receive: Receive) -> Receive:
    """What gives a body that was read already, and then what else comes."""
    is_given = False

    async def replay() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _refuse(send: Send, status: int, reason: str) -> None:
    kind = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": kind})
    await send({"type": "http.response.body", "body": reason.encode()})
