"""Weights that are not where a module lies: offloaded to the CPU or a disk, or adapted one parameter at a time."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from tiny_models import make_bert, make_gpt2, make_gptj, make_student, make_teacher, perturb
from transformers import AutoModel, AutoModelForCausalLM

MECHANISMS = {
    "linear": {"type": "linear", "window": 5, "sinks": 2, "bias": True},
    "linear_published": {"type": "linear", "window": 5, "window_weight_form": "sigmoid", "window_weight": 0.1},
    "cosine": {"type": "cosine", "window": 5, "sinks": 2},
    "cosine_mapped": {"type": "cosine", "window": 5, "sinks": 2, "feature_map": "projection", "bias": True},
    "cosine_features": {"type": "cosine", "window": 0, "sinks": 0, "feature_map": "softmax"},
    "gain_cell": {"type": "gain_cell", "window": 64},
    "landmark": {"type": "landmark", "block_size": 4, "top_k": 2},
    "landmark_published": {
        "type": "landmark", "block_size": 4, "top_k": 2, "landmark_key": "token", "include_landmark_in_loss": True,
    },
}  # fmt: skip
MAKERS = {"llama": make_teacher, "gpt2": make_gpt2, "gptj": make_gptj}
IDS = torch.arange(3, 45).view(2, 21)
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # inside peft 0.21


def make(backbone, mechanism):
    model = make_student(MAKERS[backbone](), {mechanism: MECHANISMS[mechanism]})
    perturb(model)
    return model


def behaviour(model):
    """Logits, the loss, and what a cache gives."""
    with torch.no_grad():
        output = model(IDS, labels=IDS)
    tokens = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=9, do_sample=False)
    return output.logits, output.loss, tokens


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("backbone", MAKERS)
def test_offloaded_weights_give_the_same(backbone, mechanism, tmp_path):
    model = make(backbone, mechanism)
    expected = behaviour(model)
    model.save_pretrained(tmp_path / "saved")
    places = {name: "cpu" for name, _ in model.base_model.named_children() if name not in ("layers", "h")}
    layers = {f"{model.layers_path}.{i}": "disk" if i else "cpu" for i in range(3)}
    places = {f"{model.base_model_prefix}.{name}": place for name, place in {**places, **layers}.items()}
    places |= {"lm_head": "cpu"} if backbone != "gpt2" else {"lm_head": places["transformer.wte"]}
    on_disk = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", device_map=places, offload_folder=tmp_path / "disk"
    )
    assert {x.device.type for x in on_disk.mixer_attentions()[2].parameters()} == {"meta"} or (
        backbone != "llama"  # constants of GPT-2
    )
    in_memory = cpu_offload(copy.deepcopy(model), execution_device="cpu")
    assert in_memory.get_input_embeddings().weight.device.type == "meta"
    for found in (behaviour(on_disk), behaviour(in_memory)):
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    if mechanism.startswith("linear"):
        with pytest.raises(ValueError, match="device map has offloaded weights"), on_disk.captured_decoding():
            pass


@pytest.mark.parametrize("mechanism", ["linear", "cosine_mapped"])
@torch.no_grad()
def test_an_offloaded_encoder(mechanism, tmp_path):
    model = make_student(make_bert(), {mechanism: MECHANISMS[mechanism]})
    perturb(model)
    expected = model(IDS).last_hidden_state
    model.save_pretrained(tmp_path / "saved")
    places = {"embeddings": "cpu", "encoder": "disk", "pooler": "cpu"}
    parts = AutoModel.from_pretrained(tmp_path / "saved", device_map=places, offload_folder=tmp_path / "disk")
    assert torch.equal(parts(IDS).last_hidden_state, expected)
    assert torch.equal(cpu_offload(model, execution_device="cpu")(IDS).last_hidden_state, expected)


@pytest.mark.parametrize(
    "mechanism, target",
    [
        ("linear", "feature_map_q.weight"),
        ("linear", "feature_map_k.magnitude"),
        ("cosine_mapped", "feature_map_k.weight"),
        ("cosine_features", "feature_map_q.weight"),
        ("landmark", "keys.mix"),
    ],
)
def test_an_adapter_of_a_parameter_counts(mechanism, target):
    """peft's `target_parameters`: the adapted parameter is the one that is read, it trains, and merges."""
    adapted = get_peft_model(make("llama", mechanism), LoraConfig(target_parameters=[target], target_modules=[], r=2))
    adapted.eval()
    with torch.no_grad():
        before = adapted(IDS).logits
    output = adapted(IDS, labels=IDS)
    output.loss.backward()
    gradients = [x.grad for name, x in adapted.named_parameters() if "lora_B" in name]
    assert len(gradients) == 3 and all(x is not None and x.any() for x in gradients)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
        after = adapted(IDS).logits
        tokens = adapted.generate(input_ids=IDS, max_new_tokens=5, do_sample=False)
        merged = adapted.merge_and_unload()
        assert (after - before).abs().max() > 1e-3
        torch.testing.assert_close(merged(IDS).logits, after, atol=1e-5, rtol=1e-5)
        assert torch.equal(merged.generate(IDS, max_new_tokens=5, do_sample=False), tokens)


@pytest.mark.parametrize("part", ["window_mix", "scales", "query_scaler", "mixer"])
def test_a_copy_that_an_adapter_saves_counts(part):
    """peft's `modules_to_save` of any part of a mechanism: the copy is read, and with the adapter off the original."""
    mechanism = {"window_mix": "linear", "scales": "cosine", "query_scaler": "gain_cell"}.get(part, "landmark")
    model = make("llama", mechanism)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=[part])).eval()
    with torch.no_grad():
        before = adapted(IDS).logits
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.3)
        assert (adapted(IDS).logits - before).abs().max() > 1e-3
        with adapted.disable_adapter():
            assert torch.equal(adapted(IDS).logits, before)
