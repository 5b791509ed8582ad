"""Retraining in one call: each task from files, with figures that are those of the saved model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from structmat.data import LabelledTexts, read_texts
from structmat.evaluate import accuracy, perplexity
from structmat.integrations.transformers.retraining import retrain
from structmat.integrations.transformers.tasks import TASKS
from training import tiny

datasets = pytest.importorskip("datasets")

OPTIONS = {"max_steps": 20, "per_device_train_batch_size": 8, "learning_rate": 1e-2}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def labelled_texts(count: int) -> LabelledTexts:
    """Texts of one word in two classes, which the word tells."""
    words = [10 + k % 3 + 80 * (k % 2) for k in range(count)]
    return LabelledTexts([f"w{word} w{word}" for word in words], [int(word > 60) for word in words])


class Processor:
    """An image processor for images that have the right size."""

    def __call__(self, images: Any, return_tensors: str) -> dict[str, torch.Tensor]:
        pixels = torch.frombuffer(bytearray(images.tobytes()), dtype=torch.uint8).view(16, 16, 3).permute(2, 0, 1)
        return {"pixel_values": pixels[None] / 127.5 - 1}

    def save_pretrained(self, folder: str) -> None:
        Path(folder, "preprocessor_config.json").write_text("{}")


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    image = pytest.importorskip("PIL.Image")
    for name, colour in (("blue", (0, 0, 250)), ("green", (0, 250, 0)), ("red", (250, 0, 0))):
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True)
        for k in range(8):
            image.new("RGB", (16, 16), tuple(max(0, c - 9 * k) for c in colour)).save(folder / f"{k}.png")
    return str(tmp_path / "pictures")


def saved(folder: Path, task: str) -> Any:
    return TASKS[task].loader.from_pretrained(folder)


@pytest.mark.parametrize("packed", [False, True])
def test_a_language_model_from_a_file(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("<|endoftext|>".join(tiny.sentences(80)), encoding="utf-8")
    model, tokenizer = tiny.structured(tiny.llama()), tiny.tokenizer()
    held_out = read_texts(f"{path}[-16:]")
    before = perplexity(model, tokenizer, held_out, length=24, truncate=True, progress=False).token
    args = tiny.arguments(tmp_path / "out", **OPTIONS)
    found = retrain(model, tokenizer, f"{path}[:64]", f"{path}[-16:]", args, length=24, packed=packed)
    again = perplexity(
        saved(tmp_path / "out", "causal-lm"), tokenizer, held_out, length=24, truncate=True, progress=False
    )
    assert found["eval_perplexity"] == pytest.approx(again.token)
    assert found["eval_word_perplexity"] == pytest.approx(again.word)
    assert found["eval_bits_per_byte"] == pytest.approx(again.bits_per_byte)
    assert found["eval_tokens"] == again.tokens
    assert again.token < 0.7 * before
    assert json.loads((tmp_path / "out" / "all_results.json").read_text()) == found
    assert tiny.transformers.AutoTokenizer.from_pretrained(tmp_path / "out").bos_token == "<s>"


def test_a_classifier_of_texts(tmp_path: Path) -> None:
    table = labelled_texts(60)
    datasets.Dataset.from_dict({"sentence": table.texts, "label": table.labels}).to_csv(tmp_path / "a.tsv", sep="\t")
    model, tokenizer = tiny.structured(tiny.bert()), tiny.tokenizer()
    args = tiny.arguments(tmp_path / "out", **OPTIONS, eval_strategy="steps", eval_steps=10)
    found = retrain(model, tokenizer, f"{tmp_path / 'a.tsv'}[:50]", f"{tmp_path / 'a.tsv'}[50:]", args, length=8)
    loaded = saved(tmp_path / "out", "sequence-classification")
    batches = [tiny.transformers.DataCollatorWithPadding(tokenizer)(
        LabelledTexts(table.texts[50:], table.labels[50:]).examples(tokenizer, length=8)
    )]  # fmt: skip
    assert found["eval_accuracy"] == accuracy(loaded, batches).top1
    assert found["eval_accuracy"] > 0.9


def test_a_classifier_of_images_with_a_teacher(tmp_path: Path, pictures: str) -> None:
    teacher = tiny.vit()
    model = tiny.structured(tiny.vit())
    args = tiny.arguments(tmp_path / "out", **OPTIONS, distill_logits=0.1)
    seen = []
    found = retrain(
        model, Processor(), pictures, f"{pictures}[:6]", args, teacher=teacher,
        augment=lambda image: seen.append(image.size) or image,
    )  # fmt: skip
    assert found["eval_accuracy"] == 1
    assert set(seen) == {(16, 16)}
    assert len(seen) >= 20 * 8  # the loader reads ahead
    assert (tmp_path / "out" / "preprocessor_config.json").exists()


def test_examples_are_taken_as_they_are(tmp_path: Path) -> None:
    class Rows(Dataset[list[int]]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> list[int]:
            return tiny.rows(8)[index]

    args = tiny.arguments(tmp_path / "out", max_steps=1)
    found = retrain(tiny.structured(tiny.llama()), tiny.tokenizer(), Rows(), None, args)
    assert "eval_perplexity" not in found
    assert found["train_loss"] > 0


def test_a_run_that_is_resumed(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    texts = tiny.sentences(32)
    whole = retrain(
        tiny.structured(tiny.llama()),
        tiny.tokenizer(),
        texts,
        texts[:4],
        tiny.arguments(tmp_path, **options),
        length=32,
    )
    args = tiny.arguments(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"), **options)
    again = retrain(tiny.structured(tiny.llama(seed=3)), tiny.tokenizer(), texts, texts[:4], args, length=32)
    assert again["eval_perplexity"] == whole["eval_perplexity"]


@pytest.mark.parametrize(
    ("make", "data", "message"),
    [
        (tiny.llama, labelled_texts(4), "expected a source or a list of texts for a language model, got LabelledTexts"),
        (tiny.llama, [[1, 2]], "expected a source or a list of texts for a language model, got list"),
        (tiny.bert, ["w3"], r"expected a source, .* for sequence-classification, got list"),
        (tiny.vit, ["w3"], r"expected a source, .* for image-classification, got list"),
        (
            tiny.bert, LabelledTexts(["w3", "w4"], [0, 2]),
            r"expected classes below the model's 2, got 2; load the model with num_labels=3",
        ),
    ],
)  # fmt: skip
def test_data_that_does_not_go_with_the_task(tmp_path: Path, make: Any, data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrain(make(), tiny.tokenizer(), data, None, tiny.arguments(tmp_path))
