"""ArkSampler4Step, ArkScheduler and ArkReferenceImages against the stock nodes of the same host, in fp32 on CPU."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.host

# case: how many pictures each call of the model has
SAME_AS_STOCK = {
    "text, 1 steps": [1],
    "text, 4 steps": [1] * 4,
    "text, 50 steps": [1] * 50,
    "another size": [1] * 4,
    # the prompt and the negative in one call
    "cfg": [2] * 4,
    "cfg of 1": [1] * 4,
    "batch": [3] * 4,
    "one of a batch": [1] * 4,
    "sigmas given": [1] * 6,
    "LoRA": [1] * 4,
    "after the LoRA": [1] * 4,
    "image, denoise 0.5": [1] * 4,
    "image, denoise 0.8": [1] * 4,
    "noise mask": [1] * 4,
    "inpaint conditioning": [1] * 4,
    "encoded for inpainting": [1] * 4,
    "empty mask": [1] * 4,
    "five references by stock nodes": [1] * 4,
    "references and cfg": [2] * 4,
    "1 reference(s)": [1] * 4,
    "2 reference(s)": [1] * 4,
    "4 reference(s)": [1] * 4,
}
# case: reason, remedy
REFUSED = {
    "cfg alone": ("there is no negative", "set cfg to 1"),
    "negative of another encoder": ("has width 100", "the text encoder that belongs to the model"),
    "reference of another VAE": ("has 16 channels", "with the FLUX.2 VAE"),
    "mask without pixels": ("shape [1, 0, 4]", "Paint a mask"),
    "mask of colours": ("has 3 channels", "Image to Mask"),
    "mask of no dimension": ("shape [8]", "Paint a mask"),
    "mask of nan": ("not numbers", "Paint a mask"),
    "one sigma": ("hold no step", "ArkScheduler"),
    "sigmas of another model": ("from 14.6 to 0", "ArkScheduler"),
    "sigmas of nan": ("nan", "ArkScheduler"),
    "five references": ("6 reference images", "Connect fewer"),
    "tiny reference": ("9x300 px", "Use a larger or less narrow image"),
    "scheduler": ("has 4 channels", "Use EmptyFlux2LatentImage"),
}


@pytest.fixture(scope="module")
def found(comfyui, run_in_host, tmp_path_factory) -> dict:
    """What one host computed."""
    folder = tmp_path_factory.mktemp("small")
    return json.loads(run_in_host(comfyui, "sample_run.py", folder).splitlines()[-1])


@pytest.mark.parametrize("case", SAME_AS_STOCK)
def test_latents_equal_the_stock_graphs(found, case: str):
    assert found[case]["equal"]
    assert found[case]["std"] > 0.1
    assert found[case]["kept"], "the latent lost or gained an entry"


def test_who_looks_at_the_noise_sees_it(found):
    assert found["noise that another node sees"] == [True, True]


def test_the_generators_are_left_as_the_host_does(found):
    assert found["numbers drawn after it"]


def test_noise_is_the_same_however_latents_lie(found):
    assert found["latents that lie otherwise"] == [False, True]


def test_a_picture_is_begun_only_of_what_somebody_will_see(found):
    assert found["begun ahead"] == [["begin", "made"], []]


def test_another_packs_noise_is_taken(found):
    assert found["noise by another pack"] == [1, True]


def test_latents_equal_those_of_the_hosts_own_transformer(found):
    errors = {
        case: entry["error"]
        for case, entry in found.items()
        if case in SAME_AS_STOCK and "error" in entry
    }
    assert len(errors) == 6
    # not 0, as the order of a sum on the CPU depends on where in memory a weight begins
    assert max(errors.values()) < 1e-6


@pytest.mark.parametrize("case", SAME_AS_STOCK)
def test_the_model_runs_as_often_as_promised(found, case: str):
    assert found[case]["rows"] == SAME_AS_STOCK[case]


def test_a_picture_of_a_batch_can_be_made_alone(found):
    assert found["third of the batch alone"] < 1e-4


def test_a_lora_is_felt(found):
    assert found["what the LoRA does"] > 1e-3


def test_what_is_not_masked_stays(found):
    assert found["unmasked corner"] < 1e-5
    assert found["picture under an empty mask"] < 1e-5


def test_references_are_scaled_as_the_stock_nodes_do(found):
    # 1411 x 907 px to a megapixel: 1277 x 821, of which whole 16s are kept
    assert found["large reference"] == {"shape": [1, 128, 51, 79], "error": 0}
    assert found["size of the empty latent"] == [1, 128, 8, 8]


def test_references_of_any_kind(found):
    assert found["transparent reference"] == [1, 128, 8, 8]
    assert found["batch of references"] == [[1, 128, 8, 8], [1, 128, 8, 8], [1, 128, 5, 8]]


def test_scheduler_makes_the_tail_of_the_stock_schedule(found):
    assert found["scheduler"] == {"error": 0, "steps": 4}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_with_the_remedy(found, case: str):
    for part in REFUSED[case]:
        assert part in found["refused"][case]


def test_too_large_a_picture_says_what_to_do(found):
    assert "1 picture(s) of 4096x4096 with 5 reference image(s)" in found["out of memory"]
    assert "Make the picture or the references smaller" in found["out of memory"]
