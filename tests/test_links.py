"""Every link and picture of the documentation leads somewhere."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import pytest

from ark.bootstrap import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "web").rglob("*.md")])
CODE = re.compile(r"^(```|~~~).*?^\1|(?<!`)(`+)(?!`).+?(?<!`)\2(?!`)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)|^\[[^\]]+\]:\s*(\S+)|(?:src|href)=[\"']([^\"']+)", re.MULTILINE)  # fmt: skip
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$|<a\s+(?:id|name)=[\"']([^\"']+)", re.MULTILINE)


def links(text: str) -> list[str]:
    """What a page links to; code is no link."""
    return ["".join(found) for found in LINK.findall(CODE.sub("", text))]


def anchors(text: str) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    found, seen = set(), Counter()
    for title, given in HEADING.findall(re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.M | re.S)):
        if given:
            found.add(given)
            continue
        plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def exists(path: Path) -> bool:
    """Whether there is such a file, in just this spelling, as on a machine that tells a from A."""
    if not path.exists():
        return False
    inside = path.relative_to(ROOT).parts
    return all(name in {entry.name for entry in ROOT.joinpath(*inside[:depth]).iterdir()} for depth, name in enumerate(inside))  # fmt: skip


def problem(page: Path, link: str) -> str | None:
    """Why a link leads nowhere; addresses of the web are not asked."""
    if re.match(r"[a-z][a-z+.-]*:", link):
        return None if re.fullmatch(r"(https://[\w.-]+(/\S*)?|mailto:\S+@\S+)", link) else "is no address"  # fmt: skip
    name, _, anchor = unquote(link).partition("#")
    target = (page.parent / name).resolve() if name else page
    if not target.is_relative_to(ROOT):
        return "leads out of the repository"
    if not exists(target):
        return "is not there"
    if anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
        return "has no such heading"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    found = links(page.read_text(encoding="utf-8"))
    wrong = {link: why for link in found if (why := problem(page, link))}
    assert wrong == {}


def test_pages_of_the_nodes_and_the_readme_are_among_them():
    names = {page.relative_to(ROOT).as_posix() for page in PAGES}
    assert {"README.md", "CHANGELOG.md", "web/docs/ArkFastLoader.md"} <= names
    assert len(links((ROOT / "README.md").read_text(encoding="utf-8"))) > 10


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[a](nowhere.md)", "is not there"),
        ("![a](web/docs/arkfastloader.md)", "is not there"),
        ("[a](../other/file.md)", "leads out of the repository"),
        ("[a](#nothing)", "has no such heading"),
        ("[a](CHANGELOG.md#nothing)", "has no such heading"),
        ("[a](http://plain.example)", "is no address"),
        ("<img src='nowhere.png'>", "is not there"),
        ("[a]: nowhere.md", "is not there"),
        ("[a](CHANGELOG.md#unreleased) [b](#nodes-and-options)", None),
        ("`[a](nowhere.md)`\n```\n[a](nowhere.md)\n```\n", None),
    ],
)
def test_the_check_sees_what_is_wrong(text, why):
    assert [problem(ROOT / "README.md", link) for link in links(text)] == (
        [why] if why else [None] * len(links(text))
    )


def test_headings_are_named_as_on_github():
    text = "# The `embedded` model!\n## Try it\n## Try it\n```\n# no heading\n```\n# [Ark](x.md), part_2\n"
    assert anchors(text) == {"the-embedded-model", "try-it", "try-it-1", "ark-part_2"}
