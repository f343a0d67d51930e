"""The text of the next prompt is encoded while the picture before it is saved, and only where that gives the same."""

import json

import pytest

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def found(comfyui, run_in_host, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("next")
    run_in_host(comfyui, "next_run.py", folder / "found.json", ARK_CACHE_DIR=str(folder))
    return json.loads((folder / "found.json").read_text())


def test_it_is_known_when_its_turn_comes(found):
    assert found["ahead"] == found["known"] == [True]
    assert found["then"][:2] == ["memory", True]
    assert found["waited"] == ["memory", True]


def test_a_prompt_that_arrives_while_nothing_runs_is_begun(found):
    assert found["handlers"] == 1 and found["handed_on"]
    assert found["busy"] == "encoder" and found["arrived"] == ["memory", True]
    assert found["strange_requests"] == [True] * 6 and found["turns"]


def test_nothing_is_loaded_for_it(found):
    assert found["empty"] == []
    assert found["not_loaded"] == found["unloaded"] == [False]
    assert found["first"] == ["encoder", True]


def test_what_depends_on_other_nodes_waits(found):
    assert found["left"] == [[]] * 5 and found["strange"] == []


def test_weights_of_another_branch_are_not_taken(found):
    assert found["lora"] == [False]
    assert found["after_lora"] == ["encoder", True, True]


def test_what_is_still_to_be_recorded_is_left_to_the_prompts(found):
    assert found["unsettled"] == [False, "encoder"]


def test_where_it_is_only_replayed_it_is_asked_for_before_the_host_goes_on(found):
    assert found["at once, a red line"] == ["memory", True, True]
    assert found["at once, a blue line"] == ["memory", True, False]
