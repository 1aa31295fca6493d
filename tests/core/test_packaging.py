"""The rooms in pyproject.toml are those of the tree, and keep to the direction of imports."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
#: What each room may import of the others.
ALLOWED = {
    "core": set(),
    "edit": {"core", "demo"},
    "export": {"core"},
    "serve": {"core"},
    # edit: the closed-form attack is the optimum that the certificate of an edit is made of, not a copy of it
    "eval": {"core", "serve", "demo", "edit"},
}


def settings() -> dict[str, dict[str, str]]:
    content: dict[str, dict[str, str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    return content


def test_packages_are_the_rooms() -> None:
    with_code = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    folders = {folder: package for package, folder in settings()["package-dir"].items()}
    assert with_code == set(folders)
    assert set(settings()["packages"]) == set(folders.values())
    assert not (ROOT / "excise").exists(), "a folder named excise would shadow the install"
    nested = [path for room in folders for path in (ROOT / room).glob("*/**/*.py")]
    assert nested == [], "a package inside a room must be listed in pyproject.toml"


@pytest.mark.parametrize("room", ALLOWED)
def test_direction_of_imports(room: str) -> None:
    packages = {package: folder for package, folder in settings()["package-dir"].items() if package != "excise"}
    for path in (ROOT / room).glob("*.py"):
        tree = ast.parse(path.read_text())
        # A type alone needs no import at run time.
        for_types = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        for node in (node for node in ast.walk(tree) if id(node) not in for_types):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                target = packages.get(".".join(name.split(".")[:2]))
                if target and target != room and not (room == "core" and path.name.startswith("cli")):
                    assert target in ALLOWED[room], f"{path} imports {name}"
