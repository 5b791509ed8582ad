"""The snippets of docs/huggingface.md, in order, as one program."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "huggingface.md"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(snippets) == 4
    exec("\n".join(snippets), {})
    assert "model.layers.0.mlp.up_proj" in capsys.readouterr().out
    assert {folder.name for folder in tmp_path.iterdir()} == {"small", "adapter", "merged", "dit"}
