"""What the documentation says can be typed: Python snippets run, commands parse, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from distot.cli import app

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "cluster/README.md", *(f"docs/{page.name}" for page in ROOT.glob("docs/*.md"))]


def snippets() -> list[Any]:
    found = []
    for page in PAGES:
        for number, code in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)):
            found.append(pytest.param(code, id=f"{page} {number}"))
    return found


def commands() -> list[str]:
    """Lines of code blocks that begin with distot, comments cut off, continued lines joined."""
    lines: list[str] = []
    for page in PAGES:
        text = (ROOT / page).read_text().replace("\\\n", " ")
        lines += [line.split(" #")[0].strip() for line in text.splitlines() if re.match(r"(    |\t)distot [a-z]", line)]
    return sorted(set(lines))


@pytest.mark.parametrize("code", snippets())
def test_python_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE):
        pytest.importorskip(name, reason=f"{name}, which this example is about, is not among the tools of the tests")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "documentation", "exec"), {"__name__": "documentation"})


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line: str) -> None:
    group: Any = typer.main.get_command(app)
    words = shlex.split(line)[1:]
    with group.make_context("distot", words) as context:
        name, command, rest = group.resolve_command(context, words)
        command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:", link):
            target = ((ROOT / page).parent / link.split("#")[0]).resolve()
            assert target.exists(), f"{page} links to {link}"
