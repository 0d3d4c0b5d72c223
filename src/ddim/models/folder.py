"""What the folder of a model may name: which libraries its parts come from, and which files are
read. It is checked before a library is asked to open anything, since the folder may be anybody's.

A part is a folder of a model, such as ``unet``; model_index.json says its library and class."""

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from ddim.bounds import MOST_LEVELS
from ddim.errors import CheckpointError, first_line
from ddim.files import load_json

__all__ = [
    "check_files",
    "check_index",
    "check_links",
    "lasting_options",
    "part_names",
    "read_json",
]

_WEIGHTS = (".safetensors", ".bin")

# Of diffusers' names those that are no network or scheduler, but open other things in their turn.
_OPENERS = re.compile(r"Pipeline|Onnx|^Auto(?!encoder)|ModularPipeline")
_PARTS = "unet scheduler vae vqvae movq text_encoder tokenizer transformer safety_checker".split()
_OURS = ("DDIMScheduler", "DDIMInverseScheduler")

_MOST = {
    **{"layers": 200, "heads": 1024, "channels": 8192, "sample_size": 8192, "dim": 2**16},
    **{"class_embeds": 10**5, "timesteps": MOST_LEVELS, "position": 10**7, "vocab": 10**7},
    **{"embed": 10**6, "size": 10**6},
}
"""Largest numbers of a part's configuration by a piece of their names, the first that fits: memory
and time grow with them, whatever weights there are."""
_MOST_OTHER = 10**9
_MOST_LISTED = 10_000


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; a CheckpointError refuses anything else."""
    try:
        content = load_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the model's folder is not complete.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({first_line(error)}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object; got {type(content).__name__}.")
    return content


def part_names(index: Mapping[str, Any]) -> list[str]:
    """The parts that an index lists and that are there."""
    return [
        name
        for name, value in index.items()
        if name[:1] != "_" and _is_pair(value) and all(isinstance(word, str) for word in value)
    ]


def _is_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2


def check_index(
    index: Mapping[str, Any], where: Path | str, *, given: Mapping[str, Any] | None = None
) -> None:
    """Refuses an index (the content of model_index.json) that would have other code run than that
    of diffusers and transformers, or whose parts are no names of folders.

    Args:
        index: What the file says.
        where: The file, for messages.
        given: Options of ``from_pretrained``, where a user calls it: a part that is given is not
            opened, modules that he has imported are his own, and with ``trust_remote_code`` or
            ``custom_pipeline`` he answers for the code.

    Raises:
        CheckpointError: If it does.
    """
    is_called, given = given is not None, given or {}
    trusts = given.get("trust_remote_code") is True
    kind, names_code = index.get("_class_name"), given.get("custom_pipeline") is not None
    if kind is not None and not isinstance(kind, str) and not (trusts or names_code):
        raise CheckpointError(
            f"{where} names code in the model's folder as its pipeline ({kind!r}), and that is not "
            "run; where you trust it, open the folder in Python with trust_remote_code=True."
        )
    for name, value in index.items():
        if name in _PARTS and value is not None and not _is_pair(value):
            wanted = f"the library and the class of {name} in a list of two"
            raise CheckpointError(f"{where} must name {wanted}; got {value!r}.")
        if isinstance(value, list) and not name.isidentifier():
            what = "the name of a folder inside the model's, of letters, digits and underscores"
            raise CheckpointError(f"{where} lists the part {name!r}, and a part must be {what}.")
    for name in part_names(index):
        library, part = index[name]
        is_left_out = given.get(name, ...) is None
        is_users = is_called and _is_imported(library, part)
        if not (trusts or is_left_out or is_users or _is_known(library, part)):
            raise CheckpointError(
                f"{where} names {library}.{part} as the class of {name}, and only networks and "
                "schedulers of diffusers, and text encoders and tokenizers of transformers, are "
                "opened; in Python, import a module of your own before, or let code that lies in "
                "the part's folder be run by trust_remote_code=True."
            )


def _is_known(library: str, kind: str) -> bool:
    """Whether a class is of diffusers or transformers, or one of our schedulers, and opens nothing
    but its own part."""
    if library == "ddim.scheduler":
        return kind in _OURS
    is_library = library in ("diffusers", "transformers") or _is_pipeline_module(library)
    return is_library and kind.isidentifier() and not _OPENERS.search(kind)


def _is_pipeline_module(name: str) -> bool:
    """Whether diffusers knows classes by this name for a folder of its pipelines."""
    from diffusers import pipelines

    return isinstance(getattr(pipelines, name, None), type(pipelines))


def _is_imported(library: str, kind: str) -> bool:
    """Whether a module is loaded already, as a user's own is, and is none of those that we know."""
    known = ("diffusers", "transformers", "ddim")
    is_other = library.split(".")[0] not in known and library in sys.modules
    return is_other and not _OPENERS.search(kind)


def check_files(
    folder: Path, index: Mapping[str, Any], *, given: Mapping[str, Any] | None = None
) -> None:
    """Refuses a folder whose parts hold what is no regular file, what would have code run or other
    files read, or configurations that claim more memory than any model needs.

    Args:
        folder: The model's.
        index: What its index says.
        given: Options of ``from_pretrained``, as for :func:`check_index`.

    Raises:
        CheckpointError: If it does.
    """
    given = given or {}
    trusts = given.get("trust_remote_code") is True
    places = {folder / name: name not in given for name in part_names(index)}
    opened = [place for place, is_opened in places.items() if is_opened and place.is_dir()]
    for place in opened or [folder]:
        for path in sorted(place.iterdir()):
            _check_file(path, is_part=place != folder, trusts=trusts)
    if (folder / "None.py").exists() and not trusts:  # which diffusers takes for a custom pipeline
        raise CheckpointError(f"{folder / 'None.py'} is code, and is not run; remove it.")


def check_links(folder: Path) -> None:
    """Refuses a folder that is to be copied from, if a link in it leads out of it, but to the blobs
    of the hub's cache that it lies in; a CheckpointError names the link."""
    root = folder.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            target = path.resolve()
            if not (target.is_relative_to(root) or target.is_relative_to(blobs)):
                raise CheckpointError(
                    f"{path} is a link to {target}, out of the model's folder, and is not followed "
                    "when a model is copied; put the file itself there."
                )


def lasting_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """A part's configuration without what says where it lay, in what type its weights were, and
    which version wrote it."""
    passing = ("name_or_path", "transformers_version", "dtype", "torch_dtype")
    return {k: v for k, v in config.items() if not k.startswith("_") and k not in passing}


def _check_file(path: Path, *, is_part: bool, trusts: bool) -> None:
    if path.is_dir():
        return
    if not path.is_file():
        raise CheckpointError(f"{path} is no regular file, and is not opened; replace it.")
    if is_part and path.suffix == ".py" and not trusts:
        raise CheckpointError(
            f"{path} is code in a model's part, and is not run; where you trust it, open the "
            "folder in Python with trust_remote_code=True."
        )
    if path.name == "adapter_config.json":
        raise CheckpointError(
            f"{path} names weights that are added to those of the part; merge them into it, or "
            "load them in Python with load_lora_weights."
        )
    if path.name.endswith(".index.json"):
        _check_weight_index(path)
    elif path.name == "config.json":
        _check_config(path)
    elif path.name == "tokenizer_config.json":
        length = read_json(path).get("model_max_length", 1)
        if not (_is_side(length) or isinstance(length, float) and length > 0):
            wanted = "a number above 0 as model_max_length"
            raise CheckpointError(f"{path} must hold {wanted}; got {length!r:.60}.")


def _check_weight_index(path: Path) -> None:
    named = read_json(path).get("weight_map")
    for file in sorted(map(str, named.values())) if isinstance(named, dict) else ():
        if Path(file).name != file or Path(file).suffix not in _WEIGHTS:
            raise CheckpointError(
                f"{path} names the weights {file!r}, and they must be files of that folder."
            )


def _check_config(path: Path) -> None:
    """Checks what a library reads of a part's configuration beside the shape of its weights."""
    config = read_json(path)
    sides = config.get("sample_size", 1)
    is_pair = isinstance(sides, list) and len(sides) == 2
    if not all(side is None or _is_side(side) for side in (sides if is_pair else [sides])):
        wanted = "one whole number or two, above 0"
        raise CheckpointError(f"{path} must hold {wanted}, as sample_size; got {sides!r:.60}.")
    is_sound = "1D" in str(config.get("_class_name"))  # whose samples are long
    for name, value in _entries({} if is_sound else config):
        if name == "transformers_weights" or (
            name.strip("_").endswith("implementation") and "/" in str(value)
        ):
            raise CheckpointError(
                f"{path} names other files or code by {name} ({value!r}), which is not followed; "
                "remove that key."
            )
        if f"_{name}".endswith("_eps") and type(value) not in (int, float, NoneType):
            raise CheckpointError(f"{path} must hold a number as {name}; got {value!r:.60}.")
        if isinstance(value, list) and len(value) > _MOST_LISTED:
            raise CheckpointError(f"{path} lists {len(value)} {name}; there must be fewer.")
        bound = next((m for part, m in _MOST.items() if part in name), None)
        most, kinds = (_MOST_OTHER, int) if bound is None else (bound, (int, float))
        if isinstance(value, kinds) and not abs(value) <= most:  # NaN is not, either
            raise CheckpointError(f"{path} must hold at most {most} as {name}; got {value}.")


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _entries(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All values of a JSON object, those of inner lists under the name of the list."""
    waiting: list[tuple[str, Any]] = list(content.items())
    while waiting:
        name, value = waiting.pop()
        yield name, value
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(name, inner) for inner in value]
