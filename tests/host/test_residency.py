"""ResidentPatcher is a good citizen: what it loads, patches and unloads equals what the host does by itself."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def found(comfyui, run_in_host, tmp_path_factory) -> dict:
    """What one host saw."""
    out = tmp_path_factory.mktemp("out") / "found.json"
    run_in_host(comfyui, "residency_run.py", out)
    return json.loads(out.read_text())


def test_loading_sends_every_weight_and_changes_no_result(found):
    assert found["home_at_first"][0] == found["home_at_first"][1] > 30
    assert found["home_when_loaded"][0] == 0
    assert found["same"]
    assert found["outside_inference_mode"][0] == 0


def test_weights_leave_before_they_are_asked_for(found):
    assert found["sent_ahead"] == 1 and found["left_ahead"] == 0


def test_the_transformer_follows_the_text_encoder(found):
    assert found["led"] == [1, 0, 1, 0]  # sent while at home only
    assert found["led_same"]


def test_lora_equals_the_hosts_and_leaves_nothing(found):
    assert found["lora_matters"]
    assert found["lora_same"] and found["lora_strength_same"] and found["lora_gone"]
    assert found["backup_is_home"]


def test_a_patcher_knows_whether_the_host_would_find_nothing_to_do(found):
    at_first, with_its_lora, without_again = [True, False, False], [True, False], [False, True]
    assert found["loaded"] == [*at_first, *with_its_lora, *without_again, False]


def test_unloading_returns_to_the_file_and_reloading_is_exact(found):
    assert found["home_when_unloaded"][0] == found["home_when_unloaded"][1]
    assert found["after_reload"]
    assert found["home_at_last"][0] == found["home_at_last"][1]
    assert found["file_unchanged"]


def test_a_small_file_is_needed_only_once(found):
    assert found["small_same"] and found["small_same_without_file"]


def test_partial_unload_frees_what_it_says(found):
    freed, size = found["freed"]
    assert size // 3 <= freed < size
    assert found["after_partial_unload"]


def test_the_host_can_build_each_part_anew(found):
    assert found["anew"] == [True, True]
    assert found["clip_anew"] == found["vae_anew"] == "ResidentPatcher"


def test_merging_a_model_with_itself_changes_nothing(found):
    assert found["merged_with_itself"] < 2e-2  # bf16 weights, rounded once more


@pytest.mark.parametrize("part", ["clip", "vae"])
def test_other_parts_are_resident_too(found, part):
    assert found[part][0] == "ResidentPatcher"


def test_what_stays_off_the_device_is_pinned_in_its_file(found):
    inside, weights, by_the_host = found["offloaded_pinned"]
    assert inside > 0.5 * weights  # norms and the like stay whole; none was copied for pinning
    assert by_the_host == 0
    assert found["offloaded_same"] and found["writable_again"]
    assert found["home_after_offloading"][0] == found["home_after_offloading"][1]


def test_what_leaves_in_part_is_dropped(found):
    loaded, gone, left = found["dropped"]
    freed, asked = found["dropped_bytes"]
    assert 0 < gone < loaded and left == loaded - gone
    assert freed >= asked and found["dropped_same"] and found["moves_are_the_modules_own"]


def test_a_vae_is_cast_where_it_is_used(found):
    assert found["vae_used_as"] == [["torch.bfloat16"]] * 2
    assert found["vae_same"]
    assert all(at_home == weights for at_home, weights in found["vae_home"])


def test_each_part_is_warmed_up_once(found):
    assert found["warmed"] == [["VAE", "text encoder", "transformer"]] * 2
    assert found["warm_up_warnings"] == []


def test_the_node_reports_transfers_that_end_after_it(found):
    transfer, pinned = found["report"]
    assert found["heard"] == 1
    assert transfer.startswith("ark_tiny_klein.safetensors: 0.01 GB in ") and "GB/s" in transfer
    assert pinned.startswith("Pinned 0.0 of at most")


def test_the_node_knows_what_is_resident(found):
    there, gone = found["resident"]
    assert there > 1e6 and gone == 0


def test_the_tokenizer_is_built_before_it_is_needed_and_only_once(found):
    assert found["tokenizers_prepared"] == found["tokenizers_built"] == 1


@pytest.mark.parametrize("form", ["by_metadata", "scaled"])
def test_quantised_weights_come_from_their_file_and_return_to_it(found, form):
    quantised = found["quantised"][form]
    assert all(quantised["same"]), quantised  # plain, reloaded, with LoRA, without it again
    assert quantised["sizes"][0] == quantised["sizes"][1]  # what the host plans with
    assert quantised["stays"] and quantised["differs"]
    loaded, unloaded, after_lora = quantised["homes"]
    assert loaded[0] == 0 and loaded[1] > 30
    assert unloaded[0] == after_lora[0] == unloaded[1]


def test_stopping_while_weights_travel_loses_nothing(found):
    assert found["interrupted"] == 1  # still on their way
    assert found["after_interrupt"]
