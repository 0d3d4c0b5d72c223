"""Serves the page: to this machine alone, or to others who know the password."""

import contextlib
import hmac
import ipaddress
import os
import shutil
import socket
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ddim.errors import DDIMError
from ddim.options import check_request
from ddim.runs.model import find_device
from ddim.studio.guard import LARGEST_UPLOAD, Guard
from ddim.studio.request import StudioRequest
from ddim.studio.shelf import Shelf

__all__ = ["check_address", "make_app", "serve"]

SHORTEST_PASSWORD = 8


def is_loopback(host: str) -> bool:
    """Whether an address is of this machine alone."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host == "localhost"


def check_address(request: StudioRequest) -> None:
    """Refuses an address that other machines reach without a password.

    Raises:
        DDIMError: If it does, or the password is too short.
    """
    if request.password is not None and len(request.password) < SHORTEST_PASSWORD:
        raise DDIMError(f"--password must have at least {SHORTEST_PASSWORD} characters.")
    if not is_loopback(request.host) and request.password is None:
        raise DDIMError(
            f"--host {request.host} lets other machines use the studio; give --password, too, or "
            "leave out --host."
        )


def _import_gradio() -> Any:
    """gradio, which is told before it is loaded that it must not report to anybody."""
    for name, value in (("GRADIO_ANALYTICS_ENABLED", "False"), ("HF_HUB_DISABLE_TELEMETRY", "1")):
        os.environ[name] = value
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise DDIMError(
            "the studio needs gradio, which is not installed; run: pip install 'ddim[studio]'."
        ) from error
    return gradio


@contextlib.contextmanager
def make_app(request: StudioRequest, *, ends_process: bool = False) -> Iterator[Any]:
    """The page as an application of ASGI; its files and its runs end with the block, and with
    ``ends_process`` the process too, if a step of a run would keep it.

    Raises:
        DDIMError: If gradio is missing, or there is no such model, folder or device.
    """
    check_request(request)
    check_address(request)
    folder = None if request.folder is None else Path(request.folder).expanduser()
    shelf = Shelf(request.model, folder)
    shelf.check()
    find_device(request.device)
    cache = tempfile.mkdtemp(prefix="ddim-studio-files-")
    os.environ["GRADIO_TEMP_DIR"] = cache  # read when gradio's components are made
    gradio = _import_gradio()
    import fastapi

    from ddim.studio.desk import Desk
    from ddim.studio.page import CSS, NAMES, build_page, theme

    desk = Desk()
    page = build_page(desk, shelf, device=request.device)
    auth = None
    if (password := request.password) is not None:

        def auth(user: str, given: str) -> bool:
            return hmac.compare_digest(given.encode(), password.encode())

    try:
        app = gradio.mount_gradio_app(
            fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
            page,
            path="",
            auth=auth,
            auth_message="Any user name, and the password that the studio was started with.",
            footer_links=[],
            show_error=False,
            max_file_size=LARGEST_UPLOAD,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
            enable_monitoring=False,
            theme=theme(),
            css=CSS,
            js=NAMES,
        )
        hosts = {"127.0.0.1", "localhost", "[::1]"} if is_loopback(request.host) else None
        page.has_launched = True  # as if gradio served it: it checks paths of visitors only then
        yield Guard(app, hosts=hosts, uploads=Path(cache))
    finally:
        has_ended = desk.close()
        shutil.rmtree(cache, ignore_errors=True)
        if not has_ended and ends_process:
            sys.stdout.flush()
            os._exit(0)  # Python would wait for a step of the network, or abort in it


def serve(request: StudioRequest, say: Callable[[object], None]) -> None:
    """Serves the page until it is interrupted; ``say`` tells where it is.

    Raises:
        DDIMError: If the port is taken, or as :func:`make_app`.
    """
    check_request(request)
    check_address(request)
    _import_gradio()
    import uvicorn

    with (
        _listening(request.host, request.port) as listener,
        make_app(request, ends_process=True) as app,
    ):
        port = listener.getsockname()[1]
        host = request.host if request.host not in ("0.0.0.0", "::") else "127.0.0.1"
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
        say(f"The studio is at {address} - Ctrl-C closes it.")
        if not request.no_browser:
            threading.Timer(1.0, webbrowser.open, [address]).start()
        config = uvicorn.Config(
            app, log_level="critical", access_log=False, timeout_graceful_shutdown=0, ws="none"
        )
        uvicorn.Server(config).run(sockets=[listener])


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(kind, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host.strip("[]"), port))
            listener.listen()  # who comes before the page is ready waits for it
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise DDIMError(
                f"the studio cannot listen on {host}, port {port} ({reason}); give another --port, "
                "such as 0 for any that is free."
            ) from None
        yield listener
