"""The fused engine computes what the host does, follows its weights, hands on what it does not know, and leaves nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ark.bootstrap import NodeError

pytestmark = pytest.mark.host
LIMIT = 1e-5  # relative error of two steps in fp32


@pytest.fixture(scope="module")
def found(comfyui, run_in_host, tmp_path_factory) -> dict:
    """What one host saw."""
    out = tmp_path_factory.mktemp("fused") / "found.json"
    run_in_host(comfyui, "fused_run.py", out)
    return json.loads(out.read_text())


def test_it_computes_what_the_host_does(found):
    assert found["reasons"] == []  # nothing went to the host's own forward
    assert len(found["errors"]) == 12 and max(found["errors"].values()) < LIMIT
    assert found["lora_matters"] > 100 * LIMIT


def test_attention_runs_on_the_chosen_kernel(found):
    assert found["kernel_calls"] == 8  # 4 blocks, 2 steps


def test_what_it_does_not_know_runs_on_the_host_and_is_said_once(found):
    assert found["patched_by_others"] and found["attention_by_others"]
    assert len(found["told"]) == 1 and "patches of other nodes: dit" in found["told"][0]


def test_a_run_that_is_not_finite_is_repeated_on_the_host(found):
    assert found["guarded"] == [True, True]
    assert len(found["guard_told"]) == 1 and "overflow in the fused engine" in found["guard_told"][0]  # fmt: skip


def test_loras_in_the_hooks_of_a_conditioning_are_followed(found):
    assert len(found["hooks"]) == 12 and max(found["hooks"].values()) < LIMIT


def test_fp8_is_made_once_and_follows_the_weights(found):
    assert 0 < found["fp8_error"] < 0.3
    assert found["fp8_matrices"] == 20  # 4 a stream, 2 a single block
    assert found["fp8_repeats"] and found["fp8_again"] and found["fp8_reloaded"]
    to_itself, to_the_host = found["fp8_lora"]
    assert to_itself > 0.01 and to_the_host < 0.3
    assert found["fp8_after_unload"] == 0


def test_an_fp8_file_runs_in_fp8(found):
    assert found["fp8_file_reasons"] == []
    here, to_bf16 = found["fp8_file"]
    assert 0 < here < to_bf16  # the activations are rounded, too


def test_two_settings_in_turns_and_nothing_stays(found):
    assert found["turns"] == [True, True, True]
    assert found["removed_identical"] and found["source_identical"] and found["attributes_unchanged"]  # fmt: skip


def test_what_is_there_is_not_loaded_again(found):
    assert max(error for error, _ in found["stayed"]) < LIMIT
    loads = [count for _, count in found["stayed"]]
    before_recording, sizes_and_references, cfg = [1, 1], [0, 1, 0, 1, 0, 1, 0], [1, 0, 1, 0]
    with_a_lora, without_again, unloaded = [1, 1, 0], [1, 0], [1]
    assert loads == [*before_recording, *sizes_and_references, *cfg, *with_a_lora, *without_again, *unloaded]  # fmt: skip
    assert found["record_kept"] and found["stayed_lora_matters"] > 100 * LIMIT


SMALL = {"EmptyFlux2LatentImage": {"width": 128, "height": 128}}


def test_the_node_renders_with_it(server, fresh_seed: int):
    def render(engine: str):
        sampler = {"seed": fresh_seed}
        return server.render(server.graph(ArkSageCombustion={"engine": engine}, ArkSampler4Step=sampler, **SMALL))  # fmt: skip

    fused, host = render("fused").astype(int), render("host").astype(int)
    np.testing.assert_allclose(fused, host, atol=1)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"engine": "fused", "compile": "default"}, "nothing to compile"),
        ({"engine": "host", "precision": "fp8"}, "precision of the fused engine"),
        ({"engine": "warp"}, "engine: warp is not one of auto, host, fused|not in list"),
    ],
)
def test_what_does_not_go_together_is_refused(server, inputs, message):
    with pytest.raises(NodeError, match=message):
        server.client.run(server.graph(ArkSageCombustion=inputs, **SMALL), timeout=60)


def test_memory_that_runs_out_once_costs_a_step_and_twice_the_prompt(found):
    assert len(found["memory_told"]) == 1 and "run again" in found["memory_told"][0]
    assert found["out_of_memory_twice"] == "told to the host"


def test_fp8_copies_take_the_place_of_the_weights_until_the_host_needs_them(found):
    states = found["released"]
    assert all(same for same, *_ in states.values())
    with_fp8 = {name: rest for name, (_, *rest) in states.items() if rest[0]}
    assert with_fp8.keys() == {
        "fp8", "fp8_again", "fp8_after_host", "lora", "lora_removed", "hook", "hook_removed", "hook_and_host", "after_that", "reloaded"
    }  # fmt: skip
    for name, (released, on_device, in_flat_buffer) in with_fp8.items():
        assert released == 20 - (name in ("lora", "hook"))  # what a LoRA has changed stays
        assert released + on_device == 41 and in_flat_buffer == 0
    assert found["made_once"] and found["no_forward_left"]
    with_a_hook, with_the_host = found["half"]
    assert with_a_hook < LIMIT < 0.001 < with_the_host


def test_the_engine_is_warmed_up_once(found):
    assert found["warmed"] == ["fused engine"] and found["warm_up_warnings"] == []
