"""The layers hold: imports point down, and each outside library lives behind one file."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "cmtool"
FILES = sorted(ROOT.rglob("*.py"))

LAYERS = [
    "errors", "core", "presets", "toml", "weights", "components", "models", "build", "utilisation",
    "sampling", "editing", "measure", "evaluation", "convert", "events", "plots", "rundir",
    "report", "progress", "stop", "run", "assets", "cli",
]  # fmt: skip
CORE_LAYERS = [
    {"types", "tensors", "tangents", "rng", "dist", "devices", "workers", "files"},
    {
        "noise",
        "parallel",
        "labels",
        "precond",
        "solvers",
        "distances",
        "edits",
        "networks",
        "images",
        "metrics",
        "inception",
        "augment",
    },
    {
        "ema",
        "optimizers",
        "losses",
        "samplers",
        "search",
        "features",
        "formats",
        "sources",
        "data",
        "survey",
        "consistency",
    },
    {"trainer", "archives"},
    {"references", "checkpoint_folder"},
    {"checkpoint"},
]
ONE_IMPORTER = {
    "cleanfid": "core/features.py",
    "lpips": "core/distances.py",
    "PIL": "core/images.py",
    "tomlkit": "toml.py",
    "msgpack": "core/formats/jcm_msgpack.py",
    "lmdb": "core/sources.py",
    "matplotlib": "plots.py",
    "jinja2": "report.py",
    "filelock": "rundir.py",
    "torch.utils.tensorboard": "events.py",
}
NOT_IN_CORE = {"typer", "pydantic", "rich"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            if node.module in ("cmtool", "cmtool.core"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(module):
    parts = module.split(".")
    return LAYERS.index(parts[1]) if len(parts) > 1 and parts[1] in LAYERS else None


def name(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_point_down(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] in ("__init__", "__main__"):
        return
    own = LAYERS.index(parts[0])
    for module in imports(path):
        if module.startswith("cmtool.") and layer(module) is not None:
            assert layer(module) <= own, f"{name(path)} imports {module}"


@pytest.mark.parametrize("path", sorted((ROOT / "core").rglob("*.py")), ids=name)
def test_core_imports_point_down(path):
    parts = path.relative_to(ROOT / "core").with_suffix("").parts
    if parts[0] == "__init__":
        return
    own = next(i for i, group in enumerate(CORE_LAYERS) if parts[0] in group)
    for module in imports(path):
        if module.startswith("cmtool.core."):  # from cmtool.core import x counts as well
            other = next(i for i, g in enumerate(CORE_LAYERS) if module.split(".")[2] in g)
            assert other <= own, f"{name(path)} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_outside_libraries_live_behind_one_file(path):
    modules = list(imports(path))
    used = {module.split(".")[0] for module in modules}
    for library, home in ONE_IMPORTER.items():
        if any(module == library or module.startswith(f"{library}.") for module in modules):
            assert name(path) == home
    if parts := path.relative_to(ROOT).parts:
        if parts[0] != "cli":
            assert not used & {"typer", "rich"}
        if parts[0] == "core":
            assert not used & NOT_IN_CORE


@pytest.mark.parametrize("path", sorted((ROOT / "core").rglob("*.py")), ids=name)
def test_core_neither_prints_nor_exits_nor_reads_the_environment(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "exit", "input")
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("environ", "getenv", "exit", "stdout", "stderr")


@pytest.mark.parametrize("path", FILES, ids=name)
def test_the_global_generator_is_seeded_in_one_place(path):
    if name(path) == "core/rng.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("manual_seed", "seed_all")


@pytest.mark.parametrize("path", sorted((ROOT / "cli").glob("*.py")), ids=name)
def test_commands_import_heavy_things_in_their_bodies(path):
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            assert module.split(".")[0] not in ("torch", "numpy", "pydantic", "PIL")
            if module.startswith("cmtool."):
                assert module.split(".")[1] in ("cli", "errors")
