"""Rules of the repository: one-way imports between layers, docstrings, short functions, no local paths."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "codi"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 60  # of a function; a file may be as long as its one concept needs
LONGER = {  # functions that are still to be split, with the lines that they may not exceed
    "apps.benchmark.benchmark": 64, "apps.pictures.make_pictures": 79, "apps.demo.make_gallery": 81,
    "data.raycast.render": 86, "evaluation.evaluate.evaluate": 87, "apps.evaluate.evaluate": 114,
    "training.trainer.train": 120,
}  # fmt: skip
PUBLIC = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

# The layers, or single modules of a layer, that each layer may import. Its own modules are always allowed.
MAY_IMPORT = {
    "errors": set(),
    "files": {"errors"},
    "schedule": {"errors"},
    "models": {"errors", "files", "schedule"},
    "tasks": {"errors", "files", "data.images"},
    "data": {"errors", "files"},
    "objectives": {"errors", "files", "schedule", "models"},
    "sampling": {"errors", "files", "schedule", "models", "tasks", "data.images"},
    "evaluation": {"errors", "files", "tasks", "data", "sampling"},
    "training": {"errors", "files", "schedule", "models", "tasks", "data", "objectives", "sampling", "evaluation"},
    "export": {
        "errors",
        "files",
        "schedule",
        "models",
        "tasks",
        "data",
        "objectives",
        "training",
        "sampling",
        "evaluation",
    },
}
MAY_IMPORT["apps"] = {*MAY_IMPORT, ""}  # "": the package's own __init__, for its version
MAY_IMPORT["codi"] = set(MAY_IMPORT) - {"apps"}  # the package's own __init__: what users import


def module_name(path: Path) -> str:
    """Return 'data.images' for src/codi/data/images.py, 'data' for its __init__, '' for codi's own."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str:
    """Return the layer of a module: 'codi' for the package's own __init__, 'apps' for `python -m codi`."""
    return "apps" if module == "__main__" else module.split(".")[0] or "codi"


MODULES = {module_name(path) for path in SOURCES}


def imports(tree: ast.Module, path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, module below codi) of every import that runs, without those for type checkers only."""
    package = ["codi", *path.relative_to(PACKAGE).parent.parts]
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from .data import images` names a module, `from .data.images import read_image` a name inside one.
            names = [
                full if (full := f"{base}.{alias.name}").removeprefix("codi.") in MODULES else base
                for alias in node.names
            ]
        else:
            continue
        for name in names:
            if name == "codi" or name.startswith("codi."):
                yield node.lineno, name.removeprefix("codi").removeprefix(".")


def forbidden(source: str, path: Path) -> list[str]:
    """Return the imports in `source`, a file at `path`, that its layer may not make."""
    layer = layer_of(module_name(path))
    allowed = MAY_IMPORT[layer] | {layer}
    faults = []
    for line, target in imports(ast.parse(source), path):
        prefixes = {".".join(target.split(".")[:n]) for n in range(1, target.count(".") + 2)}
        if not prefixes & allowed:
            faults.append(f"{path.relative_to(ROOT)}:{line}: {layer} must not import {target or 'codi'}")
    return faults


def test_imports_flow_one_way():
    assert SOURCES
    unknown = {layer_of(module) for module in MODULES} - set(MAY_IMPORT)
    assert not unknown, f"layers missing from MAY_IMPORT: {sorted(unknown)}"
    assert [fault for path in SOURCES for fault in forbidden(path.read_text(), path)] == []


@pytest.mark.parametrize(
    ("path", "source", "faults"),
    [
        ("models/x.py", "from ..schedule import alpha\nfrom . import codec", 0),
        ("models/x.py", "from ..tasks import get_task", 1),
        ("models/x.py", "from .. import apps", 1),
        ("schedule.py", "import codi.models.codec", 1),
        ("schedule.py", "def late():\n    from .models import codec", 1),
        ("sampling/x.py", "from ..data.images import read_image", 0),
        ("sampling/x.py", "from ..data.batches import Batch", 1),
        ("sampling/x.py", "from codi.training import trainer", 1),
        ("training/x.py", "import codi", 1),
        ("tasks/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..data.batches import Batch", 0),
        ("__init__.py", "from .sampling import pipeline", 0),
        ("__init__.py", "from .apps import cli", 1),
    ],
)
def test_forbidden_imports_are_detected(path, source, faults):
    assert len(forbidden(source, PACKAGE / path)) == faults


def test_everything_public_has_a_docstring():
    bare = []
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        name = path.relative_to(ROOT)
        if tree.body and not ast.get_docstring(tree):
            bare.append(f"{name}: the module")
        for node in tree.body:
            public = isinstance(node, PUBLIC) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                bare.append(f"{name}:{node.lineno}: {node.name}")
    assert bare == []


def test_functions_stay_short():
    lengths = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                lengths[f"{module_name(path)}.{node.name}"] = node.end_lineno - node.lineno + 1
    assert {name: n for name, n in lengths.items() if n > LONGER.get(name, MAX_LINES)} == {}


def test_contributing_lists_every_layer_and_existing_tests():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert {layer for layer in map(layer_of, MODULES) if f"| `{layer}" not in text} <= {"codi"}
    mentioned = set(re.findall(r"`(test_\w+\.py)`", text))
    assert {name for name in mentioned if not (ROOT / "tests" / name).is_file()} == set()


def readme_commands() -> list[str]:
    """Return the shell lines of the README, those indented by four spaces, without their comments."""
    lines = re.findall(r"^    (\S.*)$", re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.S), re.M)
    return [re.sub(r"\s#.*", "", line).strip() for line in lines]


def test_readme_names_only_targets_that_exist():
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))
    assert {"setup", "demo", "test"} <= targets
    mentioned = [line.split()[1] for line in readme_commands() if line.startswith("make ")]
    assert mentioned == ["demo", "test"] and set(mentioned) <= targets


def test_readme_commands_use_existing_flags():
    from typer.main import get_command

    from codi.apps.cli import app

    shown = [line.split() for line in readme_commands() if line.startswith(".venv/bin/codi ")]
    assert len(shown) >= 9
    known: Any = get_command(app)
    for _, name, *arguments in shown:
        command = known.commands[name]
        if hasattr(command, "commands"):
            command = command.commands[arguments[0]]
        flags = {flag for parameter in command.params for flag in parameter.opts}
        assert {argument for argument in arguments if argument.startswith("-")} <= flags, " ".join([name, *arguments])


def test_readme_names_only_recipes_that_exist():
    mentioned = re.findall(r"codi distill ([a-z][a-z0-9-]*)(?=[ `])", (ROOT / "README.md").read_text())
    assert mentioned and {name for name in mentioned if not (PACKAGE / "recipes" / f"{name}.yaml").is_file()} <= {
        "my-depth"
    }


def test_no_local_paths_are_in_the_repository():
    kinds = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".sh", ".json", ".jsonl", ".html", ""}
    generated = {".git", ".venv", "demo", "runs", "build", "dist", "__pycache__", ".pytest_cache", ".ruff_cache"}
    local_path = re.compile(r"/(?:work|root|home/\w+)/")
    faults = []
    for path in sorted(ROOT.rglob("*")):
        inside = path.relative_to(ROOT)
        if path.suffix not in kinds or generated & set(inside.parts) or not path.is_file():
            continue
        lines = path.read_text(errors="replace").splitlines()
        faults += [
            f"{inside}:{number}: {line.strip()[:80]}" for number, line in enumerate(lines, 1) if local_path.search(line)
        ]
    assert faults == []
