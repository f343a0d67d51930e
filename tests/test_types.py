"""Types and documentation of what other programs may call."""

from __future__ import annotations

import importlib
import inspect
import os
import pydoc
import subprocess
import sys

import pytest

from ark.bootstrap import ROOT

CHECKED = ("-p", "ark.toolkit", "-p", "ark.patches", "-p", "ark.nodes", "-m", "ark.ignite_ark_4b")
PUBLIC = sorted(
    ".".join(("ark", *path.relative_to(ROOT).with_suffix("").parts))
    for path in [*(ROOT / "toolkit").rglob("*.py"), *(ROOT / "patches" / f"{name}.py" for name in ("diffusers", "pipeline", "render"))]
    if path.name not in ("__init__.py", "launch.py") and path.parent.name != "fused"
)  # fmt: skip


def test_types_are_right(tmp_path):
    try:
        (tmp_path / "ark").symlink_to(
            ROOT, target_is_directory=True
        )  # whatever the folder is called
    except OSError:
        pytest.skip("this account may not make links")
    cache = ROOT / ".mypy_cache"
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", "--cache-dir", cache, *CHECKED]  # fmt: skip
    done = subprocess.run([str(part) for part in command], cwd=tmp_path, capture_output=True, text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def public_objects(module) -> list:
    """The classes and functions that a module defines and does not hide, with their public methods."""
    own = [
        value for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__ and (inspect.isclass(value) or inspect.isroutine(value))
    ]  # fmt: skip
    methods = [
        method for kind in own if inspect.isclass(kind)
        for name, method in vars(kind).items() if not name.startswith("_") and inspect.isfunction(method)
    ]  # fmt: skip
    return own + methods


@pytest.mark.parametrize("name", PUBLIC)
def test_documentation_renders(name):
    module = importlib.import_module(name)
    assert pydoc.render_doc(module, renderer=pydoc.plaintext)
    for value in public_objects(module):
        assert inspect.getdoc(value), f"{name}.{value.__qualname__} has no documentation"
        assert value.__name__ in pydoc.render_doc(value, renderer=pydoc.plaintext)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_have_type_hints(name):
    for value in public_objects(importlib.import_module(name)):
        if inspect.isfunction(value) and not inspect.isgeneratorfunction(inspect.unwrap(value)):
            missing = [
                parameter.name for parameter in inspect.signature(value).parameters.values()
                if parameter.annotation is parameter.empty and parameter.name not in ("self", "cls")
            ]  # fmt: skip
            assert not missing, f"{name}.{value.__qualname__}: {', '.join(missing)}"
            assert "return" in value.__annotations__, f"{name}.{value.__qualname__}"


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "py.typed").exists() and os.path.getsize(ROOT / "py.typed") == 0
