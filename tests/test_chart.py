"""The README's chart shows what the committed records say."""

from __future__ import annotations

import json
import shutil

import pytest

from ark.benchmarks import chart

RECORDS = sorted({group.record for group in chart.GROUPS})


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A copy of the records, which the chart is drawn from."""
    for name in RECORDS:
        shutil.copy(chart.RESULTS / f"{name}.json", tmp_path)
    monkeypatch.setattr(chart, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.parametrize("group", chart.GROUPS, ids=lambda group: f"{group.record} {group.case}")
def test_every_bar_is_in_its_record(group):
    record = json.loads((chart.RESULTS / f"{group.record}.json").read_text(encoding="utf-8"))
    values = {row["ark"] for row in record["rows"]} | {value for row in record["rows"] for value in row["peers"].values()}  # fmt: skip
    bars, _ = chart.bars_of(group)
    assert len(bars) >= 2 and {bar.value for bar in bars} <= values


def test_another_record_gives_another_chart(results):
    before = chart.draw({"card"})
    path = results / "load.json"
    record = json.loads(path.read_text())
    for row in record["rows"]:
        row["ark"] *= 3
    path.write_text(json.dumps(record))
    assert chart.draw({"card"}).tobytes() != before.tobytes()


def test_a_case_that_is_gone_is_an_error(results):
    path = results / "load.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "rows": []}))
    with pytest.raises(KeyError, match=r"load.json has no case"):
        chart.draw({"card"})
