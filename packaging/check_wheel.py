"""Installs a built wheel into an empty environment of each Python, and uses it there.

Run: python packaging/check_wheel.py dist/*.whl --python python3.11 python3.12
Each environment takes what the constraints pin, and is thrown away afterwards. An interpreter that
this machine does not have is told and passed by; none at all is an error.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from email import message_from_string
from pathlib import Path

CONTENTS = ("ddim/py.typed", "ddim/__init__.pyi", "ddim/zoo/fashion-mnist/model_index.json")
USES = (
    ("ddim", "--version"),
    ("ddim", "sample", "--count", "1", "--steps", "2", "--out", "drawn"),
    ("python", "-c", "import ddim; print(ddim.DDIMScheduler().timesteps[:3])"),
)


def run(*command: object, cwd: Path | None = None) -> str:
    """Runs a command, and returns what it prints; a failure ends the program with its output."""
    words = [str(word) for word in command]
    ran = subprocess.run(words, cwd=cwd, capture_output=True, text=True)
    if ran.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{ran.stdout}{ran.stderr}")
    return ran.stdout


def extras(wheel: Path) -> list[str]:
    """The extras that the wheel offers; ends the program if a file is missing in it."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        if missing := [name for name in CONTENTS if name not in names]:
            sys.exit(f"{wheel} lacks {', '.join(missing)}.")
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        return message_from_string(archive.read(metadata).decode()).get_all("Provides-Extra", [])


def works(interpreter: str) -> bool:
    """Whether this machine can run such a Python."""
    if shutil.which(interpreter) is None:
        return False
    return subprocess.run([interpreter, "--version"], capture_output=True).returncode == 0


def check(wheel: Path, interpreter: str, constraints: Path, offered: list[str]) -> None:
    """Installs the wheel for one Python and uses it, outside of the repository."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        run(interpreter, "-m", "venv", place / "venv")
        programs = place / "venv" / "bin"
        install = (programs / "python", "-m", "pip", "install", "--quiet", "-c", constraints)
        run(*install, wheel)
        for program, *words in USES:
            run(programs / program, *words, cwd=place)
        for extra in offered:
            run(*install, "--dry-run", f"{wheel}[{extra}]")
    print(f"{wheel.name} works on {interpreter}, and its extras resolve.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", nargs="+", default=["python3"])
    parser.add_argument("--constraints", type=Path, default=Path("constraints.txt"))
    options = parser.parse_args()
    wheel, constraints = options.wheel.resolve(), options.constraints.resolve()
    offered = extras(wheel)
    found = [name for name in options.python if works(name)]
    for name in options.python:
        if name not in found:
            print(f"{name} is not on this machine, and was not tried.")
    if not found:
        sys.exit(f"none of {', '.join(options.python)} is on this machine.")
    for name in found:
        check(wheel, name, constraints, offered)


if __name__ == "__main__":
    main()
