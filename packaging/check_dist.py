"""Checks the built wheel and source archive, and uses the wheel in an empty environment.

Run: python packaging/check_dist.py dist --python python3.11 python3.12
Each environment takes what the constraints pin, and is thrown away afterwards. An interpreter that
this machine does not have is told and passed by; none at all is an error.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email import message_from_bytes
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONTENTS = (
    "ddim/py.typed",
    "ddim/__init__.pyi",
    "ddim/zoo/fashion-mnist/model_index.json",
    "ddim/zoo/fashion-mnist/prior.json",
    "ddim/zoo/fashion-mnist/unet/diffusion_pytorch_model.safetensors",
    "ddim/zoo/fashion-text/model_index.json",
    "ddim/zoo/fashion-text/text_encoder/model.safetensors",
    "ddim/zoo/fashion-text/tokenizer/vocab.json",
    "ddim/zoo/fashion-text/unet/diffusion_pytorch_model.safetensors",
    "ddim/zoo/fashion-text/vae/diffusion_pytorch_model.safetensors",
    "ddim/zoo/fashion-classifier/classifier.safetensors",
    "*.dist-info/METADATA",
    "*.dist-info/entry_points.txt",
    "*.dist-info/licenses/LICENSE",
    "*.dist-info/licenses/THIRD_PARTY_NOTICES.md",
)
SOURCES = ("PKG-INFO", "pyproject.toml", "README.md", "LICENSE", "THIRD_PARTY_NOTICES.md")
JUNK = ("*.pyc", "*.egg-info/*", ".*_cache/*", ".venv*", ".git/*", "*build/*", "dist/*", "out/*")
USES = (
    ("ddim", "--version"),
    ("ddim", "sample", "--count", "1", "--steps", "2", "--out", "drawn"),
    ("python", "-c", "import ddim; print(ddim.DDIMScheduler().timesteps[:3])"),
)


def read(archive: Path) -> dict[str, bytes]:
    """The files of a wheel, or of a source archive without the folder that holds them."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist()}
    with tarfile.open(archive) as source:
        return {
            member.name.partition("/")[2]: source.extractfile(member).read()
            for member in source.getmembers()
            if member.isfile()
        }


def faults(
    wheel: dict[str, bytes], source: dict[str, bytes], tracked: set[str] | None = None
) -> list[str]:
    """What the archives lack, what they should not hold, and where they differ.

    Args:
        wheel: The files of the wheel.
        source: The files of the source archive.
        tracked: The files that the repository knows. None: this is no repository.
    """
    package = {name.removeprefix("src/"): text for name, text in source.items()}
    package = {name: text for name, text in package.items() if name.startswith("ddim/")}
    ours = {name: text for name, text in wheel.items() if ".dist-info/" not in name}
    both = ours.keys() & package.keys()
    junk = {name for name in source if any(fnmatch(f"/{name}", f"*/{what}") for what in JUNK)}
    if tracked is not None:
        junk |= source.keys() - tracked - {"PKG-INFO"}
    return [
        *(f"the wheel lacks {what}" for what in CONTENTS if not _any(what, wheel)),
        *(f"the source archive lacks {name}" for name in SOURCES if name not in source),
        *(f"the source archive should not hold {name}" for name in sorted(junk)),
        *(f"only one of both holds {name}" for name in sorted(ours.keys() ^ package.keys())),
        *(f"{name} differs" for name in sorted(both) if ours[name] != package[name]),
    ]


def differences(wheel: dict[str, bytes], again: dict[str, bytes]) -> list[str]:
    """Files that are not equal in both wheels, but for what names the version of the build tool."""
    names = sorted(name for name in wheel.keys() | again.keys() if not name.endswith("/WHEEL"))
    names = [name for name in names if not name.endswith("/RECORD")]
    return [name for name in names if wheel.get(name) != again.get(name)]


def extras(wheel: dict[str, bytes]) -> list[str]:
    """The extras that the wheel offers."""
    metadata = next(text for name, text in wheel.items() if name.endswith(".dist-info/METADATA"))
    return message_from_bytes(metadata).get_all("Provides-Extra", [])


def _any(pattern: str, names: dict[str, bytes]) -> bool:
    return any(fnmatch(name, pattern) for name in names)


def run(*command: object, cwd: Path) -> str:
    """Runs a command, and returns what it prints; a failure ends the program with its output.

    Nothing of the repository is importable there.
    """
    words = [str(word) for word in command]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    ran = subprocess.run(words, cwd=cwd, env=clean, capture_output=True, text=True)
    if ran.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{ran.stdout}{ran.stderr}")
    return ran.stdout


def tracked_files() -> set[str] | None:
    """The files that git knows in this repository. None: it is none, or git is not there."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return None
    ran = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    return None if ran.returncode else set(ran.stdout.split("\0"))


def works(interpreter: str) -> bool:
    """Whether this machine can run such a Python."""
    if shutil.which(interpreter) is None:
        return False
    return subprocess.run([interpreter, "--version"], capture_output=True).returncode == 0


def check(wheel: Path, source: Path, interpreter: str, constraints: Path) -> None:
    """Installs the wheel for one Python, uses it, and builds it from the source archive."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        run(interpreter, "-m", "venv", place / "venv", cwd=place)
        programs = place / "venv" / "bin"
        pip = (programs / "python", "-m", "pip", "--quiet", "--disable-pip-version-check")
        run(*pip, "install", "-c", constraints, wheel, cwd=place)
        for program, *words in USES:
            run(programs / program, *words, cwd=place)
        if not list((place / "drawn").glob("*.png")):
            sys.exit(f"ddim sample drew nothing on {interpreter}.")
        everything = f"{wheel}[{','.join(extras(read(wheel)))}]"
        run(*pip, "install", "-c", constraints, "--dry-run", everything, cwd=place)
        run(*pip, "wheel", "--no-deps", "--wheel-dir", place / "again", source, cwd=place)
        if changed := differences(read(wheel), read(place / "again" / wheel.name)):
            sys.exit(f"the wheel of {source.name} differs on {interpreter}: {', '.join(changed)}.")
    print(f"{wheel.name} works on {interpreter}; its extras resolve; {source.name} builds it.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="holds one wheel and one source archive")
    parser.add_argument("--python", nargs="+", default=["python3"])
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt")
    options = parser.parse_args()
    (wheel,), (source,) = (
        list(options.folder.resolve().glob(ending)) for ending in ("*.whl", "*.tar.gz")
    )
    if wrong := faults(read(wheel), read(source), tracked_files()):
        sys.exit("\n".join(wrong))
    found = [name for name in options.python if works(name)]
    for name in options.python:
        if name not in found:
            print(f"{name} is not on this machine, and was not tried.")
    if not found:
        sys.exit(f"none of {', '.join(options.python)} is on this machine.")
    for name in found:
        check(wheel, source, name, options.constraints.resolve())


if __name__ == "__main__":
    main()
