"""``ddim studio``: opens the page for a person who would rather look."""

import contextlib

from ddim.studio.request import StudioRequest as Request

__all__ = ["Request", "run"]


def run(request: Request) -> int:
    """Serves the page until Ctrl-C."""
    from ddim.cli.terminal import say
    from ddim.studio.server import serve

    with contextlib.suppress(KeyboardInterrupt):
        serve(request, say)
    say("\nThe studio is closed.")
    return 0
