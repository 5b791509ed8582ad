"""Retraining in one call: each task from files, with figures that are those of the saved model."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from structmat.data import LabelledTexts, read_texts
from structmat.evaluate import accuracy, perplexity
from structmat.integrations.transformers import retraining
from structmat.integrations.transformers.keeping import apart, evaluated_arguments, spread
from structmat.integrations.transformers.retraining import retrain
from structmat.integrations.transformers.tasks import TASKS
from training import tiny

TrainerCallback: Any = tiny.transformers.TrainerCallback

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


def equal(one: Any, other: Any) -> bool:
    """Whether two networks have the same tensors."""
    return all(torch.equal(other.state_dict()[name], tensor) for name, tensor in one.state_dict().items())


STEPS = {"save_strategy": "steps", "max_steps": 10, "per_device_train_batch_size": 8}


@pytest.mark.parametrize("strategy", ["steps", pytest.param("no", marks=pytest.mark.slow)])
def test_what_got_worse_is_not_saved(tmp_path: Path, strategy: str) -> None:
    texts = tiny.sentences(80)
    model, start = tiny.structured(tiny.llama()), tiny.structured(tiny.llama())
    args = tiny.arguments(
        tmp_path, **{**STEPS, "save_strategy": strategy}, learning_rate=3.0, lr_scheduler_type="constant"
    )
    with pytest.warns(UserWarning, match="the training made the model worse .eval_perplexity .* the start is saved"):
        found = retrain(model, tiny.tokenizer(), texts[:64], texts[64:], args, length=32)
    assert equal(saved(tmp_path, "causal-lm"), start)
    assert found["eval_perplexity"] == found["eval_perplexity_before"]
    expected = perplexity(start, tiny.tokenizer(), texts[64:], length=32, progress=False).token
    assert found["eval_perplexity"] == pytest.approx(expected)
    assert not (tmp_path / "start").exists()


@pytest.mark.slow
def test_the_best_state_is_saved(tmp_path: Path) -> None:
    """A rate that grows without end: the first evaluations are better than the start, the last ones worse."""

    class Grows(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
            for group in options["optimizer"].param_groups:
                group["lr"] = 1e-2 if state.global_step < 6 else 3.0

    texts = tiny.sentences(80)
    model = tiny.structured(tiny.llama())
    args = tiny.arguments(tmp_path, **STEPS, learning_rate=1e-2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            retraining, "StructuredTrainer", functools.partial(retraining.StructuredTrainer, callbacks=[Grows()])
        )
        found = retrain(model, tiny.tokenizer(), texts[:64], texts[64:], args, length=32)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    assert sorted(losses) == [2, 4, 6, 8, 10]
    assert losses[10] > losses[6]
    assert state["best_global_step"] == min(losses, key=losses.__getitem__) <= 6
    assert found["eval_perplexity"] < found["eval_perplexity_before"]
    assert equal(saved(tmp_path, "causal-lm"), saved(tmp_path / f"checkpoint-{state['best_global_step']}", "causal-lm"))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["causal-lm", "image-classification"])
def test_a_part_is_held_out_where_no_data_is_given_to_measure_on(tmp_path: Path, task: str) -> None:
    make, data, _ = tiny.TASKS[task]

    class Examples(list[Any], Dataset[Any]):
        pass

    args = tiny.arguments(tmp_path, **STEPS)
    found = retrain(tiny.structured(make()), Processor(), Examples(data(64)), None, args, task=task)
    name = "eval_perplexity" if task == "causal-lm" else "eval_accuracy"
    assert found[name] <= found[f"{name}_before"] if task == "causal-lm" else found[name] >= found[f"{name}_before"]
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 10


def test_what_is_held_out() -> None:
    left, held = apart(list(range(64)), "causal-lm")
    assert [held[k] for k in range(len(held))] == [8, 24, 40, 56]
    assert sorted([*left, *held]) == list(range(64))
    assert apart(list(range(31)), "causal-lm") == (list(range(31)), None)
    assert len(apart(list(range(4000)), "causal-lm")[1]) == 64
    assert list(spread(list(range(100)), 4)) == [0, 25, 50, 75]


@pytest.mark.parametrize(
    ("options", "every"),
    [
        ({"max_steps": 50}, 10),
        ({"max_steps": 3}, 1),
        ({"max_steps": 50, "save_steps": 4}, 4),
        ({"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2}, 4),
        ({"max_steps": 50, "structure_target": 0.4}, None),
        ({"max_steps": 50, "eval_strategy": "steps", "eval_steps": 7}, 7),
        ({"max_steps": 50, "save_strategy": "no"}, None),
    ],
)
def test_when_a_run_is_evaluated(tmp_path: Path, options: dict[str, Any], every: int | None) -> None:
    args = tiny.arguments(tmp_path, **{"save_strategy": "steps", "per_device_train_batch_size": 4, **options})
    found = evaluated_arguments(args, rows=72)
    assert found.eval_steps == every
    assert found.load_best_model_at_end == (every is not None and "eval_strategy" not in options)
    assert args.eval_strategy == options.get("eval_strategy", "no")


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
