"""What ``ddim studio`` is asked."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from ddim.options import Range

__all__ = ["StudioRequest"]


@dataclass(frozen=True, kw_only=True)
class StudioRequest:
    """Opens a page in the browser: draw, compare, walk through the latent space, and see what is
    wrong with a noise schedule.

    The page shows a command and Python lines for what it drew. It asks no other machine for
    anything, and ends with Ctrl-C.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")] = "fashion-mnist"
    """The model to begin with: an embedded model, a folder in diffusers format, a checkpoint in one
    file, or a hub id."""
    folder: str | None = None
    """Folder whose models can be chosen on the page, too. Nothing outside of it is read."""
    device: str = "auto"
    """Where to compute: cpu, cuda, ...; auto takes an accelerator where there is one."""
    port: Annotated[int, Range(0, 65535)] = 7860
    """Port of the page; 0 takes any that is free."""
    no_browser: bool = False
    """Only say where the page is."""
    host: str = "127.0.0.1"
    """Address to listen on. One that other machines reach needs --password."""
    password: str | None = None
    """What a visitor must type before the page opens, of 8 characters at least; any user name
    will do."""
