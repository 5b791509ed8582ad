"""What two processes under torchrun do for ``test_distributed_training.py``: train replicated, then sharded.

Usage: ``distributed_run.py FOLDER``, which has ``student``, ``teacher`` and ``learning`` (one whose structure is
learned); writes ``ddp``, ``fsdp``, ``again`` and ``learning-ddp``, ``learning-fsdp`` there.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from training import tiny

from structmat.integrations.transformers.retraining import retrain  # isort: skip
from torch.distributed.tensor import DTensor  # isort: skip
from transformers.distributed.configuration_utils import DistributedConfig  # isort: skip

OPTIONS = {
    "optim": "sgd", "learning_rate": 0.3, "max_steps": 3, "weight_decay": 0.1, "distill_logits": 0.7,
    "distill_hidden": 0.3, "logging_steps": 3,
}  # fmt: skip
"""Of the runs here and of the one in a single process that they must equal."""

STRUCTURE = {
    "optim": "sgd", "learning_rate": 0.1, "max_steps": 4, "structure_target": 0.5, "structure_shrinkage": 0.5,
    "structure_learning_rate": 2e-2, "logging_steps": 4,
}  # fmt: skip
"""Of the runs that learn a structure."""

SHARE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
"""The part of a batch of four that each of two processes takes at a time."""


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    load = tiny.transformers.AutoModelForCausalLM.from_pretrained

    args = tiny.arguments(folder / "ddp", teacher=str(folder / "teacher"), **OPTIONS, **SHARE)
    run = tiny.trainer("causal-lm", args, model=load(folder / "student"))
    run.train()
    run.save_model()
    facts = {
        "processes": run.accelerator.num_processes,
        "wrapper": type(run.model_wrapped).__name__,
        "teacher": type(run.teacher).__name__,
        "ddp": run.state.log_history[0],
    }

    config = DistributedConfig(fsdp_size=2)
    args = tiny.arguments(folder / "fsdp", teacher=str(folder / "teacher"), **OPTIONS, **SHARE)
    run = tiny.trainer("causal-lm", args, model=load(folder / "student", distributed_config=config))
    facts["sharded"] = [
        all(isinstance(parameter, DTensor) for parameter in network.parameters())
        for network in (run.model, run.teacher)
    ]
    run.train()
    run.save_model()
    facts["fsdp"] = run.state.log_history[0]

    for kind, options in {"ddp": {}, "fsdp": {"distributed_config": config}}.items():
        args = tiny.arguments(folder / f"learning-{kind}", **STRUCTURE, **SHARE)
        run = tiny.trainer("causal-lm", args, model=load(folder / "learning", **options))
        run.train()
        run.save_model()
        facts[f"learning-{kind}"] = run.state.log_history[0]

    model = load(folder / "ddp", distributed_config=config)
    texts = tiny.sentences(12)
    facts["again"] = retrain(model, tiny.tokenizer(), texts, texts, tiny.arguments(folder / "again"), length=32)
    load(folder / "again")  # complete for every process
    if dist.get_rank() == 0:
        (folder / "facts.json").write_text(json.dumps(facts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
