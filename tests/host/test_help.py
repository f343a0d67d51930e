"""Schemas, help pages and locales say the same things about every node and every input, on each host."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ark.bootstrap import ROOT

pytestmark = pytest.mark.host

DOCS, LOCALES, SCRIPTS = ROOT / "web" / "docs", ROOT / "locales", ROOT / "web" / "js"
LANGUAGES = ["en", "ja", "zh"]
PICTURE = 60_000  # bytes at most
IN_THE_README = {"canvas.png"}


@pytest.fixture(scope="module")
def schemas(server) -> dict[str, dict]:
    """Each node of Ark as its translation has to be, in the words of its schema."""
    found = {}
    for name, info in server.client.object_info().items():
        if not info["python_module"].endswith(".ark"):
            continue
        inputs = info["input"].get("required", {}) | info["input"].get("optional", {})
        outputs = zip(info["output_name"], info["output_tooltips"], strict=True)
        found[name] = {
            "display_name": info["display_name"],
            "description": info["description"],
            "inputs": {key: {"name": key, "tooltip": spec[1].get("tooltip")} for key, spec in inputs.items()},
            "outputs": {str(slot): {"name": key, "tooltip": tip} for slot, (key, tip) in enumerate(outputs)},
        }  # fmt: skip
    return found


def read(language: str, file: str) -> dict:
    """A file of locales/."""
    return json.loads((LOCALES / language / file).read_text(encoding="utf-8"))


def leaves(tree: dict, path: str = "") -> dict[str, str]:
    """The texts of a tree by their path."""
    found = {}
    for key, value in tree.items():
        found |= leaves(value, f"{path}/{key}") if isinstance(value, dict) else {f"{path}/{key}": value}  # fmt: skip
    return found


def test_english_is_what_the_schemas_say(schemas):
    assert len(schemas) >= 8
    assert all(leaves(schemas).values()), "every input and output has a tooltip"
    assert read("en", "nodeDefs.json") == schemas


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_locale_has_every_text_and_no_other(schemas, language: str):
    texts = leaves(read(language, "nodeDefs.json"))
    assert texts.keys() == leaves(schemas).keys()
    # what these mean to the canvas, which reads the texts as templates
    assert [path for path, text in texts.items() if not text or set(text) & set("{}|@")] == []
    if language != "en":
        same = [path for path, text in texts.items() if text == leaves(schemas)[path]]
        assert [path for path in same if not path.endswith("/name")] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_canvas_has_every_word_and_no_other(language: str):
    words, english = read(language, "main.json")["ark"], read("en", "main.json")["ark"]
    assert words.keys() == english.keys()
    for key, text in words.items():
        assert text and sorted(re.findall(r"{\w+}", text)) == sorted(re.findall(r"{\w+}", english[key])), key  # fmt: skip
    scripts = "".join(path.read_text(encoding="utf-8") for path in SCRIPTS.glob("*.js"))
    used = set(re.findall(r'"(\w+)"', scripts))
    used |= set(re.findall(r'"(\w+)": ', (ROOT / "nodes" / "load.py").read_text(encoding="utf-8")))
    assert sorted(words.keys() - used) == []
    assert sorted(set(re.findall(r'say\("(\w+)"', scripts)) - words.keys()) == []


def test_languages_and_pages_are_complete(schemas):
    assert sorted(path.name for path in LOCALES.iterdir()) == LANGUAGES
    assert sorted(path.stem for path in DOCS.glob("*.md")) == sorted(schemas)


def test_a_page_explains_each_input_with_a_picture(schemas):
    pictures = set(IN_THE_README)
    for node, schema in schemas.items():
        page = (DOCS / f"{node}.md").read_text(encoding="utf-8")
        table = re.search(r"^\| input \|.*?(?=\n\n)", page, re.M | re.S)[0]
        assert sorted(re.findall(r"^\| `(\w+)`", table, re.M)) == sorted(schema["inputs"]), node
        assert "**Lossy?**" in page and "**What falls back to what.**" in page, node
        (picture,) = re.findall(r"!\[[^\]]+\]\(([^)/]+)\)", page)
        assert Path(picture).stem == node and 0 < (DOCS / picture).stat().st_size < PICTURE
        pictures.add(picture)
    assert {path.name for path in DOCS.iterdir() if path.suffix != ".md"} <= pictures


def test_the_search_knows_other_names_where_the_host_does(server, schemas):
    info = server.client.object_info()
    aliases = [info[node].get("search_aliases") for node in schemas]
    if "search_aliases" in info["VAEDecode"]:
        assert all(aliases)
    else:
        assert not any(aliases)


def test_pages_and_scripts_are_served(server, schemas):
    folder = "/extensions/ark"
    for node in schemas:
        assert server.client.get(f"{folder}/docs/{node}.md", raw=True).startswith(b"# ")
    offered = server.client.get("/extensions")
    assert {f"{folder}/js/{path.name}" for path in SCRIPTS.glob("*.js")} <= set(offered)
    translated = server.client.get("/i18n")
    assert [translated[name]["nodeDefs"].keys() == schemas.keys() for name in LANGUAGES] == [True] * 3  # fmt: skip
