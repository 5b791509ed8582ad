"""Retraining with ``transformers.Trainer``: parameter groups, balance, and a dense teacher."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from structmat.integrations.transformers.arguments import StructuredTrainingArguments
from structmat.integrations.transformers.callback import StructureCallback
from structmat.integrations.transformers.losses import LossSums
from structmat.integrations.transformers.tasks import TASKS, task_of
from structmat.training import balance_, distill_hidden, distill_logits, parameter_groups
from structmat.training.distillation import IGNORED, next_token_mask, row_weights


class StructuredTrainer(Trainer):
    """A ``transformers.Trainer`` for structured networks; its options and behaviour are the same but for what follows.

    The optimizer gets the groups of ``parameter_groups``. The teacher runs without gradients, in evaluation mode and
    under the same mixed precision, on the device of each process; it is no part of the model, so that no checkpoint and
    no wrapper holds it. It is whole on every process, unless the model was itself sharded by ``from_pretrained(…,
    distributed_config=…)``: then a teacher that is given by name is sharded in the same way, and a teacher that the
    caller sharded stays sharded. Both distillation losses are sums over the tokens that have a label, divided by the
    number of these tokens in the whole step, over all micro-batches and processes; the model's own loss is divided in
    the same way. Evaluation reports the model's own loss.

    Checkpoints are folders for ``from_pretrained``, and are resumed through it: ``Trainer`` itself only warns where the
    tensors of a checkpoint are not those of the model, which happens with every ViT, since it is saved under older
    names.

    Args:
        model: The network.
        args: The settings.
        teacher: The dense model, where ``args.teacher`` does not name it.
        task: The task of the model, a key of ``TASKS``; None to take it from the model's class.
        **options: The options of ``transformers.Trainer``.

    Raises:
        ValueError: If there is a teacher without a weight or a weight without a teacher, two teachers, or several
            devices in one process.
    """

    args: StructuredTrainingArguments

    def __init__(
        self,
        model: nn.Module,
        args: StructuredTrainingArguments,
        *,
        teacher: nn.Module | None = None,
        task: str | None = None,
        **options: Any,
    ) -> None:
        if teacher is not None and args.teacher is not None:
            raise ValueError(f"expected one teacher, got a model and the name {args.teacher!r}")
        taught = teacher is not None or args.teacher is not None
        if taught != args.distills:
            raise ValueError(
                "expected a teacher and distill_logits or distill_hidden above 0, or neither, got the weights "
                f"{args.distill_logits} and {args.distill_hidden} {'with' if taught else 'without'} a teacher"
            )
        if taught and args.n_gpu > 1:
            raise ValueError(f"expected one device per process with a teacher, got {args.n_gpu}; start with torchrun")
        super().__init__(model, args, **options)
        self.task = task_of(model, task) if taught else task
        self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs and sums_its_loss(model)
        self.add_callback(LossSums())
        if args.teacher is not None:
            loader = TASKS[task_of(model, task)].loader
            teacher = loader.from_pretrained(args.teacher, dtype=args.teacher_dtype, **_sharding_of(model))
        if teacher is not None:
            teacher.requires_grad_(False).eval()
            if not _sharding_of(teacher):
                teacher.to(args.device)
        self.teacher = teacher
        if self.args.structure is not None:
            self.add_callback(StructureCallback(self.args.structure))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, after balancing the layers where that is asked for and nothing is resumed.

        Args:
            resume_from_checkpoint: The folder of a checkpoint, as in ``transformers.Trainer``.
            *args: Further arguments of ``transformers.Trainer.train``.
            **kwargs: Further keyword arguments of ``transformers.Trainer.train``.

        Returns:
            The result of ``transformers.Trainer.train``.
        """
        if self.args.balance and not resume_from_checkpoint and self.model is not None:
            balance_(self.model)
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        return result._replace(training_loss=result.metrics["train_loss"])

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer that ``args.optim`` names, over the groups of ``parameter_groups``.

        Args:
            model: The network to optimize; None for the trainer's model.

        Returns:
            The optimizer.

        Raises:
            ValueError: If that optimizer chooses its parameters itself.
        """
        network: Any = self.model if model is None else model
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, network)
            own = {"params", "model", "optimizer_dict"} & set(options)
            if own or not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
                raise ValueError(f"expected an optimizer that takes parameter groups, got {self.args.optim!r}")
            groups = parameter_groups(
                network,
                self.args.learning_rate,
                self.args.weight_decay,
                structured_learning_rate=self.args.structured_learning_rate,
                structure_learning_rate=self.args.structure_learning_rate,
                decay_embeddings=self.args.decay_embeddings,
            )
            self.optimizer = kind(groups, **options)
        return super().create_optimizer(model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's own loss, and in training with a teacher the distillation losses.

        Args:
            model: The network, possibly wrapped.
            inputs: The batch.
            return_outputs: Whether to return the outputs too.
            num_items_in_batch: The number of labels of the whole step.

        Returns:
            The loss, or the loss and the outputs.

        Raises:
            ValueError: If the batch has no labels, or not one class per example for a classifier.
        """
        if self.teacher is None or not model.training:
            return super().compute_loss(model, dict(inputs), return_outputs, num_items_in_batch)
        if "labels" not in inputs:
            raise ValueError(f"expected a batch with 'labels' to distill from, got {', '.join(map(repr, inputs))}")
        asked = {**inputs, "output_hidden_states": True} if self.args.distill_hidden else dict(inputs)
        loss, outputs = super().compute_loss(model, dict(asked), True, num_items_in_batch)
        with torch.no_grad(), self.accelerator.autocast():
            taught = self.teacher(**{name: value for name, value in asked.items() if name != "labels"})
        scale, step_share = self._scales(inputs["labels"], num_items_in_batch)
        sums = self._distillation(outputs, taught, inputs)
        terms = {"task": loss, **{name: total * scale for name, total in sums.items()}}
        self.losses.add({f"loss_{name}": term for name, term in terms.items()}, step_share)
        weights = {
            "task": self.args.task_weight,
            "logits": self.args.distill_logits,
            "hidden": self.args.distill_hidden,
        }
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return (total, outputs) if return_outputs else total

    def _scales(self, labels: Tensor, items: Tensor | int | None) -> tuple[Tensor | float, float]:
        """The factor of a sum over this batch's labels, and the batch's weight in the mean of a step."""
        if items is not None and (self.model_accepts_loss_kwargs or self.compute_loss_func):
            averaged = self.args.average_tokens_across_devices  # over processes, like their gradients
            factor = self.accelerator.num_processes // self.get_tp_size() if averaged else 1
            return factor / items, 1.0
        counted = labels[:, 1:] if self.task == "causal-lm" else labels
        steps = getattr(self, "current_gradient_accumulation_steps", 1)  # it is missing before a run
        return 1 / (counted != IGNORED).sum().clamp_min(1), 1 / steps

    def _distillation(self, outputs: Any, taught: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The distillation losses that are asked for, as sums over the labels that count."""
        labels: Tensor = inputs["labels"]
        if self.task == "causal-lm":
            valid = next_token_mask(labels)
            weights = valid.float()
        elif labels.ndim == 1 and not labels.is_floating_point():
            valid = labels != IGNORED
            weights = row_weights(labels, inputs.get("attention_mask"))
        else:
            raise ValueError(
                f"expected one class per example to distill from, got {labels.dtype} labels {tuple(labels.shape)}"
            )
        sums: dict[str, Tensor] = {}
        if self.args.distill_logits:
            temperature = self.args.temperature
            sums["logits"] = distill_logits(outputs["logits"], taught["logits"], valid, temperature=temperature)
        if self.args.distill_hidden:
            sums["hidden"] = distill_hidden(outputs["hidden_states"], taught["hidden_states"], weights)
        return sums

    @property
    def losses(self) -> LossSums:
        """The sums of the losses that are to be logged."""
        return next(one for one in self.callback_handler.callbacks if isinstance(one, LossSums))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Train on a batch, and note its loss.

        Args:
            model: The network, possibly wrapped.
            inputs: The batch.
            num_items_in_batch: The number of labels of the whole step.

        Returns:
            The loss.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        broken = self.args.logging_nan_inf_filter and not bool(loss.isfinite())
        self.losses.add({"loss": loss if not broken else self.losses.usual(self.state.global_step)})
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with losses over all steps that they stand for, and the terms of the loss before they are weighted.

        Args:
            logs: The values to log, by name.
            start_time: The time at which the training began.
        """
        if "loss" in logs and self.state.global_step > self.losses.logged:
            logs |= self.losses.take(self.state.global_step, self.accelerator.gather)
        if "train_loss" in logs:
            logs["train_loss"] = self.losses.mean(self.state.global_step)
        super().log(logs, start_time)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:  # from the last checkpoint ``Trainer`` would take one step more than it was told to
            self.control.should_training_stop = True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if isinstance(self.model, PreTrainedModel) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            load_tensors_(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if isinstance(self.model, PreTrainedModel) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            load_tensors_(self.model, str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()


def load_tensors_(model: PreTrainedModel, folder: str) -> None:
    """Give a network the tensors of a checkpoint as ``from_pretrained`` reads it, in place.

    Args:
        model: The network.
        folder: The folder of the checkpoint.

    Raises:
        ValueError: If the checkpoint does not have the tensors of the network.
    """
    loaded: Any = type(model).from_pretrained(
        folder, dtype=model.dtype, output_loading_info=True, **_sharding_of(model)
    )
    saved, found = loaded
    wrong = {kind: sorted(found[kind]) for kind in ("missing_keys", "unexpected_keys") if found[kind]}
    if wrong:
        raise ValueError(f"expected a checkpoint with the tensors of the model in {folder!r}, got {wrong}")
    model.load_state_dict(saved.state_dict())


def sums_its_loss(model: nn.Module) -> bool:
    """Whether the model divides its loss by the number of labels of the whole step, if it is told this number.

    ``Trainer`` assumes it of every model whose ``forward`` takes any keyword arguments. But only the losses that
    transformers dispatches through ``loss_function`` do it, except those for regression and for several classes at
    once; with gradient accumulation the gradients of BERT's classifiers would be too large by the number of batches.

    Args:
        model: A model of transformers.

    Returns:
        Whether it does.
    """
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    means = problem in ("regression", "multi_label_classification")
    return code is not None and "loss_function" in code.co_names and not means


def _sharding_of(model: nn.Module) -> dict[str, Any]:
    """The arguments with which ``from_pretrained`` shards another model in the same way as this one."""
    if not isinstance(model, PreTrainedModel) or not model.is_distributed_loading_by_transformers:
        return {}
    config: Any = model.config
    return {"distributed_config": config.distributed_config}
