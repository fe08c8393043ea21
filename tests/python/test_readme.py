"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

from flexcore.cli import VERBS
from flexcore.cli.bench import _available

README = Path(__file__).parents[2] / "README.md"


def test_python_of_the_readme_runs(tmp_path: Path) -> None:
    from flexcore.tiny import write_tiny_model

    model = tmp_path / "model"
    write_tiny_model(model)
    blocks = re.findall(r"<!-- test: python -->\n```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        scope = {"MODEL": str(model), "OUTPUT": str(tmp_path / "adapter")}
        exec(compile(block, str(README), "exec"), scope)
        assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
        assert scope["engine"].job(scope["job"]).status == "succeeded"


def test_readme_and_help_name_what_there_is() -> None:
    text = README.read_text()
    assert f"`flexcore {'|'.join(VERBS)}`" in text
    (kinds,) = re.findall(r"`flexcore bench ([a-z|]+)` measures", text)
    assert sorted(kinds.split("|")) == _available()
    assert all(kind in VERBS["bench"] for kind in _available())
