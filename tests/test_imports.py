"""Imports run one way: no module of ftjax imports, directly or through others, a module that imports it."""

import ast
import functools
import graphlib
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "ftjax"
FILES = {".".join(file.relative_to(ROOT.parent).with_suffix("").parts): file for file in ROOT.rglob("*.py")}
MODULES = {name.removesuffix(".__init__"): file for name, file in FILES.items()}


@functools.cache
def imported(name: str) -> set[str]:
    """The modules of ftjax that a module imports, at its top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys() or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & MODULES.keys() - {name}


def test_no_imports_run_in_a_circle():
    # `ftjax` itself names what is public; other modules take only its version.
    graph = {name: imported(name) - {"ftjax"} for name in MODULES if name != "ftjax"}
    assert len(graph) > 100
    assert len(tuple(graphlib.TopologicalSorter(graph).static_order())) == len(graph)  # CycleError names a circle


def test_packages_import_downwards():
    """The figure of docs/architecture.md: packages that a package may import. Top-level modules may be used by all."""
    below = {
        "models": set(),
        "hub": {"models", "tasks"},
        "objectives": {"models"},
        "tasks": {"data", "evaluation", "hub", "models", "objectives", "training"},  # loaded when a task is asked for
    }
    below["tuning"] = below["data"] = {"hub", "models", "tasks"}
    packages = {file.parent.name for file in ROOT.glob("*/__init__.py")}
    for name in MODULES:
        package = name.split(".")[1] if "." in name else ""
        if package in below:
            others = {other.split(".")[1] for other in imported(name) - {"ftjax"}} & packages
            assert others <= below[package] | {package, "assets"}, name


# Modules that a declared package brings along.
BROUGHT = {"absl": "jax", "etils": "flax", "ml_dtypes": "jax", "nltk": "rouge-score", "numpy": "jax"}
BROUGHT |= {"orbax": "orbax-checkpoint", "pyarrow": "datasets", "sklearn": "scikit-learn"}


def test_what_is_imported_is_installed_with_ftjax_or_an_extra():
    """A package of the extra `test` is there where tests run, and not where users are."""
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    extras = [lines for extra, lines in project["optional-dependencies"].items() if extra != "test"]
    declared = {re.match(r"[\w-]+", line)[0] for line in sum(extras, project["dependencies"])}
    missing = set()
    for file in MODULES.values():
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            tops = {name.partition(".")[0] for name in names} - {"ftjax", *sys.stdlib_module_names}
            packages = {BROUGHT.get(top, top.replace("_", "-")) for top in tops}
            missing |= {f"{file.name}: {package}" for package in packages - declared}
    assert not missing
