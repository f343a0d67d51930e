"""Faster imports change nothing that lasts."""

import contextlib
import gc
import importlib.metadata
import importlib.util
import subprocess
import sys

import pytest

from ark.toolkit.imports import OPTIONAL, building


def test_while_building_nothing_is_collected_and_packages_are_looked_up_once():
    own, interval = importlib.metadata.packages_distributions, sys.getswitchinterval()
    with pytest.raises(ZeroDivisionError), building:
        assert not gc.isenabled() and sys.getswitchinterval() < interval
        first, second = (importlib.metadata.packages_distributions() for _ in range(2))
        assert first is second and first == own()
        raise ZeroDivisionError
    assert gc.isenabled() and sys.getswitchinterval() == interval
    assert importlib.metadata.packages_distributions is own


def test_who_has_switched_the_collector_off_finds_it_off():
    gc.disable()
    try:
        with building:
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_two_at_once_leave_nothing_behind_in_either_order():
    own = importlib.metadata.packages_distributions
    for first in (0, 1):
        asked = [contextlib.ExitStack() for _ in range(2)]
        for stack in asked:
            stack.enter_context(building)
        asked[first].close()
        assert importlib.metadata.packages_distributions is not own and not gc.isenabled()
        asked[1 - first].close()
        assert importlib.metadata.packages_distributions is own and gc.isenabled()


def test_what_is_left_out_passes_for_not_installed_unless_it_was_imported():
    pytest.importorskip("diffusers", reason="lets diffusers look")
    code = """
import importlib.util, sys, json
from ark.toolkit.imports import OPTIONAL, left_out
with left_out("json", *OPTIONAL):
    assert importlib.util.find_spec("scipy") is None and sys.modules["json"] is json
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
    from transformers import Qwen3Model
    from diffusers.utils import is_scipy_available
    assert not is_scipy_available()
assert importlib.util.find_spec("scipy") is not None and sys.modules["json"] is json
import scipy.stats
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all("." not in name for name in OPTIONAL)


def alone(code):
    """Run code in a process that has imported nothing."""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_who_will_not_compile_does_without_the_compiler_and_may_compile_later():
    pytest.importorskip("diffusers", reason="imports diffusers")
    alone("""
import sys, torch
from ark.toolkit.imports import OPTIONAL, building, left_out
own = torch.distributed.is_available
with left_out(*OPTIONAL, compiler=True):
    with building:
        from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
        from transformers import Qwen3Model
    from diffusers.utils.torch_utils import is_compiled_module
    assert not is_compiled_module(torch.nn.Linear(1, 1))
    assert not {"torch._dynamo.eval_frame", "torch.fx.experimental.symbolic_shapes"} & sys.modules.keys()
assert torch.distributed.is_available is own and "torch._dynamo" not in sys.modules
assert not any("Finder" in str(finder) and "uncompiled" in str(finder) for finder in sys.meta_path)
from transformers import masking_utils
with masking_utils.TransformGetItemToIndex():
    assert torch.arange(3)[torch.tensor(1)] == 1
double = torch.compile(lambda x: 2 * x, backend="eager")
assert double(torch.ones(1)) == 2 and is_compiled_module(torch.compile(torch.nn.Linear(1, 1), backend="eager"))
""")


WANTS = [
    "torch._dynamo.reset()",
    "from torch._dynamo import config; assert config.cache_size_limit",
    "import torch._dynamo.utils; assert torch._dynamo.utils is sys.modules['torch._dynamo.utils']",
    "import torch._dynamo.testing; assert torch._dynamo.testing is sys.modules['torch._dynamo.testing']",
    "from torch._dynamo.eval_frame import OptimizedModule; import torch._dynamo as real; assert real.OptimizedModule is OptimizedModule",
    "assert torch._dynamo.eval_frame.innermost_fn(len) is len",
    "from torch._dynamo._trace_wrapped_higher_order_op import trace_wrapped; assert callable(trace_wrapped)",
    "from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex as Mode; Mode().__enter__().__exit__(None, None, None)",
]


@pytest.mark.parametrize("wants", WANTS)
def test_who_wants_more_of_the_compiler_gets_it(wants, tmp_path):
    log = tmp_path / "log"
    alone(f"""
import logging, sys, torch
log = {str(log)!r}
from ark.toolkit.imports import building, left_out
logging.basicConfig(level="INFO", filename=log)
own = torch.distributed.is_available
with left_out(compiler=True), building:
    import torch._dynamo
    from torch._dynamo import allow_in_graph
    assert allow_in_graph(len) is allow_in_graph(fn=len) is torch._dynamo.disable(reason="none")(len) is len
    assert "torch._dynamo.eval_frame" not in sys.modules
    {wants}
    assert "torch._dynamo.eval_frame" in sys.modules and torch.distributed.is_available is own
found = [module for name, module in sys.modules.items() if name.startswith("torch._dynamo")]
assert not {{"_Unimported", "_Finder"}} & {{type(thing).__name__ for module in found for thing in (module, module.__spec__.loader)}}
assert torch._dynamo is sys.modules["torch._dynamo"] and torch.compile(lambda x: 2 * x, backend="eager")(torch.ones(1)) == 2
""")
    assert log.read_text().count("torch.compile is imported after all, somebody wants torch._dynamo") == 1  # fmt: skip


def test_nobody_does_without_the_compiler_for_long_or_where_it_was_looked_for():
    alone("""
import sys, torch, types
from ark.toolkit.imports import building, left_out
own = torch.distributed.is_available
with left_out(compiler=True):
    pass
with left_out(), building:
    assert torch.distributed.is_available is own and "torch._dynamo" not in sys.modules
sys.modules["transformers"] = types.ModuleType("transformers")
with left_out(compiler=True), building:
    assert torch.distributed.is_available is own and "torch._dynamo" not in sys.modules
""")


@pytest.mark.parametrize(("engine", "without"), [("fused", True), ("plain", True), ("compile", False)])  # fmt: skip
def test_the_script_does_without_the_compiler_unless_it_compiles(engine, without):
    alone(f"""
import sys, torch
from ark.toolkit.command_line import run
from ark.toolkit.imports import building
def main(args, console):
    with building:
        assert ("torch._dynamo" in sys.modules) is {without}
    print("it ran")
sys.argv = ["ignite_ark_4b.py", "a red square", "--engine", "{engine}"]
assert run(main, 0.0) == 0 and "torch._dynamo" not in sys.modules
""")


def test_a_model_is_built_without_the_compiler_and_symbolic_shapes():
    pytest.importorskip("diffusers", reason="loads a pipeline")
    alone("""
import sys, torch
from ark.toolkit.imports import OPTIONAL, left_out
with left_out(*OPTIONAL, compiler=True):
    from ark.patches.pipeline import load_pipeline
    load_pipeline(device="cpu")
    assert "torch._dynamo.eval_frame" not in sys.modules
    newer = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)  # older ones import them by themselves
    assert not newer or "torch.fx.experimental.symbolic_shapes" not in sys.modules
""")


def test_a_compiler_that_is_there_stays():
    alone("""
import sys, torch, torch._dynamo
from ark.toolkit.imports import building, left_out
own = torch.distributed.is_available
with left_out(compiler=True), building:
    assert torch._dynamo.eval_frame.OptimizedModule and torch.distributed.is_available is own
""")
