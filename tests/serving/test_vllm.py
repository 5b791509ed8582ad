"""The vLLM plugin: greedy tokens equal those of transformers. It needs an environment with vLLM, see CONTRIBUTING."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

vllm = pytest.importorskip("vllm", reason="vLLM has an environment of its own, see CONTRIBUTING")

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402

from structmat import Blast, BlockDiagonal, LowRank, apply_plan_, quantize_  # noqa: E402
from structmat.formats import Dense, Format  # noqa: E402
from structmat.integrations.vllm.layers import StructmatConfig, StructuredMethod  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of vLLM
NEW = 16
SHORT = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 4}
FAMILIES = ("llama", "qwen2", "qwen3", "mistral")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One process where one is enough: each takes long to start."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    yield
    cleanup_dist_env_and_memory()


def checkpoint(folder: Path, family: str = "llama", integers: str = "", head: bool = False) -> None:
    """A network whose merged layers have parts of several formats and ranks, one of them dense."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=250 if head else 256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.05)
    plan: dict[str, Format] = {"lm_head": Blast(250, 128, (2, 4), 40)} if head else {}
    for layer in ("model.layers.0.", "model.layers.1."):
        plan[layer + "self_attn.q_proj"] = Blast(128, 128, (4, 4), 40)
        plan[layer + "self_attn.k_proj"] = LowRank(64, 128, 40)  # half of its rows have no rank of 40
        plan[layer + "self_attn.o_proj"] = Blast(128, 128, (1, 1), 30)
        plan[layer + "mlp.gate_proj"] = Blast(256, 128, (4, 4), 50)
        plan[layer + "mlp.up_proj"] = Blast(256, 128, (4, 4), 40)
        plan[layer + "mlp.down_proj"] = Blast(128, 256, (4, 4), 44)
    apply_plan_(model, plan)
    if integers:
        quantize_(model, integers)
    model.save_pretrained(folder)


def greedy(model: PreTrainedModel, prompt: torch.Tensor) -> list[int]:
    """What transformers generates."""
    mask = torch.ones(1, len(prompt), dtype=torch.int64)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(prompt[None], attention_mask=mask, **options)[0, len(prompt) :].tolist()


def served(folder: Path, prompts: list[torch.Tensor], **options: Any) -> list[list[int]]:
    """What vLLM generates."""
    engine = vllm.LLM(str(folder), skip_tokenizer_init=True, **{**SHORT, "enforce_eager": True, **options})
    sampling = vllm.SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": prompt.tolist()} for prompt in prompts], sampling)
    engine.llm_engine.engine_core.shutdown()
    del engine
    return [list(output.outputs[0].token_ids) for output in outputs]


def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 250, (9 + k % 5,), generator=generator) for k in range(20)]


@pytest.mark.parametrize(
    ("family", "made", "options"),
    [
        *(pytest.param(family, {}, {}, id=family) for family in FAMILIES),
        pytest.param("llama", {"head": True}, {}, id="head"),
        pytest.param("llama", {"integers": "int8"}, {}, id="int8"),
        pytest.param("qwen2", {"integers": "int4"}, {}, id="int4"),
        pytest.param("llama", {}, {"enforce_eager": False}, id="compiled"),
        pytest.param("qwen3", {}, {"model_impl": "transformers"}, id="its models"),
        pytest.param("llama", {}, {"additional_config": {"structmat_autotune": [1, 4, 16]}}, id="autotuned"),
        pytest.param("qwen2", {}, {"tensor_parallel_size": 2}, id="two processes"),
        pytest.param("llama", {"integers": "int4"}, {"tensor_parallel_size": 2}, id="two processes, int4"),
    ],
)
def test_greedy_tokens_equal_those_of_transformers(
    family: str, made: dict[str, Any], options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "tensor_parallel_size" in options:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    checkpoint(tmp_path, family, **made)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    expected = [greedy(model, prompt) for prompt in prompts()]
    assert len({tuple(tokens) for tokens in expected}) > 10
    assert served(tmp_path, prompts(), **options) == expected


def test_bfloat16_is_as_close_as_transformers(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    exact = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    engine = vllm.LLM(str(tmp_path), skip_tokenizer_init=True, **{**SHORT, "dtype": "bfloat16"}, enforce_eager=True)
    sampling = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": prompt.tolist()} for prompt in prompts()], sampling)
    errors: dict[str, list[float]] = {"vllm": [], "transformers": []}
    for prompt, output in zip(prompts(), outputs, strict=True):
        found = [next(iter(one.values())).logprob for one in output.prompt_logprobs[1:]]
        with torch.no_grad():
            truth, theirs = (
                model(prompt[None]).logits[0, :-1].float().log_softmax(-1).gather(1, prompt[1:, None])[:, 0]
                for model in (exact, rounded)
            )
        errors["vllm"] += (torch.tensor(found) - truth).abs().tolist()
        errors["transformers"] += (theirs - truth).abs().tolist()
    ours, theirs = (sum(found) / len(found) for found in errors.values())
    assert 0 < ours < 1.5 * theirs


WORDS = [f"w{k}" for k in range(253)]
TEMPLATE = "{% for message in messages %}<s> {{ message['content'] }} {% endfor %}"


def test_the_server_answers_a_chat(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    vocabulary = Tokenizer(models.WordLevel({w: k for k, w in enumerate(["<unk>", "<s>", "</s>", *WORDS])}, "<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "128"]
    chat = [{"role": "user", "content": " ".join(WORDS[5:20])}]
    log = tmp_path / "server.log"
    with log.open("w") as output:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            answer = asked(
                port, {"model": str(tmp_path), "messages": chat, "max_tokens": NEW, "temperature": 0}, server
            )
        finally:
            server.terminate()
            server.wait(60)
    assert answer is not None, log.read_text()[-3000:]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    prompt = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)["input_ids"][0]
    expected = greedy(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), prompt)
    expected = expected[: expected.index(2)] if 2 in expected else expected
    assert answer["choices"][0]["message"]["content"] == tokenizer.decode(expected)


def asked(port: int, body: dict[str, Any], server: "subprocess.Popen[bytes]") -> Any:
    """What a server answers, as soon as it does; None if it stops or does not start within five minutes."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    for _ in range(300):
        if server.poll() is not None:
            return None
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError:
            raise
        except OSError:
            time.sleep(1)
    return None


class Layer(torch.nn.Module):
    """What a layer of vLLM says about the devices that share it."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        super().__init__()
        self.tp_rank, self.tp_size = rank, size


def method(formats: list[Format | None], layer: torch.nn.Module) -> StructuredMethod:
    made = StructuredMethod("a.qkv_proj", ["a.q_proj", "a.k_proj"][: len(formats)], formats)
    made.create_weights(layer, 16, [16, 8][: len(formats)], 16, sum([16, 8][: len(formats)]), torch.float32)
    return made


def load(layer: torch.nn.Module, name: str, value: torch.Tensor, shard: str) -> None:
    parameter = layer.get_parameter(name)
    parameter.weight_loader(parameter, value, shard)


def test_parts_have_parameters_of_their_own() -> None:
    formats, layer = [Blast(16, 16, (2, 2), 5), None], Layer()
    made = method(formats, layer)
    factors = [formats[0].init(), Dense(8, 16).init()]
    with pytest.raises(ValueError, match=r"expected values for a\.k_proj\.weight, a\.q_proj\.diag"):
        made.process_weights_after_loading(layer)
    for shard, own in zip(("q", "k"), factors, strict=True):
        for name, factor in own.items():
            load(layer, name, factor, shard)
    load(layer, "weight", torch.zeros(1), "q")  # the byte
    made.process_weights_after_loading(layer)
    x = torch.randn(3, 16)
    expected = [formats[0].matmul(x, factors[0]), x @ factors[1]["weight"].mT]
    torch.testing.assert_close(made.apply(layer, x), torch.cat(expected, -1))
    with pytest.raises(ValueError, match=r"expected 'left' of layer 'a.q_proj' with shape \(16, 5\), got \(1,\)"):
        load(layer, "left", torch.zeros(1), "q")


def test_what_cannot_be_served() -> None:
    whole = StructuredMethod("a", ["a"], [Blast(16, 16, (2, 2), 5)])
    with pytest.raises(ValueError, match=r"expected layer 'a' of shape \(8, 16\), but the checkpoint says Blast"):
        whole.create_weights(Layer(), 16, [8], 16, 8, torch.float32)
    fused = StructuredMethod("a", ["a"], [Blast(32, 16, (2, 2), 5)])
    with pytest.raises(ValueError, match=r"expected layer 'a' on one device, since its matrix holds those of several"):
        fused.create_weights(Layer(0, 2), 16, [8, 8], 16, 32, torch.float32)
    config = {"layers": {"a": Blast(16, 16, (2, 2), 5).to_json()}, "ties": {"b": "a"}}
    with pytest.raises(ValueError, match=r"expected layers with factors of their own for vLLM, got \['b'\]"):
        StructmatConfig.from_config(json.loads(json.dumps(config)))


def test_a_matrix_that_cannot_be_cut_is_refused() -> None:
    cut = StructuredMethod("a", ["a"], [BlockDiagonal(16, 16, 2)])
    with pytest.raises(
        ValueError, match=r"layer 'a': expected a matrix that can be cut .*; use --tensor-parallel-size 1"
    ):
        cut.create_weights(Layer(0, 2), 16, [8], 16, 16, torch.float32)
