"""A repeated prompt gives the same conditioning without the text encoder; whatever changes it, is noticed."""

from __future__ import annotations

import json
import shutil

import pytest

from ark.toolkit.embedded import embedded_text_encoder

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def runs(comfyui, run_in_host, tmp_path_factory) -> tuple[dict, dict]:
    """What one host saw at first, and after a restart."""
    folder = tmp_path_factory.mktemp("embeddings")
    encoder = folder / "encoder.safetensors"
    shutil.copyfile(embedded_text_encoder(), encoder)
    found = []
    for phase in ("first", "again"):
        out = folder / f"{phase}.json"
        environ = {"ARK_CACHE_DIR": str(folder), "ARK_EMBEDDINGS_GB": "0.1"}
        run_in_host(comfyui, "cache_run.py", encoder, out, phase, **environ)
        found.append(json.loads(out.read_text()))
    return tuple(found)


def test_every_result_is_the_hosts_bit_for_bit(runs):
    for found in runs:
        assert found["off"] and all(off < 1e-5 for off in found["off"].values()), found["off"]
        assert found["same"] and all(found["same"].values()), found["same"]
        assert found["keys"] == [["attention_mask", "pooled_output"]] * 2
    assert runs[0]["forms"] and runs[0]["own_dict"]


def test_a_known_prompt_runs_nothing(runs):
    sources = runs[0]["sources"]
    assert sources["new"] == ["encoder", 1, 1]
    for name in ("again", "own dict", "weights again", "lora again", "without lora", "hooks gone"):
        assert sources[name] == ["memory", 0, 0], name
    for name in ("word", "weights", "embedding 0", "embedding 1", "lora", "lora strength"):
        assert sources[name][0] == "encoder" and sources[name][2] == 1, name


def test_after_a_restart_it_does_not_load_the_encoder(runs):
    first, again = runs
    assert first["ahead"] == 1  # nothing was known
    assert again["ahead"] == again["reports"] == 0 and not again["loaded"]
    assert again["sources"]["restart"] == ["disk", 0, 0]
    assert again["sources"]["in memory"] == ["memory", 0, 0]
    assert again["transformer_ahead"] == 1  # does not wait for an encoder that is not loaded
    assert again["sources"]["fresh"] == ["encoder", 1, 1]


def test_remembered_tokens_are_the_hosts(runs):
    assert runs[0]["tokens"] == [True, True, True]


def test_what_changes_the_result_is_noticed(runs):
    names = {"word", "lora", "lora strength", "forward hook"}
    assert runs[0]["differs"].keys() - {"weights"} == names
    assert min(runs[0]["differs"].values()) > 1e-3
    assert runs[1]["sources"]["changed file"][0] == "encoder" and runs[1]["ahead_of_changed"] == 1


def test_hooks_and_patches_of_other_nodes_are_not_kept(runs):
    for name in ("hooks", "forward hook", "object patch"):
        assert runs[0]["sources"][name][0] == "encoder" and runs[0]["sources"][name][2] == 1, name
    assert runs[0]["hooks_arrive"] and runs[0]["bypassed"] == 3
    # the plain prompt, the word, two embeddings, and the weights if finite; no LoRA, whose name never comes again
    assert runs[0]["saved"] == runs[0]["saved_at_last"] == 4 + runs[0]["weights_finite"]


def test_damaged_files_are_written_anew(runs):
    assert runs[1]["sources"]["damaged"] == ["encoder", 1, 1]
    assert runs[1]["sources"]["mended"] == ["disk", 0, 0]


def test_the_node_says_where_it_came_from(runs):
    assert runs[0]["node_says"][0].startswith("Known, from memory (")
    assert "Connect the CLIP" in runs[0]["no_clip"]


def test_the_node_gives_what_clip_text_encode_gives(server, fresh_seed):
    plain = server.graph(ArkSampler4Step={"seed": fresh_seed, "steps": 1}, EmptyFlux2LatentImage={"width": 64, "height": 64})  # fmt: skip
    expected = server.render(plain)
    node = plain[server.node_of(plain, "CLIPTextEncode")]
    node["class_type"] = "ArkTextEncode"
    assert (server.render(plain) == expected).all()
    described = server.client.object_info()["ArkTextEncode"]
    assert described["output"] == ["CONDITIONING"]
    assert described["input"]["required"]["text"][1]["multiline"]
