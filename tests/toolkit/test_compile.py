"""What was compiled is found by the next process, whatever was compiled after it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACK_PARENT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler here")  # fmt: skip
CODE = """
import json, sys, torch
from pathlib import Path
from torch._dynamo.utils import counters
from ark.toolkit.compile import Compiler, any_length

def first(x):
    return x.sin() + 1

def second(x):
    return x.cos() * 2

compiler, results = Compiler("default", Path(sys.argv[1])), []
for function in (first, second):
    for length in (5, 7, 4):
        x = torch.arange(4.0 * length).reshape(length, 4)
        any_length(x, 0)
        results.append(torch.allclose(compiler(function)(x), function(x)))
    compiler.keep()
found = counters["inductor"]
print(json.dumps([all(results), compiler.graphs, found["fxgraph_cache_hit"], found["fxgraph_cache_miss"]]))
"""


def run(folder: Path, number: int) -> list:
    """One process; what torch keeps by itself is not kept between them."""
    env = {**os.environ, "PYTHONPATH": str(PACK_PARENT), "TORCHINDUCTOR_CACHE_DIR": str(folder / f"own{number}")}  # fmt: skip
    code = [sys.executable, "-c", CODE, str(folder / "cache")]
    return json.loads(subprocess.run(code, env=env, check=True, capture_output=True, text=True).stdout)  # fmt: skip


def test_one_graph_serves_every_length_and_the_next_process_finds_it(tmp_path):
    assert run(tmp_path, 1) == [True, 2, 0, 2]
    files = sorted((tmp_path / "cache").iterdir())
    assert run(tmp_path, 2) == [True, 2, 2, 0]
    assert sorted((tmp_path / "cache").iterdir()) == files  # nothing new, nothing written
