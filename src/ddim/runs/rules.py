"""What acts on the model of a run: an option that was given and that nothing read is refused."""

from collections.abc import Collection
from typing import Any

from ddim.core.guidance import is_guided
from ddim.errors import DDIMError
from ddim.options import ModelKind, declarations, given_options

__all__ = ["Options", "refuse_unguided"]

_KINDS: dict[ModelKind, str] = {
    "text": "text-to-image models",
    "pixels": "models without text",
    "classes": "class-conditional models",
}


class Options:
    """A request, read by attribute; what is read acts, and what was given and not read is refused.

    Resolve a request whole before any weight is loaded, then call :meth:`refuse_unread`.

    Args:
        request: A request.
        *always: Options that act whatever the request is about.
    """

    def __init__(self, request: Any, *always: str) -> None:
        self._request = request
        self._read = set(always)

    def __getattr__(self, name: str) -> Any:
        self._read.add(name)
        return getattr(self._request, name)

    def refuse_unread(self, subject: str, kinds: Collection[str] = ()) -> None:
        """Refuses options that were given although nothing read them.

        Args:
            subject: What the request is about, such as the model's name, for the message.
            kinds: The kinds of model that it is.

        Raises:
            DDIMError: Which option, and what it would need.
        """
        declared = declarations(type(self._request))
        for name in given_options(self._request):
            if name in self._read:
                continue
            option, needs = declared[name].option, declared[name].needs
            if model := next((n.model for n in needs if n.model and n.model not in kinds), None):
                what = _KINDS[model]
                raise DDIMError(f"{option} is for {what}, and {subject} is not one; leave it out.")
            raise DDIMError(f"{option} has no effect on {subject}; leave it out.")


def refuse_unguided(request: Any, scale: float) -> None:
    """Refuses, with a DDIMError, options of guidance where a scale turns it off."""
    if is_guided(scale):
        return
    for name in ("guidance_rescale", "negative_prompt"):
        if getattr(request, name):
            option = f"--{name.replace('_', '-')}"
            raise DDIMError(
                f"{option} acts only with guidance, and the scale {scale:g} turns it off; give "
                f"--guidance-scale above 1, or leave out {option}."
            )
