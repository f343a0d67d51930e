"""What Ark adds to the canvas, in a real browser: search, live state, panel, keyboard, themes, help pages, languages."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ark.bootstrap import ROOT, WORKFLOW, Client, Host

pytestmark = [pytest.mark.host, pytest.mark.browser]

LANGUAGES = ["zh", "ja", "en"]  # and back
SILENT = {"ArkReferenceImages", "ArkScheduler"}  # nodes with nothing to tell
WORDS = {
    name: json.loads((ROOT / "locales" / name / "nodeDefs.json").read_text(encoding="utf-8"))
    for name in LANGUAGES
}


@pytest.fixture(scope="module")
def tour(furnished: Host, chromium: str, screenshots: Path, tmp_path_factory, walk) -> dict:
    """What the browser saw of this host."""
    info = Client(furnished.url).object_info()
    add = {}
    for node, words in WORDS["en"].items():
        title = words["display_name"]
        # an alias has more to say than the name where the host knows of aliases
        add[node] = ((info[node].get("search_aliases") or [title])[0], title)
    plan = {"url": furnished.url, "chromium": chromium, "folder": str(screenshots), "add": add,
            "languages": LANGUAGES, "workflow": str(WORKFLOW)}  # fmt: skip
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    file.write_text(json.dumps(plan), encoding="utf-8")
    seen = walk("tour.mjs", furnished, file)
    assert "failure" not in seen, seen["failure"]
    return {**seen, "add": add}


def test_each_node_is_found_by_another_name(tour: dict):
    for node, (query, title) in tour["add"].items():
        assert any(title in entry for entry in tour["listed"][node]), (node, query)


def test_every_node_runs_and_shows_what_it_did(tour: dict):
    assert tour["run"]["kind"] == "execution_success", tour["run"]
    texts = {badge["label"].split(":")[0]: badge for badge in tour["badges"]}
    telling = {WORDS["en"][node]["display_name"] for node in WORDS["en"].keys() - SILENT}
    assert texts.keys() == telling
    assert {badge["known"] for badge in texts.values()} == {"yes"}
    assert re.search(r"[\d.]+ m?s a step, [\d.]+ [GT]FLOP/s", texts["Ark Sampler (4 Step)"]["text"])
    assert "Opened 39" in texts["Ark Fast Loader"]["text"]
    assert "transformer 13 MB" in texts["Ark Fast Loader"]["text"]
    assert "prompt" in texts["Ark Text Encode"]["text"]
    assert "engine: ComfyUI" in texts["Ark Sage Combustion"]["text"]


def test_nothing_shown_is_saved_and_a_new_page_shows_it_again(tour: dict):
    assert tour["saved"] is False
    assert {b["label"]: b["text"] for b in tour["reloaded"]} == {b["label"]: b["text"] for b in tour["badges"]}  # fmt: skip


def test_the_panel_has_a_chart_and_a_table(tour: dict):
    assert tour["panel"]["bars"] % 3 == 0 and tour["panel"]["bars"] > 0
    assert "128x128" in tour["panel"]["text"] and "Resident" in tour["panel"]["text"]
    assert "Bar chart" in tour["panel"]["label"]


def test_the_keyboard_reaches_all_of_it(tour: dict):
    for badge in tour["badges"]:
        assert any(badge["label"] in label for label in tour["keyboard"]), badge["label"]
    assert any("Last runs" in label for label in tour["keyboard"])
    assert tour["panelByKeys"] == [False, True]  # closed and opened again


@pytest.mark.parametrize("part", ["badge", "text", "panel"])
def test_colours_are_the_themes(tour: dict, part: str):
    assert tour["dark"][part] != tour["light"][part]


def test_each_help_page_opens_with_its_picture(tour: dict):
    for node, page in tour["help"].items():
        assert page["pictures"] and all(page["pictures"]), node
        assert all(name in page["text"] for name in WORDS["en"][node]["inputs"]), node
        assert "Lossy?" in page["text"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_canvas_speaks_another_language(tour: dict, language: str):
    seen, words = tour["languages"][language], WORDS[language]
    assert {node["type"] for node in seen["nodes"]} >= {"ArkFastLoader", "ArkSampler4Step"}
    for node in seen["nodes"]:
        expected = words[node["type"]]
        assert node["title"] == node["shown"] == expected["display_name"]
        assert node["inputs"] == {k: expected["inputs"][k]["name"] for k in node["inputs"]}
        assert node["tooltips"] == [slot["tooltip"] for slot in expected["outputs"].values()]
    main = json.loads((ROOT / "locales" / language / "main.json").read_text(encoding="utf-8"))
    assert main["ark"]["runs"] in seen["panel"]
    assert all(main["ark"]["stateOf"].split("}")[1] in badge["label"] for badge in seen["badges"])


def test_the_newer_node_design_shows_the_same(tour: dict):
    assert tour["vue"] and all(badge["text"] for badge in tour["vue"])
    assert max(badge["width"] for badge in tour["vue"]) < 500  # px: the node's, not the line's


def test_no_error_of_ark_in_the_console(tour: dict, errors_of_ark: Callable):
    assert errors_of_ark(tour) == []


def test_ark_asks_nobody_but_its_server(tour: dict):
    # the canvas's own registry look-ups apart, which a server without API nodes blocks
    assert [url for url in tour["outside"] if not url.startswith("https://api.comfy.org/")] == []
