"""Repositories of earlier contracts: they load and give the numbers that they were saved with.

`contract_1` was saved by the tree before contract 2 of hybrid linear attention, `contract_1_cosine` before that of
cosine attention, without their code files, with what they gave on the spot in `expected.safetensors`.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import linearize.modeling.attention_cosine as attention_cosine
import linearize.modeling.attention_linear as attention_linear
from linearize.modeling import CosineAttentionConfig, LinearAttentionConfig
from linearize.modeling.op_cosine import CONTRACT as COSINE_CONTRACT
from linearize.modeling.op_hybrid_linear import CONTRACT

HERE = Path(__file__).parent
SAVED = {
    "linear": (HERE / "contract_1", {"map_input": "rotated", "gate": "none"}, CONTRACT),
    "cosine": (HERE / "contract_1_cosine", {"directions": "rotated", "gate": "none"}, COSINE_CONTRACT),
}


@pytest.fixture(params=["defaults of today", "other defaults"])
def defaults(request, monkeypatch):
    """What a config.json lacks does not follow the classes' defaults."""
    if request.param == "other defaults":
        monkeypatch.setattr(attention_linear, "DEFAULT_MAP_INPUT", "projections")
        monkeypatch.setattr(attention_linear, "DEFAULT_GATE", "token")
        monkeypatch.setattr(attention_cosine, "DEFAULT_DIRECTIONS", "projections")
        monkeypatch.setattr(attention_cosine, "DEFAULT_GATE", "token")


@torch.no_grad()
@pytest.mark.parametrize("kind", SAVED)
def test_a_repository_of_contract_1_gives_the_same_logits(kind, defaults, tmp_path):
    folder, meaning, contract = SAVED[kind]
    saved = json.loads((folder / "config.json").read_text())["mixers"]
    assert all(x["type"] == kind and x["contract"] == 1 and not set(meaning) & set(x) for x in saved.values())
    expected = load_file(folder / "expected.safetensors")
    ids, mask = expected["input_ids"], expected["attention_mask"]
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    model.save_pretrained(tmp_path)
    for student in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        for settings in student.config.mixers.values():
            assert {**settings, **meaning, "contract": contract} == settings
        torch.testing.assert_close(student(ids).logits, expected["logits"], rtol=0, atol=1e-5)
        padded = student(ids, attention_mask=mask).logits
        torch.testing.assert_close(padded[mask.bool()], expected["padded_logits"][mask.bool()], rtol=0, atol=1e-5)
        cache = DynamicCache(config=student.config)
        cut = [student(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 9), (9, 10), (10, 30))]
        torch.testing.assert_close(torch.cat(cut, 1), expected["logits"], rtol=0, atol=1e-5)
        found = student.generate(ids[:, :12], max_new_tokens=10, min_new_tokens=10, do_sample=False)
        assert torch.equal(found, expected["generated"])


def test_settings_of_contract_2_in_a_file_of_contract_1_are_refused():
    for kind, config in (("linear", LinearAttentionConfig), ("cosine", CosineAttentionConfig)):
        _, meaning, contract = SAVED[kind]
        for name, value in zip(meaning, ("projections", "token"), strict=True):
            with pytest.raises(ValueError, match=f"{name} is '{value}', and contract 1 of {kind} attention knows"):
                config(**{name: value}, contract=1)
        assert config(**meaning, contract=1).contract == contract
        with pytest.raises(ValueError, match="contract 0"):
            config(contract=0)


@pytest.mark.parametrize("kind", SAVED)
def test_a_later_contract_is_refused_when_loaded(kind, tmp_path):
    folder, _, contract = SAVED[kind]
    config = json.loads((folder / "config.json").read_text())
    config["mixers"]["wide"]["contract"] = contract + 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"contract {contract + 1} of {kind} attention"):
        AutoConfig.from_pretrained(tmp_path)
