"""The trainer: losses do not depend on how a step is split, checkpoints are plain, and runs resume bit by bit."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from structmat import StructuredLinear, plan_of
from structmat.integrations.transformers.tasks import TASKS, task_of
from structmat.integrations.transformers.trainer import StructuredTrainer, load_tensors_, sums_its_loss
from structmat.training import distill_hidden, distill_logits
from training import tiny
from training.tiny import arguments, trainer

DISTILLS = {"distill_logits": 0.7, "distill_hidden": 0.3, "temperature": 2.0, "task_weight": 0.5}

each_task = pytest.mark.parametrize("task", list(tiny.TASKS))


def teacher(task: str) -> Any:
    return tiny.TASKS[task][0](seed=1)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@each_task
def test_a_step_does_not_depend_on_how_it_is_split(tmp_path: Path, task: str) -> None:
    found = []
    for size, times in ((8, 1), (2, 4)):
        args = arguments(
            tmp_path, optim="sgd", learning_rate=0.3, per_device_train_batch_size=size, max_steps=2,
            gradient_accumulation_steps=times, **DISTILLS,
        )  # fmt: skip
        run = trainer(task, args, teacher=teacher(task))
        before = tensors(run.model)
        run.train()
        found.append(tensors(run.model))
        assert any((found[-1][name] - before[name]).abs().max() > 1e-3 for name in before)
        logged = [{k: v for k, v in entry.items() if k.startswith("loss")} for entry in run.state.log_history]
        found.append({f"{k}{n}": torch.tensor(v) for n, entry in enumerate(logged) for k, v in entry.items()})
    for whole, split in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(split, whole, rtol=1e-4, atol=2e-6)


def test_the_loss_is_what_it_says(tmp_path: Path) -> None:
    run = trainer("causal-lm", arguments(tmp_path, **DISTILLS), teacher=teacher("causal-lm"))
    batch = tiny.language_collator(tiny.tokenizer())(tiny.rows(5))
    valid = batch["labels"][:, 1:] != -100
    model = run.model.train()
    ours, theirs = (network(**batch, output_hidden_states=True) for network in (model, run.teacher))
    logits = distill_logits(ours.logits[:, :-1], theirs.logits[:, :-1], valid, temperature=2.0)
    cut = [[state[:, :-1] for state in output.hidden_states] for output in (ours, theirs)]
    hidden = distill_hidden(*cut, valid.float())
    expected = 0.5 * ours.loss + (0.7 * logits + 0.3 * hidden) / valid.sum()
    torch.testing.assert_close(run.compute_loss(model, batch), expected)
    # a step of which this batch is a half
    torch.testing.assert_close(run.compute_loss(model, batch, num_items_in_batch=2 * valid.sum()), expected / 2)
    loss, outputs = run.compute_loss(model, batch, return_outputs=True)
    assert (loss.item(), outputs.logits.shape) == (pytest.approx(expected.item()), ours.logits.shape)
    # an evaluation reports the model's own
    torch.testing.assert_close(run.compute_loss(model.eval(), batch), ours.loss)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_the_logged_terms_add_up(tmp_path: Path) -> None:
    run = trainer("causal-lm", arguments(tmp_path, logging_steps=2, **DISTILLS), teacher=teacher("causal-lm"))
    run.train()
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        total = 0.5 * entry["loss_task"] + 0.7 * entry["loss_logits"] + 0.3 * entry["loss_hidden"]
        assert entry["loss"] == pytest.approx(total, rel=1e-5)


@each_task
def test_a_run_that_is_resumed_ends_bit_equal(tmp_path: Path, task: str) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2, **DISTILLS}
    whole = trainer(task, arguments(tmp_path / "run", **options), teacher=teacher(task))
    whole.train()
    other = tiny.structured(tiny.TASKS[task][0](seed=5))
    again = trainer(task, arguments(tmp_path / "run", **options), teacher=teacher(task), model=other)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_equal(tensors(again.model), tensors(whole.model))
    assert [e["loss"] for e in again.state.log_history if "loss" in e] == [
        e["loss"] for e in whole.state.log_history if "loss" in e
    ]


def test_a_run_that_is_resumed_between_two_logs_logs_all_steps(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 4, "max_steps": 10, **DISTILLS}
    options["lr_scheduler_type"] = "constant"
    whole = trainer("causal-lm", arguments(tmp_path, **options), teacher=teacher("causal-lm"))
    expected = whole.train().training_loss
    logged = [{k: v for k, v in entry.items() if "loss" in k} for entry in whole.state.log_history]
    steps = [entry["step"] for entry in whole.state.log_history]
    assert steps == [4, 8, 10]
    for checkpoint in (3, 6, 10):
        again = trainer("causal-lm", arguments(tmp_path, **options), teacher=teacher("causal-lm"))
        found = again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}"))
        assert (found.global_step, found.training_loss) == (10, expected)
        assert_equal(tensors(again.model), tensors(whole.model))
        assert [{k: v for k, v in entry.items() if "loss" in k} for entry in again.state.log_history] == logged


def test_the_mean_loss_is_that_of_every_step(tmp_path: Path) -> None:
    run = trainer("causal-lm", arguments(tmp_path, max_steps=5, logging_steps=1))
    found = run.train().training_loss
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert found == pytest.approx(sum(losses) / 5, rel=1e-6)
    again = trainer("causal-lm", arguments(tmp_path / "other", max_steps=5, logging_steps=3))
    assert again.train().training_loss == pytest.approx(found, rel=1e-6)


def test_a_checkpoint_without_sums_is_resumed(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer("causal-lm", arguments(tmp_path, **options)).train()
    file = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(file.read_text())
    del state["stateful_callbacks"]["LossSums"]
    file.write_text(json.dumps(state))
    run = trainer("causal-lm", arguments(tmp_path, **options))
    found = run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2")).training_loss
    assert found == pytest.approx(sum(entry["loss"] for entry in run.state.log_history[-3:-1]) / 2)


def test_a_loss_that_is_not_finite_counts_as_the_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer("causal-lm", arguments(tmp_path, logging_steps=4))
    compute, losses = run.compute_loss, []

    def broken(*given: Any, **options: Any) -> Tensor:
        loss = compute(*given, **options)
        losses.append(loss.item())
        return loss * torch.nan if len(losses) == 4 else loss

    monkeypatch.setattr(run, "compute_loss", broken)
    run.train()
    entry = next(entry for entry in run.state.log_history if "loss" in entry)
    assert entry["loss"] == pytest.approx(sum(losses[:3]) * (1 + 1 / 4) / 4)


@each_task
def test_checkpoints_are_plain_and_have_no_teacher(tmp_path: Path, task: str) -> None:
    args = arguments(tmp_path, save_strategy="steps", save_steps=4, **DISTILLS)
    run = trainer(task, args, teacher=teacher(task), processing_class=tiny.tokenizer())
    taught = tensors(run.teacher)
    run.train()
    assert_equal(tensors(run.teacher), taught)
    assert not run.teacher.training
    assert not any(parameter.requires_grad for parameter in run.teacher.parameters())
    folder = tmp_path / "checkpoint-4"
    loaded = TASKS[task].loader.from_pretrained(folder)
    assert plan_of(loaded) == plan_of(run.model)
    assert_equal(tensors(loaded), tensors(run.model))
    assert not [name for name in load_file(folder / "model.safetensors") if "teacher" in name]
    assert tiny.transformers.AutoTokenizer.from_pretrained(folder).eos_token == "</s>"


def test_the_teacher_by_name(tmp_path: Path) -> None:
    teacher("causal-lm").to(torch.bfloat16).save_pretrained(tmp_path / "teacher")
    args = arguments(tmp_path, teacher=str(tmp_path / "teacher"), teacher_dtype="float32", distill_logits=1.0)
    run = trainer("causal-lm", args)
    assert {parameter.dtype for parameter in run.teacher.parameters()} == {torch.float32}
    named = run.train().training_loss
    given = tiny.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype=torch.float32)
    assert named == trainer("causal-lm", arguments(tmp_path, distill_logits=1.0), teacher=given).train().training_loss


def test_distillation_recovers_the_teacher(tmp_path: Path) -> None:
    original = tiny.llama(layers=1)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.mul_(5)  # so that its answers differ
    student = tiny.structured(copy.deepcopy(original))
    args = arguments(
        tmp_path, max_steps=60, learning_rate=2e-3, task_weight=0.0, distill_logits=1.0, distill_hidden=1.0
    )
    run = trainer("causal-lm", args, model=student, teacher=original)
    run.train()
    first, last = (run.state.log_history[k] for k in (0, -2))
    assert last["loss_logits"] < 0.5 * first["loss_logits"]
    assert last["loss_hidden"] < 0.75 * first["loss_hidden"]


def test_groups_and_balance(tmp_path: Path) -> None:
    model = tiny.structured(tiny.llama())
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, StructuredLinear)
    with torch.no_grad():
        layer.left.mul_(10)
    options = {"structured_learning_rate": 2e-2, "weight_decay": 0.1, "optim": "sgd", "max_steps": 1}
    run = trainer("causal-lm", arguments(tmp_path, balance=False, **options), model=model)
    run.train()
    groups = [(g["name"], g["initial_lr"], g["weight_decay"]) for g in run.optimizer.param_groups]
    assert groups == [("dense, no decay", 1e-2, 0.0), ("structured", 2e-2, 0.1), ("structured, no decay", 2e-2, 0.0)]
    assert layer.left.abs().mean() > 5 * layer.right.abs().mean()
    trainer("causal-lm", arguments(tmp_path, **options), model=model).train()
    assert layer.left.square().mean().item() == pytest.approx(layer.right.square().mean().item(), rel=0.1)


def test_the_best_checkpoint_comes_back(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    args = arguments(tmp_path, load_best_model_at_end=True, learning_rate=3.0, optim="sgd", **options)
    run = trainer("image-classification", args, eval_dataset=tiny.images(12, seed=1))
    run.train()
    best = type(run.model).from_pretrained(run.state.best_model_checkpoint)
    assert_equal(tensors(run.model), tensors(best))


@pytest.mark.parametrize(
    "options", [{"bf16": True}, {"activation_checkpointing": True}, {"label_smoothing_factor": 0.1}], ids=str
)
@each_task
def test_options_of_the_trainer_work_with_a_teacher(tmp_path: Path, task: str, options: dict[str, Any]) -> None:
    run = trainer(task, arguments(tmp_path, max_steps=2, **options, **DISTILLS), teacher=teacher(task))
    plain = trainer(task, arguments(tmp_path, max_steps=2, **DISTILLS), teacher=teacher(task))
    found, expected = run.train().training_loss, plain.train().training_loss
    assert found == pytest.approx(expected, rel=1e-5 if "activation_checkpointing" in options else 0.1)


def test_compiled(tmp_path: Path) -> None:
    options = {"max_steps": 2, "torch_compile": True, "torch_compile_backend": "aot_eager", **DISTILLS}
    run = trainer("causal-lm", arguments(tmp_path, **options), teacher=teacher("causal-lm"))
    plain = trainer("causal-lm", arguments(tmp_path, max_steps=2, **DISTILLS), teacher=teacher("causal-lm"))
    assert run.train().training_loss == pytest.approx(plain.train().training_loss, rel=1e-5)


# tasks and losses


def test_tasks_of_models() -> None:
    assert [task_of(make()) for make, *_ in tiny.TASKS.values()] == list(tiny.TASKS)
    kind = type("FSDPLlamaForCausalLM", (tiny.transformers.LlamaForCausalLM,), {})
    assert task_of(kind(tiny.llama().config)) == "causal-lm"
    assert task_of(nn.Linear(2, 2), "causal-lm") == "causal-lm"
    with pytest.raises(ValueError, match=r"expected a model whose class tells its task, got Linear; pass task, one of"):
        task_of(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"expected task to be one of 'causal-lm', .*, got 'chess'"):
        task_of(tiny.llama(), "chess")


def test_which_models_sum_their_loss() -> None:
    assert [sums_its_loss(make()) for make, *_ in tiny.TASKS.values()] == [True, False, True]
    regression = tiny.vit()
    regression.config.problem_type = "regression"
    assert not sums_its_loss(regression)


# what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_weight": -1}, "expected task_weight to be at least 0, got -1"),
        ({"distill_logits": -1}, "expected distill_logits to be at least 0, got -1"),
        ({"distill_hidden": float("nan")}, "expected distill_hidden to be at least 0, got nan"),
        ({"temperature": 0}, "expected a positive temperature, got 0"),
        ({"teacher": "some/model"}, "expected distill_logits or distill_hidden above 0 for the teacher 'some/model'"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_teachers_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got the weights 0.0 and 0.0 with a teacher"):
        trainer("causal-lm", arguments(tmp_path), teacher=teacher("causal-lm"))
    args = arguments(tmp_path, distill_logits=1.0)
    with pytest.raises(ValueError, match=r"got the weights 1.0 and 0.0 without a teacher"):
        trainer("causal-lm", args)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="expected one device per process with a teacher, got 2; start with torchrun"):
        trainer("causal-lm", args, teacher=teacher("causal-lm"))
    args = arguments(tmp_path, distill_logits=1.0, teacher="some/model")
    with pytest.raises(ValueError, match="expected one teacher, got a model and the name 'some/model'"):
        trainer("causal-lm", args, teacher=teacher("causal-lm"))


def test_batches_that_cannot_be_distilled(tmp_path: Path) -> None:
    args = arguments(tmp_path, distill_logits=1.0)
    run = trainer("image-classification", args, teacher=teacher("image-classification"))
    batch = tiny.transformers.default_data_collator(tiny.images(2))
    with pytest.raises(ValueError, match="expected a batch with 'labels' to distill from, got 'pixel_values'"):
        run.compute_loss(run.model.train(), {"pixel_values": batch["pixel_values"]})
    run.model.config.problem_type = "multi_label_classification"
    batch["labels"] = torch.eye(3)[:2]
    with pytest.raises(ValueError, match=r"expected one class per example to distill from, got torch.float32 labels"):
        run.compute_loss(run.model, batch)


def test_an_optimizer_that_chooses_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer("causal-lm", arguments(tmp_path))
    chosen = (torch.optim.AdamW, {"params": list(run.model.parameters())})
    monkeypatch.setattr(StructuredTrainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda args, model: chosen))
    with pytest.raises(ValueError, match="expected an optimizer that takes parameter groups, got "):
        run.create_optimizer()


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    tiny.llama(layers=1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=r"expected a checkpoint with the tensors of the model in .*'missing_keys'"):
        load_tensors_(tiny.llama(), str(tmp_path))
