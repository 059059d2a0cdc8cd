"""What is more or less than a known graph keeps its own forward pass, and the reason says why."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaMLP

from tests.engine.fused.models import CONTEXT, make_model
from vmalloc.engine import LLM, ConfigError, SamplingParams
from vmalloc.engine.fused.choice import check_against
from vmalloc.engine.fused.recognise import recognise
from vmalloc.kernels.decoder_spec import DecoderSpec


class OwnLinear(nn.Linear):
    """What an adapter or a quantiser puts in the place of a Linear."""


class OwnTensor(torch.Tensor):
    """A weight that is no plain memory."""


class OwnLlama(LlamaForCausalLM):
    """A subclass may do anything."""


class OwnMlp(LlamaMLP):
    """The modules of a known graph, computed in another way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2.0


def own_linear(model: Any) -> None:
    attention = model.model.layers[1].self_attn
    linear = OwnLinear(48, 48, bias=False)
    linear.weight = attention.q_proj.weight
    attention.q_proj = linear.eval()


def own_tensor(model: Any) -> None:
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(weight.data.as_subclass(OwnTensor))


def own_class(model: Any) -> None:
    model.__class__ = OwnLlama


def own_mlp(model: Any) -> None:
    model.model.layers[2].mlp.__class__ = OwnMlp


def own_forward(model: Any) -> None:
    norm = model.model.norm
    norm.forward = norm.forward


def hook(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output + 1.0)


def pre_hook(model: Any) -> None:
    model.model.register_forward_pre_hook(lambda module, args: None)


def training_part(model: Any) -> None:
    model.model.layers[1].train()


def other_activation(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.ReLU().eval()


def one_other_activation(model: Any) -> None:
    model.model.layers[1].mlp.act_fn = nn.GELU(approximate="tanh").eval()


def another_part(model: Any) -> None:
    model.model.layers[0].adapter = nn.Identity().eval()


def renormalising_embedding(model: Any) -> None:
    model.model.embed_tokens.max_norm = 1.0


def bfloat16_norm(model: Any) -> None:
    norm = model.model.layers[0].input_layernorm
    norm.weight = nn.Parameter(norm.weight.to(torch.bfloat16))


class Wrapper(nn.Module):
    """A module around another one, as those that steer a layer's output have it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class PickyActivation(nn.Module):
    """One that takes batches of rows only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 3:
            raise ValueError(f"x has {x.dim()} dimensions")
        return nn.functional.silu(x)


def wrapped_layer(model: Any) -> None:
    model.model.layers[1] = Wrapper(model.model.layers[1]).eval()


def picky_activation(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = PickyActivation().eval()


CHANGES: dict[Callable[[Any], None], str] = {
    own_linear: "q_proj is a OwnLinear, not a Linear",
    own_tensor: "up_proj.weight is a OwnTensor, not a plain tensor",
    own_class: "OwnLlama is not among the module graphs it knows",
    own_mlp: r"layers\[2\].mlp is a OwnMlp",
    own_forward: "norm has a forward of its own",
    hook: r"layers\[0\].mlp has a hook",
    pre_hook: "model has a hook",
    training_part: r"layers\[1\].mlp is in training mode",
    other_activation: "act_fn is a ReLU, neither SiLU nor tanh GELU",
    one_other_activation: "its layers have different activations",
    another_part: "is made of .*adapter.*, which is no known graph",
    renormalising_embedding: "embed_tokens is a Embedding",
    bfloat16_norm: "weight is torch.bfloat16, not torch.float32",
    wrapped_layer: r"layers\[1\] is a Wrapper",
    picky_activation: "act_fn is a PickyActivation, which raised ValueError: x has 1 dimensions",
}


@pytest.mark.parametrize(
    ("change", "reason"), CHANGES.items(), ids=[change.__name__ for change in CHANGES]
)
def test_a_changed_module_is_named(change: Any, reason: str, probe: Any) -> None:
    model = copy.deepcopy(make_model("llama"))
    probed = probe(model)  # before: the change itself may be more than the probe lets pass
    assert isinstance(recognise(model, probed.probed.attention, CONTEXT), DecoderSpec)
    change(model)
    found = recognise(model, probed.probed.attention, CONTEXT)
    assert isinstance(found, str)
    assert re.search(reason, found), found


def identity_norm(model: Any) -> None:
    model.model.layers[0].self_attn.q_norm = nn.Identity().eval()


def other_dropout(model: Any) -> None:
    model.model.layers[0].resid_mlp_dropout = nn.Identity().eval()


def hook_on_dropout(model: Any) -> None:
    model.model.layers[2].resid_attn_dropout.register_forward_hook(lambda module, args, out: out)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("qwen3", identity_norm, r"self_attn.q_norm is a Identity, not a Qwen3RMSNorm"),
        ("phi3", other_dropout, r"layers\[0\].resid_mlp_dropout is a Identity, not a Dropout"),
        ("phi3", hook_on_dropout, r"layers\[2\].resid_attn_dropout has a hook"),
    ],
)
def test_parts_that_only_some_graphs_have(name: str, change: Any, reason: str, probe: Any) -> None:
    model = copy.deepcopy(make_model(name))
    change(model)
    found = recognise(model, probe(model).probed.attention, CONTEXT)
    assert isinstance(found, str)
    assert re.search(reason, found), found


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    model = make_model("gemma2")
    prompt: Any = {"prompt_token_ids": [3, 1, 4, 1, 5]}
    params = SamplingParams(temperature=0.0, max_tokens=6, prompt_logprobs=2)
    written = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            with LLM(model, fused="on", max_num_seqs=2) as llm:
                output = llm.generate(prompt, params, use_tqdm=False)[0]
        finally:
            torch.set_default_dtype(torch.float32)
        written.append((output.outputs[0].token_ids, output.prompt_logprobs))
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("owner", "name", "reason"),
    [
        (modeling_llama.LlamaMLP, "forward", r"mlp is a LlamaMLP, whose forward was replaced"),
        (modeling_llama.LlamaModel, "forward", "model is a LlamaModel, whose forward was replaced"),
        (modeling_llama, "apply_rotary_pos_emb", r"llama\.apply_rotary_pos_emb was replaced"),
    ],
)
def test_patched_classes_are_seen(
    owner: Any, name: str, reason: str, probe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed = probe(copy.deepcopy(make_model("llama")))
    original = getattr(owner, name)

    @functools.wraps(original)  # and looks like it
    def patched(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, patched)
    found = recognise(probed.model, probed.probed.attention, CONTEXT)
    assert isinstance(found, str)
    assert re.search(reason, found), found


class OwnSilu(nn.Module):
    """Somebody's class for what everybody calls SiLU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(x)


def test_an_activation_of_another_class_is_known_by_its_answers(probe: Any) -> None:
    model = copy.deepcopy(make_model("llama"))
    for layer in model.model.layers:
        layer.mlp.act_fn = OwnSilu().eval()
    spec = recognise(model, probe(model).probed.attention, CONTEXT)
    assert isinstance(spec, DecoderSpec)
    assert spec.activation == "silu"


def test_hooks_on_every_module_are_seen(probe: Any) -> None:
    probed = probe(copy.deepcopy(make_model("llama")))
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        found = recognise(probed.model, probed.probed.attention, CONTEXT)
    finally:
        handle.remove()
    assert found == "torch has global forward hooks"


def test_hooks_that_only_note_outputs_are_harmless(probe: Any) -> None:
    model = copy.deepcopy(make_model("llama"))
    model(torch.tensor([[1, 2]]), output_hidden_states=True)  # transformers leaves them behind
    assert any(layer._forward_hooks for layer in model.model.layers)
    assert isinstance(recognise(model, probe(model).probed.attention, CONTEXT), DecoderSpec)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "starcoder2", "gpt-oss", "cohere"])
def test_other_graphs_keep_their_own_forward(name: str, tiny_model: Any) -> None:
    model = tiny_model(name)
    with LLM(model) as llm:
        assert llm.engine.forward_name == "model"
        reason = llm.engine.fused_refusal
    assert reason == f"{type(model).__name__} is not among the module graphs it knows"
    with pytest.raises(ConfigError, match=f"fused is 'on'; {type(model).__name__} cannot be fused"):
        LLM(model, fused="on")


def test_settings_decide() -> None:
    model = make_model("llama")
    with LLM(model, fused="off") as llm:
        assert llm.engine.fused_refusal == "fused is 'off'"
    with pytest.raises(ConfigError, match="fused is 'maybe'; supported: auto, on, off"):
        LLM(model, fused="maybe")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"fused is 'on'; .* cannot be fused: compile is True"):
        LLM(model, fused="on", compile=True)


def test_a_model_in_bfloat16_keeps_its_own_forward() -> None:
    model = copy.deepcopy(make_model("llama")).to(torch.bfloat16)
    with LLM(model) as llm:
        reason = llm.engine.fused_refusal
    assert reason is not None
    assert "is torch.bfloat16, not torch.float32" in reason


def test_a_bfloat16_checkpoint_is_loaded_in_float32_and_fused(tmp_path: Any) -> None:
    copy.deepcopy(make_model("llama")).to(torch.bfloat16).save_pretrained(tmp_path)
    with LLM(str(tmp_path), skip_tokenizer_init=True, fused="on") as llm:
        assert llm.engine.backend.config.layers[0].dtype == "float32"


def replaced_layer(spec: DecoderSpec, **changes: Any) -> DecoderSpec:
    layers = list(spec.layers)
    layers[1] = dataclasses.replace(layers[1], **changes)
    return dataclasses.replace(spec, layers=tuple(layers))


def swapped_gate(spec: DecoderSpec) -> DecoderSpec:
    return replaced_layer(spec, gate=spec.layers[1].up, up=spec.layers[1].gate)


def no_query_bias(spec: DecoderSpec) -> DecoderSpec:
    return replaced_layer(spec, query=dataclasses.replace(spec.layers[1].query, bias=None))


def wrong_scale(spec: DecoderSpec) -> DecoderSpec:
    return replaced_layer(spec, softmax_scale=spec.layers[1].softmax_scale * 1.01)


def short_window(spec: DecoderSpec) -> DecoderSpec:
    return replaced_layer(spec, window=5)


def no_rope(spec: DecoderSpec) -> DecoderSpec:
    return replaced_layer(spec, rope_idx=None)


def turned_rope(spec: DecoderSpec) -> DecoderSpec:
    return dataclasses.replace(spec, ropes=tuple(table.flip(1).clone() for table in spec.ropes))


def wrong_norm(spec: DecoderSpec) -> DecoderSpec:
    return dataclasses.replace(spec, final_norm=dataclasses.replace(spec.final_norm, offset=1.0))


def half_residual(spec: DecoderSpec) -> DecoderSpec:
    return dataclasses.replace(spec, residual_multiplier=0.5)


def other_activation_of_spec(spec: DecoderSpec) -> DecoderSpec:
    return dataclasses.replace(spec, activation="gelu_tanh")


BROKEN = [
    swapped_gate,
    no_query_bias,
    wrong_scale,
    short_window,
    no_rope,
    turned_rope,
    wrong_norm,
    half_residual,
    other_activation_of_spec,
]


@pytest.mark.parametrize("broken", BROKEN, ids=[broken.__name__ for broken in BROKEN])
def test_a_wrong_spec_is_refused_by_its_logits(broken: Any, probe: Any) -> None:
    probed = probe(copy.deepcopy(make_model("llama-biases-tied")))
    spec = recognise(probed.model, probed.probed.attention, CONTEXT)
    assert isinstance(spec, DecoderSpec)
    assert not isinstance(check_against(spec, probed.model, probed.probed, probed.caches), str)
    found = check_against(broken(spec), probed.model, probed.probed, probed.caches)
    assert isinstance(found, str)
    assert found.startswith("its fused logits differ by ")


def test_a_spec_whose_shapes_do_not_fit_is_refused(probe: Any) -> None:
    probed = probe(copy.deepcopy(make_model("llama")))
    spec = recognise(probed.model, probed.probed.attention, CONTEXT)
    assert isinstance(spec, DecoderSpec)
    wrong = replaced_layer(spec, down=spec.layers[1].up)
    found = check_against(wrong, probed.model, probed.probed, probed.caches)
    assert found == "layers[1].down.out_features is 64, must be 48"


def test_weights_written_in_place_are_seen_in_the_next_step() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=8)
    prompt: Any = {"prompt_token_ids": [3, 1, 4, 1, 5]}
    model = copy.deepcopy(make_model("llama"))
    torch.manual_seed(1)
    other = hf.LlamaForCausalLM(model.config).eval()

    def written(llm: LLM) -> list[int]:
        return llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids

    settings: dict[str, Any] = {"fused": "on", "enable_prefix_caching": False}
    with LLM(copy.deepcopy(other), **settings) as llm:
        expected = written(llm)
    with LLM(model, **settings) as llm:
        before = written(llm)
        model.load_state_dict(other.state_dict())
        assert written(llm) == expected != before
