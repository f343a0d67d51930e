"""The rules of the house: imports go down only, and the host stops at the door."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOST = {
    *("comfy", "comfy_api", "comfy_execution", "comfy_extras", "comfy_api_nodes"),
    *("folder_paths", "latent_preview", "node_helpers", "nodes", "server", "execution"),
}
STOREYS = {
    "nodes": {"nodes", "patches", "toolkit"},
    "patches": {"patches", "toolkit"},
    "toolkit": {"toolkit"},
}
FILES = [path for storey in STOREYS for path in sorted((ROOT / storey).rglob("*.py"))]
FILES += [
    path
    for path in (ROOT / "__init__.py", ROOT / "bootstrap.py", ROOT / "ignite_ark_4b.py")
    if path.exists()
]


def imports(source: str, path: Path) -> list[tuple[str, bool]]:
    """Every import of a file, also those inside functions: (dotted name, whether inside the pack).

    A relative name is resolved against the pack's root: `from ..toolkit import x` in `nodes/a.py` is `toolkit`.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.append((node.module, False))
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parts[:-1]
            base = package[: len(package) - (node.level - 1)]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(".".join((*base, name)), True) for name in names]
    return found


def violations(source: str, path: Path) -> list[str]:
    """What a file imports against the rules."""
    parts = path.relative_to(ROOT).parts
    storey = parts[0] if parts[0] in STOREYS else parts[-1]
    below = STOREYS.get(
        storey,
        {"__init__.py": {"nodes"}, "ignite_ark_4b.py": {"toolkit", "patches"}}.get(storey, set()),
    )
    wrong = []
    for name, inside in imports(source, path):
        top = name.split(".")[0]
        if inside and top not in below:
            wrong.append(f"imports {name}: only down the stairs")
        elif not inside and top == "ark":
            allowed = (
                storey == "ignite_ark_4b.py"
                and name.split(".")[1:2]
                and name.split(".")[1] in below
            )
            wrong += [] if allowed else [f"imports {name}: imports inside the pack are relative"]
        elif not inside and top in {"toolkit", "patches", "utils"}:
            wrong.append(
                f"imports {name}: someone else's, since imports inside the pack are relative"
            )
        elif not inside and top in HOST and storey not in ("nodes", "patches", "__init__.py"):
            wrong.append(f"imports {name}: the host only in nodes/ and patches/")
        elif not inside and top == "diffusers" and storey not in ("patches", "ignite_ark_4b.py"):
            wrong.append(f"imports {name}: diffusers only in patches/ and the trigger script")
        elif storey == "bootstrap.py" and top not in sys.stdlib_module_names:
            wrong.append(f"imports {name}: the standard library only")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_down_only(path):
    assert violations(path.read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("toolkit/a.py", "from ..patches import x"),
        ("toolkit/a.py", "from ..nodes.load import x"),
        ("toolkit/a.py", "def f():\n    import comfy.model_management"),
        ("toolkit/a.py", "from diffusers import x"),
        ("toolkit/kernels/a.py", "from ...patches import x"),
        ("patches/a.py", "from ..nodes import x"),
        ("nodes/a.py", "import diffusers"),
        ("nodes/a.py", "import utils"),
        ("nodes/a.py", "from toolkit import x"),
        ("nodes/a.py", "from ark.toolkit import x"),
        ("bootstrap.py", "import torch"),
        ("bootstrap.py", "from .toolkit import x"),
        ("__init__.py", "from .toolkit import x"),
    ],
)
def test_the_rule_sees_a_violation(file, line):
    assert violations(line, ROOT / file)


def test_every_top_level_package_is_in_pyproject():
    listed = re.search(
        r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M | re.S
    )
    names = {
        "ark",
        *(
            f"ark.{path.parent.name}"
            for path in ROOT.glob("*/__init__.py")
            if path.parent.name in STOREYS
        ),
    }
    assert names <= set(re.findall(r'"([^"]+)"', listed[1]))


def test_no_name_of_this_machine_in_a_tracked_file():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    suffixes = {".py", ".toml", ".md", ".json", ".js", ".yaml", ".yml", ".sh"}
    home = re.compile(r"(?<![\w.])/(?:work|root|home/\w+)/\w")
    texts = [
        ROOT / name
        for name in done.stdout.splitlines()
        if Path(name).suffix in suffixes or name == ".ci/run"
    ]
    found = [
        path.name
        for path in texts
        if path.exists() and home.search(path.read_text(encoding="utf-8"))
    ]
    assert found == []
