"""What this machine has, what of it is broken, and what Ark would do here; importing this needs nothing but Python.

`python bootstrap.py doctor` runs it in ComfyUI's own interpreter, the node ArkDoctor in ComfyUI itself. Each check is a
line, also one that fails.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .checks import run_checks
from .finding import BAD, NOTE, OK, Finding, Subject

WIDTH = 118  # characters of a line
EMBEDDED = Path(__file__).resolve().parent.parent / "assets"  # has a small model


@dataclass(frozen=True)
class Report:
    """What the doctor found.

    Attributes:
        about: when, and of what.
        findings: in the order of the checks.
        plan: what Ark would do: `toolkit.plan.Choice`, or nothing where torch cannot be used.
    """

    about: dict[str, str]
    findings: tuple[Finding, ...]
    plan: tuple[Any, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing is BAD."""
        return all(finding.state != BAD for finding in self.findings)

    def json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "about": self.about,
            "healthy": self.healthy,
            "findings": [asdict(finding) for finding in self.findings],
            "plan": [asdict(choice) for choice in self.plan],
        }

    @property
    def lines(self) -> list[str]:
        """In short, for a small place: what does not work, what Ark would do, then the rest."""

        def said(state: str) -> list[str]:
            found = [finding for finding in self.findings if finding.state == state]
            return [f"{state.upper()} {f.name}: {f.text.splitlines()[0]}" for f in found]

        return said(BAD) + [f"{c.what}: {c.choice}" for c in self.plan] + said(NOTE) + said(OK)

    def __str__(self) -> str:
        lines = [
            "Ark doctor: " + ", ".join(f"{name} {value}" for name, value in self.about.items())
        ]
        for finding in self.findings:
            remedy = f"\nremedy: {finding.remedy}" if finding.remedy else ""
            lines += _table(finding.state.upper(), finding.name, finding.text + remedy)
        lines += ["", "What Ark would do here (set the last four in Ark Sage Combustion)"]
        for choice in self.plan:
            lines += _table(choice.what, choice.choice, choice.why)
        return "\n".join(lines if self.plan else [*lines, "nothing, as torch cannot be used"])


def _table(first: str, second: str, text: str) -> list[str]:
    """One row, its text wrapped."""
    start, wrapped = f"{first:<11}{second:<22}", []
    for line in text.splitlines():
        wrapped += textwrap.wrap(line, WIDTH - len(start)) or [""]
    return [f"{start if number == 0 else ' ' * len(start)}{line}" for number, line in enumerate(wrapped)]  # fmt: skip


def examine(subject: Subject) -> Report:
    """Look at the machine; takes some seconds, most of them torch's import in a process of its own.

    Returns:
        The report. A check that fails is a line with its reason.
    """
    about = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "ark": ark_version(),
        "python": sys.version.split()[0],
        "on": sys.platform,
    }
    findings, plan = run_checks(subject)
    return Report(about, tuple(findings), tuple(plan))


def ark_version() -> str:
    """Of this folder."""
    try:
        text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    found = re.search(r'^version = "(.+)"', text, re.MULTILINE)
    return found[1] if found else "unknown"


def host_version(comfyui: Path) -> str | None:
    """Of a ComfyUI folder, None if it does not say."""
    try:
        text = (comfyui / "comfyui_version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r'__version__ = "(.+)"', text)
    return found[1] if found else None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: prints the report; 1 if something does not work."""
    parser = argparse.ArgumentParser(prog="bootstrap.py doctor", description="What this machine has, and what Ark would do on it.")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--comfyui", type=Path, help="a ComfyUI folder")
    parser.add_argument("--models", type=Path, action="append", default=[], help="a folder of model files, besides ComfyUI's")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="read nothing from the disk and time nothing")  # fmt: skip
    args = parser.parse_args(arguments)
    folders = (*args.models, *([args.comfyui / "models"] if args.comfyui else []), EMBEDDED)
    host = host_version(args.comfyui) if args.comfyui else None
    report = examine(Subject(folders, host, measure=not args.quick))
    print(json.dumps(report.json(), indent=1) if args.json else report)
    return 0 if report.healthy else 1


if __name__ == "__main__":
    sys.exit(main())
