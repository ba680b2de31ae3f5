"""Repositories of earlier contracts: they load and give the numbers that they were saved with.

`contract_1` was saved by the tree before contract 2 of hybrid linear attention, without its code files, with what it
gave on the spot in `expected.safetensors`.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import linearize.modeling.attention_linear as attention_linear
from linearize.modeling import LinearAttentionConfig
from linearize.modeling.op_hybrid_linear import CONTRACT

CONTRACT_1 = Path(__file__).parent / "contract_1"


@pytest.fixture(params=["defaults of today", "other defaults"])
def defaults(request, monkeypatch):
    """What a config.json lacks does not follow the classes' defaults."""
    if request.param == "other defaults":
        monkeypatch.setattr(attention_linear, "DEFAULT_MAP_INPUT", "projections")
        monkeypatch.setattr(attention_linear, "DEFAULT_GATE", "token")


@torch.no_grad()
def test_a_repository_of_contract_1_gives_the_same_logits(defaults, tmp_path):
    saved = json.loads((CONTRACT_1 / "config.json").read_text())["mixers"]
    assert all(x["contract"] == 1 and not {"map_input", "gate"} & set(x) for x in saved.values())
    expected = load_file(CONTRACT_1 / "expected.safetensors")
    ids, mask = expected["input_ids"], expected["attention_mask"]
    model, loading = AutoModelForCausalLM.from_pretrained(CONTRACT_1, output_loading_info=True)
    assert not any(loading.values())
    model.save_pretrained(tmp_path)
    for student in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        for settings in student.config.mixers.values():
            assert (settings["map_input"], settings["gate"], settings["contract"]) == ("rotated", "none", CONTRACT)
        torch.testing.assert_close(student(ids).logits, expected["logits"], rtol=0, atol=1e-5)
        padded = student(ids, attention_mask=mask).logits
        torch.testing.assert_close(padded[mask.bool()], expected["padded_logits"][mask.bool()], rtol=0, atol=1e-5)
        cache = DynamicCache(config=student.config)
        cut = [student(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 9), (9, 10), (10, 30))]
        torch.testing.assert_close(torch.cat(cut, 1), expected["logits"], rtol=0, atol=1e-5)
        found = student.generate(ids[:, :12], max_new_tokens=10, min_new_tokens=10, do_sample=False)
        assert torch.equal(found, expected["generated"])


def test_settings_of_contract_2_in_a_file_of_contract_1_are_refused():
    for name, value in (("map_input", "projections"), ("gate", "token")):
        with pytest.raises(ValueError, match=f"{name} is '{value}', and contract 1 of linear attention knows"):
            LinearAttentionConfig(**{name: value}, contract=1)
    assert LinearAttentionConfig(map_input="rotated", gate="none", contract=1).contract == CONTRACT
    with pytest.raises(ValueError, match="contract 0"):
        LinearAttentionConfig(contract=0)


def test_a_later_contract_is_refused_when_loaded(tmp_path):
    config = json.loads((CONTRACT_1 / "config.json").read_text())
    config["mixers"]["wide"]["contract"] = CONTRACT + 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"contract {CONTRACT + 1} of linear attention"):
        AutoConfig.from_pretrained(tmp_path)
