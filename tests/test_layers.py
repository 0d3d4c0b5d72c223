"""Arrows point one way: a module imports strictly lower layers."""

import ast
import pathlib

import ddim

LAYERS = [
    {"errors"},
    {"schedule"},
    {"prediction", "timesteps", "guidance", "noise", "prior"},
    {"step", "denoiser", "objective", "interpolation", "configuration"},
    {"sampler", "plan"},
    {"inversion", "reversible", "search"},
    {
        "encoding",
        "oracle",
        "fitting",
        "scheduler",
        "images",
        "checkpoints",
        "conversion",
        "distributed",
        "networks",
    },
    {"symptoms", "sampling"},
    {"checks", "text_inputs"},
    {"stable_diffusion"},
    {"text_codes"},
    {"text_to_image"},
    {"codes", "doctor", "pipelines"},
    {"training", "evaluation"},
    {"cli", "studio"},
    {"__main__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
TORCH_ONLY = {
    "errors",
    *(n for layer in LAYERS[1:6] for n in layer),
    "encoding",
    "oracle",
    "fitting",
    "symptoms",
    "checks",
    "doctor",
}
STANDARD = {
    "collections",
    "dataclasses",
    "difflib",
    "typing",
    "math",
    "json",
    "enum",
    "functools",
    "itertools",
    "pathlib",
}
STANDARD |= {"hashlib", "inspect", "operator", "warnings", "numpy", "torch", "ddim"}
ROOT = pathlib.Path(ddim.__file__).parent


def imported(tree: ast.AST) -> list[str]:
    """Full module names that a file imports, but for blocks under TYPE_CHECKING."""
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
            names += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.append(node.module or "")
    return names


def units(root: pathlib.Path):
    for path in sorted(root.rglob("*.py")):
        if path != root / "__init__.py" and "zoo" not in path.parts:
            yield (
                path.relative_to(root).parts[0].removesuffix(".py"),
                imported(ast.parse(path.read_text())),
            )


def test_modules_import_only_lower_layers():
    bad = []
    for unit, names in units(ROOT):
        assert unit in RANK, f"{unit} has no layer; add it to the list"
        for target in (f"{n}.__init__".split(".")[1] for n in names if n.split(".")[0] == "ddim"):
            if target not in (unit, "__init__") and RANK.get(target, 99) >= RANK[unit]:
                bad.append(f"{unit} -> {target}")
    assert bad == []


def test_the_core_needs_torch_and_numpy_only():
    bad = [
        f"{unit} -> {n}"
        for unit, names in units(ROOT)
        if unit in TORCH_ONLY
        for n in names
        if n.split(".")[0] not in STANDARD
    ]
    assert bad == []


def test_a_planted_upward_import_is_found(tmp_path):
    (tmp_path / "schedule.py").write_text("from ddim.sampler import sample\n")
    ((unit, names),) = units(tmp_path)
    assert RANK[names[0].split(".")[1]] >= RANK[unit]
