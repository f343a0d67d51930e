"""The embedded model's edits: what is drawn, what is held out, and the judge of it."""

import random

import pytest

from ark.assets import scenes

EDITS = scenes.sample_edits(30, seed=3)


def test_what_is_judged_was_never_trained():
    for edits in scenes.sample_families(300, seed=4):
        for edit in (*edits, *(edit.back() for edit in edits)):
            assert not edit.held_out and not edit.source.held_out and not edit.result.held_out
            assert not edit.unseen
    assert {edit.kind for edit, _ in EDITS} == set(scenes.INSTRUCTIONS)


def test_only_what_is_moved_stands_elsewhere():
    for edit, _ in EDITS:
        for number, (before, after) in enumerate(zip(edit.source.things, edit.result.things)):  # noqa: B905
            moved = edit.kind == "move" and number == edit.which
            assert (before.center == after.center) != moved


def test_the_way_back_leads_back():
    for edits in scenes.sample_families(50, seed=5):
        for edit in edits:
            back = edit.back()
            assert back.back() == edit and back.instruction(random.Random(0))


def test_words_fit_one_thing_only():
    twins = scenes.Thing("small", "red", "star", (0.27, 0.5))
    other = scenes.Thing("large", "red", "star", (0.73, 0.5))
    scene = scenes.Scene("white", (twins, other), "to the left of")
    assert scene.names(0) == ["the small star", "the small red star"]
    assert scenes.Scene("white", (twins, twins), "above").names(0) == []


def test_the_judge_tells_done_from_not_done():
    pytest.importorskip("scipy", reason="the judge uses scipy")
    from ark.benchmarks.classifier import judge_edit
    from ark.benchmarks.tiny_quality import picture_of

    for edit, instruction in EDITS:
        reference, result = picture_of(edit.source), picture_of(edit.result)
        done = judge_edit(result, reference, edit)
        assert all(done.values()), (instruction, done)
        left = judge_edit(reference, reference, edit)
        assert not left["asked"], (instruction, left)
        other = judge_edit(picture_of(scenes.sample_scenes(1, 9, False)[0][0]), reference, edit)
        assert not all(right for name, right in other.items() if name != "asked"), instruction
