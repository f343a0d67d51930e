"""What was compiled is found by the next process, whatever was compiled after it, and only where it still holds."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ark.toolkit.facts import Unkept, function_of

PACK_PARENT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler here")  # fmt: skip
BLOCKS = """
import torch
from helpers import helper

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((4,), 2.0), requires_grad=False)
        self.hooks, self.factor = [], 1

    def forward(self, x, options):
        for hook in self.hooks:
            x = hook(x)
        return helper(x) * self.weight * self.factor

def first(block, x, **options):
    return block(x, options)

def second(block, x, **options):
    return x.cos() * block.weight, x + 1
"""
HELPERS = "def helper(x):\n    return x.sin() + 1\n"
CODE = """
import json, sys, torch
from pathlib import Path
import blocks
from ark.toolkit.compile import Compiler, any_length

compiler, results = Compiler("default", Path(sys.argv[1])), []
block = blocks.Block()
with torch.no_grad():
    for function in (blocks.first, blocks.second):
        run = compiler(function, lambda block, x, **options: any_length(x, 0))
        for length in (5, 7, 4):
            x = torch.arange(4.0 * length).reshape(length, 4)
            got, expected = run(block, x, extra=None), function(block, x, extra=None)
            same = [torch.allclose(a, b) for a, b in zip(got, expected, strict=True)]
            results += [type(got) is type(expected), *same]
        compiler.keep()
print(json.dumps([all(results), compiler.graphs, compiler.found]))
"""


CHANGES = """
import json, sys, torch
from pathlib import Path
import blocks
from ark.toolkit.compile import Compiler

compiler, found = Compiler("default", Path(sys.argv[1])), {}

def other(x, *more):
    return x

for change in (None, *json.loads(sys.argv[2])):
    block, x = blocks.Block(), torch.ones(9, 4)
    kept = dict(vars(blocks)), blocks.Block.forward
    with torch.no_grad():
        exec(change or "")
        call = {"block": block, "x": x, "options": {"extra": None}}
        found[change or ""] = [r.why_not(call) for r in compiler.kept(blocks.first)]
    vars(blocks).update(kept[0])
    blocks.Block.forward = kept[1]
print(json.dumps(found))
"""
CHANGED = {
    "blocks.helper = other": "helper",
    "block.forward = other": "L['block']",
    "block.hooks.append(other)": "L['block'].hooks",
    "block.factor = 2": "L['block'].factor",
    "block.factor = 1.0": "L['block'].factor",
    "block.register_forward_hook(other)": "L['block']._forward_hooks",
    "block.weight = torch.nn.Parameter(torch.ones(1), requires_grad=False)": "weight",
    "x = x.double()": "L['x']",
    "x = x[:, :3]": "L['x']",
    "x = x.t().contiguous().t()": "L['x']",
    "x = x[:1]": "2 <=",
    "torch.set_grad_enabled(True)": "torch's state",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the code that is compiled, and with what a first process kept of it."""
    folder = tmp_path_factory.mktemp("compile")
    (folder / "blocks.py").write_text(BLOCKS)
    (folder / "helpers.py").write_text(HELPERS)
    assert run(folder, CODE)[0] == [True, 2, 0]
    return folder


def run(folder: Path, code: str, *arguments: str, **more: str) -> list:
    """What a process printed, one value a line, and what it said."""
    paths = os.pathsep.join((str(PACK_PARENT), str(folder)))
    env = {**os.environ, "PYTHONPATH": paths, "TORCHINDUCTOR_CACHE_DIR": str(folder / "torch"), **more}  # fmt: skip
    command = [sys.executable, "-c", code, str(folder / "cache"), *arguments]
    ran = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return [*map(json.loads, ran.stdout.splitlines()), ran.stderr]


def test_the_next_process_traces_nothing_and_writes_nothing(folder):
    files = sorted((folder / "cache").iterdir())
    assert {file.suffix for file in files} == {".trace", ".bin"}
    assert run(folder, CODE)[0] == [True, 0, 2]
    assert sorted((folder / "cache").iterdir()) == files


def test_a_server_that_idles_has_read_it_before_anybody_asks(folder, tmp_path):
    shutil.copytree(folder / "cache", tmp_path / "compiled" / "one")
    shutil.copytree(folder / "cache", tmp_path / "compiled" / "other")
    for file in (tmp_path / "compiled" / "other").iterdir():
        os.utime(file, (1, 1))  # compiled long ago
    ahead = "import blocks\nfrom ark.toolkit import compile\ncompile.read_ahead()\nread = dict(compile._ahead)\n"
    code = ahead + CODE.replace("sys.argv[1]", repr(str(tmp_path / "compiled" / "one")))
    code += "print(json.dumps([[p.name, len(f.result().ready)] for p, f in read.items()] + [len(compile._ahead)]))"
    found, read, _ = run(folder, code, ARK_CACHE_DIR=str(tmp_path))
    assert read == [["one", 2], 0] and found == [True, 0, 2]


def test_what_changed_is_seen_and_said(folder):
    found, _ = run(folder, CHANGES, json.dumps(list(CHANGED)))
    assert found.pop("") == [""]
    for change, place in CHANGED.items():
        assert place in found[change][0], change


def test_changed_code_is_traced(folder):
    (folder / "helpers.py").write_text(HELPERS.replace("sin() + 1", "sin() + 4"))
    assert run(folder, CODE)[0] == [True, 1, 1]
    (folder / "helpers.py").write_text(HELPERS)


def test_a_damaged_trace_is_said_and_traced_anew(folder):
    for file in (folder / "cache").glob("*.trace"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    found, said = run(folder, CODE)
    assert found == [True, 2, 0] and said.count("is damaged and not used") == 3


@pytest.mark.parametrize(
    "expression",
    ["__import__('os')", "open('x')", "(lambda: 1)()", "[x for x in L]", "(x := 1)", "eval('1')"],
)
def test_guards_can_only_look(expression):
    with pytest.raises((Unkept, NameError)):
        function_of(expression, {"L": {}})({})


def test_guards_look_at_places_and_compare():
    class Thing:
        sizes = (3, 4)

    look = function_of("2 <= L['x'].sizes[1] and not hasattr(L['x'], 'y')", {})
    assert look({"x": Thing()}) is True
