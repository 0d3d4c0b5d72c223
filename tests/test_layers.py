"""Imports point one way: between rooms, and between the files of a room."""

import ast
import pathlib
from collections.abc import Iterator

import ddim

ROOT = pathlib.Path(ddim.__file__).parent

ROOMS = [
    {"ground"},
    {"core"},
    {"configuration"},
    {"inversion", "fitting", "doctor", "scheduler"},
    {"models"},
    {"pipelines", "data"},
    {"training", "evaluation"},
    {"runs"},
    {"studio"},
    {"cli"},
]
"""A room, or a file beside the rooms, imports only what stands in an earlier set."""

ROOM_OF = {
    **{
        "bounds": "ground",
        "errors": "ground",
        "files": "ground",
        "figures": "ground",
        "options": "ground",
        "scheduler_base": "scheduler",
        "scheduler": "scheduler",
    },
    "__main__": "cli",
}
"""Files beside the rooms that count as a room's."""

FILES = {
    "ground": [{"bounds", "errors"}, {"files", "options"}, {"figures"}],
    "core": [
        {"checks"},
        {"schedule"},
        {"prediction", "timesteps", "guidance", "noise", "prior"},
        {"step", "denoiser", "objective", "interpolation", "tables"},
        {"plan", "oracle", "route"},
        {"sampler"},
    ],
    "inversion": [{"ddim", "reversible"}, {"codes"}, {"encoding", "code_files"}],
    "fitting": [{"search"}, {"timesteps"}],
    "doctor": [
        {"symptoms", "reading"},
        {"probing"},
        {"findings"},
        {"level_checks", "option_checks", "agreement", "verdict"},
        {"checks"},
        {"report"},
        {"plot", "text"},
    ],
    "scheduler": [{"scheduler_base"}, {"scheduler"}],
    "runs": [
        {"leases", "shards", "rules", "values"},
        {"record", "shared_options"},
        {"requests", "engine", "stores", "status"},
        {"sharing"},
        {"workers", "ray_engine", "model"},
        {"measuring", "text", "probing"},
        {"sample", "evaluate", "table", "reconstruct", "consistency", "interpolate"}
        | {"encode", "decode", "edit", "fit_steps", "diagnose", "show"},
    ],
    "studio": [
        {"request", "guard", "desk", "shelf", "python_lines", "fields"},
        {"markup", "opening"},
        {"tasks"},
        {"parts"},
        {"draw_tab", "compare_tab", "latent_tab", "doctor_tab"},
        {"page"},
        {"server"},
    ],
    "models": [
        {"images", "folder", "layouts", "single_file"},
        {"checkpoints"},
        {"conversion", "export", "facts"},
    ],
    "evaluation": [
        {"classifier", "metrics"},
        {"features"},
        {"protocol"},
        {"sketches", "report"},
        {"latents"},
    ],
    "data": [
        {"captions", "dataset", "fashion_text", "splits"},
        {"folders", "arrays", "batches"},
        {"parquet", "archives", "survey"},
        {"named"},
        {"sources"},
        {"pictures"},
    ],
    "training": [
        {"config", "base", "stopping", "model_card"},
        {"division"},
        {"draws", "network", "package"},
        {"subject"},
        {"record", "loop", "text"},
        {"checkpoint", "compilation", "summary"},
        {"monitoring"},
        {"trainer"},
    ],
    "pipelines": [
        {"faster_layers", "network_calls", "routing", "foreign", "cuda_graphs"},
        {"networks"},
        {"recording"},
        {"base", "inputs", "pictures"},
        {"cards", "coding", "prompts"},
        {"unconditional", "latent", "calls", "adopted"},
        {"text_codes"},
        {"text_to_image"},
        {"diffusion_pipeline"},
    ],
}
"""The same within a room: the files that stand in one set do not import one another."""

TORCH_ONLY = {"ground", "core", "configuration", "inversion", "fitting", "doctor"}
"""Rooms that need torch, numpy and the standard library only; ``inversion`` also stores tensors as
safetensors, ``doctor`` draws, and options say to ``tyro`` how they are read."""
ALLOWED = {"torch", "numpy", "ddim", "safetensors", "filelock", "matplotlib", "tyro"}


def imported(tree: ast.AST) -> list[str]:
    """Full names of the modules that a file imports, except in blocks under TYPE_CHECKING."""
    names: list[str] = []
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.append(node.module or "")
    return names


def sources(root: pathlib.Path) -> Iterator[tuple[list[str], list[str]]]:
    """Each file as (its name in parts, such as ["core", "step"]; what it imports)."""
    for path in sorted(root.rglob("*.py")):
        if path != root / "__init__.py" and "zoo" not in path.parts:
            parts = list(path.relative_to(root).with_suffix("").parts)
            yield parts, imported(ast.parse(path.read_text()))


def rank(name: str, layers: list[set[str]]) -> int:
    found = [number for number, layer in enumerate(layers) if name in layer]
    assert found, f"{name} has no layer; add it to the list"
    return found[0]


def upward(root: pathlib.Path) -> list[str]:
    """``a -> b`` wherever a file imports one that is not in an earlier layer."""
    bad = []
    for parts, names in sources(root):
        for target in (name.split(".")[1:] for name in names if name.split(".")[0] == "ddim"):
            if not target:  # the package itself, for its version
                continue
            room, other = (ROOM_OF.get(name, name) for name in (parts[0], target[0]))
            if other != room:
                is_bad = rank(other, ROOMS) >= rank(room, ROOMS)
            else:
                is_bad = room in FILES and (
                    rank(target[1] if len(target) > 1 else target[0], FILES[room])
                    >= rank(parts[-1], FILES[room])
                )
            if is_bad:
                bad.append(f"{'.'.join(parts)} -> {'.'.join(target)}")
    return bad


def test_imports_point_one_way_between_rooms_and_inside_them():
    assert upward(ROOT) == []


def test_of_the_commands_only_its_own_knows_the_studio():
    knowing = {
        ".".join(parts)
        for parts, names in sources(ROOT)
        if parts[0] == "cli" and any(name.startswith("ddim.studio") for name in names)
    }
    assert knowing == {"cli.studio"}


def test_every_file_of_an_ordered_room_has_its_layer():
    for room, layers in FILES.items():
        files = {path.stem for path in (ROOT / room).glob("*.py")} - {"__init__"}
        files |= {name for name, home in ROOM_OF.items() if home == room}
        assert files == set().union(*layers)
        assert sum(map(len, layers)) == len(files)


def test_no_layer_between_rooms_holds_a_single_file_but_the_configuration():
    alone = [layer for layer in ROOMS[1:] if all(not (ROOT / name).is_dir() for name in layer)]
    assert alone == [{"configuration"}]


def test_the_rooms_of_the_mathematics_need_torch_and_numpy_only():
    import sys

    known = ALLOWED | set(sys.stdlib_module_names)
    bad = [
        f"{'.'.join(parts)} -> {name}"
        for parts, names in sources(ROOT)
        if ROOM_OF.get(parts[0], parts[0]) in TORCH_ONLY
        for name in names
        if name.split(".")[0] not in known
    ]
    assert bad == []


def test_every_room_says_in_one_sentence_what_it_is_for():
    for room in ROOT.iterdir():
        if (room / "__init__.py").exists():
            text = ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
            assert text, room.name
            assert ". " not in text.split("\n\n")[0], room.name


def test_a_planted_upward_import_is_found(tmp_path):
    for name in ("core/schedule", "core/sampler", "models/images"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text("")
    (tmp_path / "core/schedule.py").write_text("from ddim.core.sampler import sample\n")
    (tmp_path / "core/sampler.py").write_text("from ddim.models.images import to_pil\n")
    assert upward(tmp_path) == ["core.sampler -> models.images", "core.schedule -> core.sampler"]
