"""The first step of a run, begun before ComfyUI asks for it, is its result only if it is what that asks for."""

import json

import pytest

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def found(comfyui, run_in_host, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("first")
    run_in_host(comfyui, "first_run.py", folder / "found.json", ARK_CACHE_DIR=str(folder))
    return json.loads((folder / "found.json").read_text())


# steps before the host was asked, steps in all, whether the latents are right
NOT, BEGUN = [0, 4, True], [1, 4, True]


def test_a_run_like_the_last_one_is_begun(found):
    # the second is the first that the model lies ready for
    assert found["runs"] == [NOT, NOT, BEGUN, BEGUN], found["off"]
    assert found["other size"] == [NOT, NOT, BEGUN]
    assert found["batch"] == [NOT, NOT, BEGUN]
    assert found["LoRA"][-1] == BEGUN


def test_a_level_that_is_rounded_is_begun_with(found):
    assert 0.9999 < found["level"] < 1
    assert found["level runs"][-1] == BEGUN and found["image at that level"] == [NOT]


def test_what_is_not_of_pure_noise_is_not(found):
    assert found["image"] == found["mask"] == [NOT] * 3


def test_of_a_model_in_which_others_have_a_hand_nothing_is_begun(found):
    assert found["other model"] == found["calls others"] == [NOT] * 3


def test_what_turns_out_wrong_is_repeated_and_not_begun_again(found):
    assert found["changed"] == [[1, 8, True], NOT, NOT]


@pytest.mark.parametrize("other", ["reference", "cfg", "two texts"])
def test_of_what_is_given_something_else_nothing_is_begun(found, other):
    assert {(before, right) for before, _, right in found[other]} == {(0, True)}
    assert found[f"{other}, then"][-1] == BEGUN


def test_another_level_is_begun_with_from_its_second_run_on(found):
    assert found["part"] == [NOT, BEGUN, BEGUN] and found["part, then"][-1] == BEGUN


def test_texts_of_a_batch_and_noise_of_others_go_the_hosts_way(found):
    assert found["texts of a batch"] == found["noise of others"] == [NOT] * 3


def test_weights_that_lie_where_others_were_are_not_taken_for_them(found):
    assert found["other record"] == [[1, 5], False, True]


def test_weights_that_left_or_changed(found):
    assert found["unloaded"] == found["after a LoRA"] == [NOT]


def test_a_failure_leaves_nothing(found):
    assert found["failed"] == [1, True] and found["after a failure"] == [BEGUN]


def test_a_result_that_is_not_finite_is_seen_in_the_end(found):
    (counts, right, finite), again = found["not finite"][:3], found["not finite"][3]
    assert counts == [1, 4] and right and finite
    assert again == [[0, 0], True]


def test_an_engine_goes_with_its_model(found):
    assert found["alive"] == [False, False]


def test_noise_is_drawn_before_its_prompt_runs(found):
    assert found["arrives"] == [7]
    assert found["taken"] == [7] and found["drawn before"][0][2]
    assert found["drawn among bf16"][0][2]
    assert found["many"] == [[50, 51, 52, 53], [54, 55]]
    assert found["queued"] == [11] and found["busy"] == []
    assert found["no graph"] == [[]] * 3
    assert found["large"][-1] == 5 and found["too large"] == found["too large ahead"] == []


def test_of_a_prompt_that_differs_in_its_seed_it_is_begun_on_arrival(found):
    at_node, on_arrival = [0, 1, 4, True], [1, 1, 4, True]
    once, then, after, other_text, text_again, *later = found["arrivals"]
    assert once == other_text == at_node  # the prompt before was another one
    assert then == after == text_again == on_arrival
    assert found["the same"] == found["other seed type"] == found["another node"] == 0
    # begun for nothing once, and not for a while
    assert found["vain"] == 1 and later == [at_node] * 8 + [on_arrival]
    assert found["while recording"] == found["nothing there"] == 0


def test_one_that_was_begun_with_another_text_is_not_taken(found):
    assert found["other text in the end"] == [1, [1, 4], True]


@pytest.mark.parametrize(
    "other",
    [
        "its seed is a bool",
        "a seed that is too large",
        "another's seed",
        "another class",
        "no such sampler",
        "two samplers",
        "calls others meanwhile",
        "after an edit",
        "while another runs",
        "twice",
    ],
)
def test_of_other_prompts_it_is_not_begun_on_arrival(found, other):
    assert found["like it"] == 1 and found[other] == 0


def test_noise_is_drawn_where_no_step_can_be_begun(found):
    assert found["cannot be begun"] == [0, [55]]


def test_each_that_is_begun_in_vain_is_one_too_many(found):
    assert found["replaced"] == [1, 0, 0]


def test_what_it_was_begun_with_is_nobodys_to_write_to(found):
    steps, right = found["written to"]
    assert steps > 4 and right


def test_who_calls_it_comes_to_no_harm(found):
    calls, said = found["handlers"]
    assert calls == 3
    assert said == ["Ark: a first step could not be begun ahead (a host with another list of prompts)."]  # fmt: skip


def test_weights_go_with_what_was_begun_of_them(found):
    assert found["unloaded before its run"] == 1 and not found["kept of what was unloaded"]


def test_nobody_waits_for_noise_that_may_wait_itself(found):
    assert found["on its way"] == 1 and found["on its way, then"] == [3, True]
    assert found["kept noise"] == 4


@pytest.mark.parametrize(
    ("there", "draws", "steps"),
    [("same", 1, [1, 1, 4]), ("other", 0, [1, 1, 4]), ("broken", 0, [1, 1, 4]), ("later broken", 0, [1, 1, 4])],
)  # fmt: skip
def test_its_noise_is_drawn_by_the_device_if_that_draws_the_same(found, there, draws, steps):
    assert found[f"there, {there}"] == [draws, steps, True, True]
    why = {"other": "is another", "broken": "no memory", "later broken": "no memory"}
    said = found[f"said, {there}"]
    assert len(said) == (there in why) and all(why[there] in line for line in said)


def test_a_seed_that_is_refused_changes_nothing(found):
    assert found["refused"] == 1


def test_with_noise_that_is_not_the_processors_the_run_is_repeated(found):
    draws, steps, right, same_after = found["there, later other"]
    assert (draws, right, same_after) == (1, True, True) and sum(steps[1:]) > 4
