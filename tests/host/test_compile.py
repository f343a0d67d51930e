"""Compiled blocks compute the same, are compiled once, and leave the model as it was."""

from __future__ import annotations

import json
import shutil

import pytest

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler here"),
]
LIMIT = 1e-5  # relative error of two steps in fp32


@pytest.fixture(scope="module")
def found(comfyui, run_in_host, tmp_path_factory) -> dict:
    """What one host saw, and under "second" what a second process with the same cache folder saw."""
    folder = tmp_path_factory.mktemp("compile")
    runs = []
    for name, *how in (("first",), ("second", "short")):
        out = folder / f"{name}.json"
        run_in_host(
            comfyui, "compile_run.py", out, *how,
            ARK_CACHE_DIR=str(folder / "cache"), TORCHINDUCTOR_CACHE_DIR=str(folder / name),
        )  # fmt: skip
        runs.append(json.loads(out.read_text()))
    return {**runs[0], "second": runs[1]}


def test_two_graphs_serve_every_block_and_compute_the_same(found):
    assert found["graphs"] == [2, 0, 2]
    assert found["error"] < LIMIT


@pytest.mark.parametrize(
    "change",
    ["another_seed", "size_5", "size_6", "size_8", "lora_1.0", "lora_0.5", "node_run_again", "patched_by_others"],
)  # fmt: skip
def test_nothing_is_compiled_anew(found, change):
    assert found[change] == {"error": pytest.approx(0, abs=LIMIT), "graphs": 0}


def test_a_second_process_traces_nothing(found):
    assert found["kept"] == found["second"]["kept"] == [1, 2]
    assert found["second"]["graphs"] == [0, 2, 0]
    assert found["second"]["error"] == found["error"] < LIMIT  # the same code


@pytest.mark.parametrize(
    "change", ["another_seed", "size_5", "size_6", "size_8", "lora_1.0", "lora_0.5"]
)
def test_nor_does_it_after_a_change(found, change):
    assert found["second"][change] == {"error": pytest.approx(0, abs=LIMIT), "graphs": 0}


def test_a_block_that_another_node_changed_is_traced(found):
    error, graphs = found["second"]["replaced"]
    assert error < LIMIT and graphs > 0


def test_off_is_the_image_without_and_the_model_is_as_it_was(found):
    assert found["off_identical"] and found["source_identical"] and found["tree_unchanged"]
    assert found["same_compiler"]


def test_modes_that_cannot_work_are_refused_with_the_reason(found):
    graphs, unknown = found["refused"]
    assert "CUDA graphs" in graphs and "Choose default" in graphs
    assert "fastest is not one of off, default" in unknown


def test_fp8_weights_compile_or_are_refused(found):
    assert found["fp8_matters"] > 0.01
    if "fp8" in found:
        first, reloaded, graphs = found["fp8"]
        assert first < LIMIT and reloaded < LIMIT and graphs == 2
        assert found["second"]["fp8"] == [pytest.approx(0, abs=LIMIT), 0, 2]
    else:
        assert "Update ComfyUI" in found["fp8_refused"]


def test_a_kernel_that_overflows_gives_the_hosts_image_and_is_not_used_again(found):
    assert found["guarded"] == [True, True] and found["guarded_compiled"]
    assert found["kernel_ran"] == found["none_cancels"] == 8  # four blocks, two steps, one run
    (message,) = found["told"]
    assert message.startswith("Ark: overflow gave numbers that are not finite")
