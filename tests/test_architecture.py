"""The layers hold: imports point down, and each outside library lives behind one file.

Pillow lives behind three: of files that are read, of pictures that are made, and of sizes.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "cmtool"
FILES = sorted(ROOT.rglob("*.py"))

ROOMS = [
    "errors", "core", "system", "weights", "hub", "formats", "data", "presets", "models", "guide",
    "sampling", "prepared", "editing", "convert", "export", "evaluation", "training", "publish",
    "page", "docs", "assets", "cli",
]  # fmt: skip
"""From the ground up: a room imports those before it, and itself."""
ONE_IMPORTER = {
    "cleanfid": "evaluation/cross_check.py",
    "lpips": "core/distances.py",
    "PIL": ("data/images.py", "data/decoding.py", "data/drawing.py"),
    "tomlkit": "presets/toml.py",
    "msgpack": "formats/jcm_msgpack.py",
    "lmdb": "data/lsun.py",
    "pyarrow": "data/tables.py",
    "matplotlib": "training/plots.py",
    "jinja2": "training/report.py",
    "filelock": ("training/lock.py", "system/download.py"),
    "requests": "system/download.py",
    "huggingface_hub": "hub.py",
    "onnxruntime": "export.py",
    "triton": "core/networks/cuda/kernels.py",
    "torch.utils.tensorboard": "training/trackers.py",
    "starlette": "page/server.py",
    "uvicorn": "page/server.py",
    "wandb": "training/trackers.py",
    "mlflow": "training/trackers.py",
}
NOT_IN_CORE = {"typer", "pydantic", "rich", "numpy"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            if node.module == "cmtool":
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor(module):
    """How high the room of a module lies; None for what is of no room."""
    room = [*module.split("."), ""][1]
    return ROOMS.index(room) if room in ROOMS else None


def name(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_point_down(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] in ("__init__", "__main__"):
        return
    for module in imports(path):
        if module.startswith("cmtool.") and floor(module) is not None:
            assert floor(module) <= ROOMS.index(parts[0]), f"{name(path)} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_outside_libraries_live_behind_one_file(path):
    modules = list(imports(path))
    used = {module.split(".")[0] for module in modules}
    for library, home in ONE_IMPORTER.items():
        if any(module == library or module.startswith(f"{library}.") for module in modules):
            assert name(path) in (home if isinstance(home, tuple) else (home,))
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


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_has_at_most_400_lines_and_a_function_60(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
