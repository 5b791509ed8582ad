"""Tasks of lm-eval, from files of our own."""

import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from structmat.integrations.lm_eval import lm_eval_tasks
from training import tiny


@pytest.fixture
def own_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tasks: which word follows, and the perplexity of texts."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = tiny.sentences(12)
    lines = [
        {"text": text, "question": " ".join(text.split()[:2]), "choices": [text.split()[2], "w5"]} for text in texts
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    common = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'data.jsonl'}\ntest_split: test\n"
    )
    (tmp_path / "next.yaml").write_text(
        "task: next_word\n" + common + "output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: 0\ndoc_to_choice: "{{choices}}"\n'
        "metric_list:\n  - metric: acc\n"
    )
    (tmp_path / "texts.yaml").write_text(
        "task: texts\n" + common + "output_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: word_perplexity\n"
    )
    return tmp_path


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_own_tasks(own_tasks: Path) -> None:
    model = tiny.structured(tiny.llama()).train()
    found = lm_eval_tasks(
        model, tiny.tokenizer(), ["next_word", "texts"], include_path=own_tasks, limit=8, batch_size=4, length=32
    )
    assert set(found) == {"next_word", "texts"}
    assert 0 <= found["next_word"]["acc,none"] <= 1
    assert found["texts"]["word_perplexity,none"] > 1
    assert model.training
    again = lm_eval_tasks(model, tiny.tokenizer(), ["next_word"], include_path=own_tasks, limit=8, length=32)
    assert again["next_word"]["acc,none"] == found["next_word"]["acc,none"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_all_tasks_of_a_file(own_tasks: Path) -> None:
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    found = lm_eval_tasks(model, tokenizer, [], include_path=own_tasks / "next.yaml", limit=2, length=32)
    assert set(found) == {"next_word"}
    (own_tasks / "other.yaml").write_text("key: value\n")
    with pytest.raises(ValueError, match=r"expected a task of lm-eval as YAML, got .*other\.yaml"):
        lm_eval_tasks(model, tokenizer, [], include_path=own_tasks / "other.yaml")


def test_unknown_tasks(own_tasks: Path) -> None:
    with pytest.raises(
        ValueError, match=r"expected tasks that lm-eval knows, got \['chess'\]; there are: next_word, te"
    ):
        lm_eval_tasks(tiny.llama(), tiny.tokenizer(), ["next_word", "chess"], include_path=own_tasks)


@pytest.mark.parametrize("tasks", ["next_word", []])
def test_no_list_of_tasks(tasks: list[str]) -> None:
    with pytest.raises(ValueError, match="expected a list of names of tasks, got "):
        lm_eval_tasks(tiny.llama(), tiny.tokenizer(), tasks)
