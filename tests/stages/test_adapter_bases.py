"""An adapter names what it belongs on: loaded the ordinary way it gives the run's model, or says why it cannot."""

import json

import pytest
import torch
from finetuning_toys import settings as finetune_settings
from finetuning_toys import stock_llama, token_blocks
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from tiny_runs import make_teacher_directory, tiny_config, write_text

import linearize
from linearize.config.record import read_record
from linearize.conversion import convert, load_student
from linearize.stages.finetuning import finetune

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # inside peft 0.21


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    make_teacher_directory(root / "teacher")
    write_text(root / "text.jsonl")
    return root


def ran(inputs, output, without=(), **changes):
    config = tiny_config(inputs / "teacher", inputs / "text.jsonl", output, inputs / "cache")
    config["stages"]["finetune"]["learning_rate"] = 1e-2
    for stage in without:
        del config["stages"][stage]
    return linearize.run({**config, "evaluation": None, **changes})


@torch.no_grad()
def gap(adapter, final):
    """Largest difference between the logits of the adapter on its base and those of the run's model."""
    ids = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(1))
    adapted = AutoPeftModelForCausalLM.from_pretrained(adapter, trust_remote_code=True).eval()
    found = adapted(ids).logits
    with adapted.disable_adapter():
        assert (adapted(ids).logits - found).abs().max() > 1e-2, "an adapter that does nothing would prove nothing"
    return (found - load_student(final)(ids).logits).abs().max()


def base_of(adapter):
    return json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_the_adapter_of_a_run_gives_its_model(inputs, tmp_path):
    result = ran(inputs, tmp_path / "out")
    adapter = tmp_path / "out" / "adapter"
    assert gap(adapter, result.final) < 1e-3
    assert gap(tmp_path / "out" / "checkpoints" / "finetune" / "step-3", result.final) < 1e-3
    assert read_record(tmp_path / "out" / "transfer")["tokens"] == {"transfer": 192}
    card = ModelCard.load(adapter / "README.md")
    assert card.data.library_name == "peft" and card.data.base_model is None
    assert "transfer" in card.text and str(tmp_path) not in card.content and '"adapter"' in card.text


def test_without_stage_1_the_converted_teacher_is_its_base(inputs, tmp_path):
    result = ran(inputs, tmp_path / "out", without=["transfer"])
    assert gap(tmp_path / "out" / "adapter", result.final) < 1e-3
    record = read_record(tmp_path / "out" / "converted")
    assert record["recipe"] and not record.get("tokens")


def test_a_converted_source_is_its_base(inputs, tmp_path):
    first = ran(inputs, tmp_path / "first", without=["finetune"])
    source = {"model_name_or_path": str(first.final), "attention": {}}
    result = ran(inputs, tmp_path / "out", without=["transfer"], **source)
    assert base_of(tmp_path / "out" / "adapter") == str(first.final)
    assert gap(tmp_path / "out" / "adapter", result.final) < 1e-3
    assert not {"transfer", "converted"} & {path.name for path in (tmp_path / "out").iterdir()}


def test_an_adapter_on_an_unsaved_model_says_so(tmp_path):
    stock = stock_llama(tmp_path)
    model = convert(stock, {"type": "linear", "window": 4}, dtype=torch.float32)
    adapter = finetune(model, token_blocks(), finetune_settings(max_steps=1), output_dir=tmp_path).adapter_path
    assert stock not in base_of(adapter)
    with pytest.raises(OSError, match="converted model that was not saved"):
        AutoPeftModelForCausalLM.from_pretrained(adapter, trust_remote_code=True)
    card = (adapter / "README.md").read_text()
    assert "PeftModel.from_pretrained(converted" in card and str(tmp_path) not in card


def test_a_card_names_a_base_on_the_hub(tmp_path):
    model = convert(stock_llama(tmp_path), {"type": "linear", "window": 4}, dtype=torch.float32)
    where = {"base_model": "me/converted", "revision": "v1"}
    adapter = finetune(model, token_blocks(), finetune_settings(max_steps=1), output_dir=tmp_path, **where)
    config = json.loads((adapter.adapter_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/converted", "v1")
    assert ModelCard.load(adapter.adapter_path / "README.md").data.base_model == "me/converted"
