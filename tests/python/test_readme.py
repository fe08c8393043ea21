"""The Python of the README and the guides runs as it stands, and their commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from served import CHAT_ROWS, ENGINE, json_lines, serving, write_model

import flexcore as fc
from flexcore import cli
from flexcore.cli import VERBS
from flexcore.cli.bench import _available

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, kind: str) -> list[str]:
    return re.findall(rf"<!-- test: {kind} -->\n```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.fixture
def scope(tmp_path: Path) -> dict[str, str]:
    """What the blocks take as given."""
    (tmp_path / "data.jsonl").write_bytes(json_lines(CHAT_ROWS))
    model = write_model(tmp_path / "model")
    return {"MODEL": str(model), "OUTPUT": str(tmp_path / "adapter"), "DATA": str(tmp_path / "data.jsonl")}


def test_python_of_the_readme_runs(scope: dict[str, str]) -> None:
    for block in blocks(README, "python"):
        names: dict = dict(scope)
        exec(compile(block, str(README), "exec"), names)
        assert (Path(scope["OUTPUT"]) / "adapter_model.safetensors").is_file()
        assert names["engine"].job(names["job"]).status == "succeeded"
    assert blocks(README, "python")


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != README and blocks(page, "python")], ids=lambda p: p.stem
)
def test_python_of_the_guides_runs(page: Path, scope: dict[str, str]) -> None:
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), dict(scope))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "server")], ids=lambda p: p.stem)
def test_clients_of_the_guides_run(
    page: Path, scope: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(fc.LLM(scope["MODEL"], **ENGINE), tmp_path / "served") as server:
        for block in blocks(page, "server"):
            names: dict = {**scope, "URL": server.url}
            exec(compile(block, str(page), "exec"), names)
            if "job" in names:
                assert names["job"].status == "succeeded", names["job"].error
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_ones_that_there_are(page: Path) -> None:
    """Parsed, with their options; a placeholder is a word like any other."""
    for line in re.findall(r"^    (flexcore .*)$", page.read_text(), re.MULTILINE):
        words = shlex.split(line, comments=True)[1:]
        cli.build_parser(words).parse_args(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_readme_and_help_name_what_there_is() -> None:
    text = README.read_text()
    assert f"`flexcore {'|'.join(VERBS)}`" in text
    (kinds,) = re.findall(r"`flexcore bench ([a-z|]+)` measures", text)
    assert sorted(kinds.split("|")) == _available()
    assert all(kind in VERBS["bench"] for kind in _available())
