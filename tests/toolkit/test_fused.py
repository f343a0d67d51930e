"""The fused operations: Triton against plain torch, interpreted on a CPU, compiled on a GPU."""

import importlib.util
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from ark.toolkit.fused.runner import Runner, Unknown

KERNELS = "fused_kernels.py", "pixel_kernels.py"


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
def test_kernels_compute_what_plain_torch_does(device, kernels):
    env = {**os.environ, "TRITON_INTERPRET": "1" if device == "cpu" else "0"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).with_name(kernels)),
    ]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-3000:]
    assert "skipped" not in run.stdout


def test_what_is_made_of_weights_stays_where_it_is_while_they_are_the_same():
    runner, like = Runner(torch.device("cpu"), "bf16"), torch.empty(0)
    data, scale = torch.ones(16, 16).to(torch.float8_e4m3fn), torch.tensor(0.5)
    made = runner.matrix_of_file(like, data, scale)
    assert runner.matrix_of_file(like, data, scale).scale is made.scale  # recordings read it
    assert torch.equal(made.scale, torch.full((1, 16), 0.5)) and made.weight is data
    half = torch.ones(4, 4, dtype=torch.float16)
    wide = runner.plain(half, like)
    assert wide.dtype == torch.float32 and runner.plain(half, like) is wide
    assert runner.matrix_of_file(like, data, torch.tensor(0.25)).scale[0, 0] == 0.25
    gone = weakref.ref(wide)
    del half, wide
    runner.matrix_of_file(like, data, torch.tensor(0.125))
    assert gone() is None
    with pytest.raises(Unknown, match="quantised as torch.int8"):
        runner.matrix_of_file(like, data.to(torch.int8), scale)
    with pytest.raises(Unknown, match="weights are on cpu"):
        runner.matrix_of_file(torch.empty(0, device="meta"), data, scale)
