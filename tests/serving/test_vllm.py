"""The vLLM plugin: greedy tokens equal those of transformers. It needs an environment with vLLM, see CONTRIBUTING."""

import json
from pathlib import Path

import pytest
import torch

vllm = pytest.importorskip("vllm")

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402

from structmat import Blast, LowRank, apply_plan_, quantize_  # noqa: E402
from structmat.formats import Dense, Format  # noqa: E402
from structmat.integrations.vllm.layers import StructmatConfig, StructuredMethod  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of vLLM
NEW = 16


def checkpoint(folder: Path, quantised: bool) -> None:
    """A Llama whose merged layers have parts of several formats and ranks, one of them dense."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    )
    plan: dict[str, Format] = {}
    for layer in ("model.layers.0.", "model.layers.1."):
        plan[layer + "self_attn.q_proj"] = Blast(128, 128, (4, 4), 40)
        plan[layer + "self_attn.k_proj"] = LowRank(64, 128, 20)
        plan[layer + "self_attn.o_proj"] = Blast(128, 128, (4, 4), 30)
        plan[layer + "mlp.gate_proj"] = Blast(256, 128, (4, 4), 50)
        plan[layer + "mlp.up_proj"] = Blast(256, 128, (4, 4), 40)
        plan[layer + "mlp.down_proj"] = Blast(128, 256, (4, 4), 44)
    apply_plan_(model.eval(), plan)
    if quantised:
        quantize_(model)
    model.save_pretrained(folder)


@pytest.mark.parametrize(("quantised", "eager"), [(False, True), (True, True), (False, False)])
def test_greedy_tokens_equal_those_of_transformers(
    quantised: bool, eager: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    checkpoint(tmp_path, quantised)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 256, (9 + k % 5,), generator=generator) for k in range(20)]
    expected = [
        model.generate(
            prompt[None],
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    engine = vllm.LLM(
        str(tmp_path), skip_tokenizer_init=True, dtype="float32", max_model_len=128, max_num_seqs=4, enforce_eager=eager
    )
    sampling = vllm.SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": prompt.tolist()} for prompt in prompts], sampling)
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected


def method(formats: list[Format | None]) -> tuple[StructuredMethod, torch.nn.Module]:
    made, layer = StructuredMethod("a.qkv_proj", ["a.q_proj", "a.k_proj"][: len(formats)], formats), torch.nn.Module()
    made.create_weights(layer, 16, [16, 8][: len(formats)], 16, sum([16, 8][: len(formats)]), torch.float32)
    return made, layer


def test_parts_lie_in_flat_parameters() -> None:
    formats = [Blast(16, 16, (2, 2), 5), None]
    made, layer = method(formats)
    factors = [formats[0].init(), Dense(8, 16).init()]
    with pytest.raises(ValueError, match=r"expected values for a\.k_proj\.weight, a\.q_proj\.diag"):
        made.process_weights_after_loading(layer)
    for shard, own in zip(("q", "k"), factors, strict=True):
        for name, factor in own.items():
            layer.get_parameter(name).weight_loader(layer.get_parameter(name), factor, shard)
    layer.get_parameter("weight").weight_loader(layer.get_parameter("weight"), torch.zeros(1), "q")  # the byte
    made.process_weights_after_loading(layer)
    x = torch.randn(3, 16)
    expected = [formats[0].matmul(x, factors[0]), x @ factors[1]["weight"].mT]
    torch.testing.assert_close(made.apply(layer, x), torch.cat(expected, -1))
    with pytest.raises(ValueError, match=r"expected 'left' of layer 'a.q_proj' with shape \(16, 5\), got \(1,\)"):
        layer.get_parameter("left").weight_loader(layer.get_parameter("left"), torch.zeros(1), "q")


def test_what_cannot_be_served() -> None:
    made = StructuredMethod("a", ["a"], [Blast(16, 16, (2, 2), 5)])
    with pytest.raises(ValueError, match="expected layer 'a' whole, got a part of it"):
        made.create_weights(torch.nn.Module(), 8, [16], 16, 16, torch.float32)
    with pytest.raises(ValueError, match=r"expected layer 'a' of shape \(8, 16\), but the checkpoint says Blast"):
        made.create_weights(torch.nn.Module(), 16, [8], 16, 8, torch.float32)
    config = {"layers": {"a": Blast(16, 16, (2, 2), 5).to_json()}, "ties": {"b": "a"}}
    with pytest.raises(ValueError, match=r"expected layers with factors of their own for vLLM, got \['b'\]"):
        StructmatConfig.from_config(json.loads(json.dumps(config)))
