"""The pipeline on a GPT-J: both stages, adapters, evaluation, forecast and messages."""

import pytest
import torch
from finetuning_toys import fixed_logits, settings, token_blocks
from peft import PeftModel
from tiny_models import make_gptj, make_student, perturb
from tiny_runs import make_teacher_directory, tiny_config, write_text

import linearize
from linearize.config.settings import FinetuneConfig
from linearize.evaluation import measure_speed
from linearize.evaluation.description import info
from linearize.hardware import memory
from linearize.hardware.shape import Shape
from linearize.runs.engine import plan
from linearize.stages.adapters import adaptable_layers, add_adapters, merge
from linearize.stages.finetuning import finetune
from linearize.training.log import read_log

MIXERS = {"linear": {"type": "linear", "window": 8, "sinks": 2}}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_teacher_directory(tmp_path_factory.mktemp("stock") / "teacher", make=make_gptj, resid_pdrop=0.1)


@pytest.fixture
def student():
    model = make_student(make_gptj(), MIXERS)
    perturb(model)
    return model


@pytest.mark.slow
def test_a_whole_run(directory, tmp_path):
    text = write_text(tmp_path / "text.jsonl")
    config = tiny_config(directory, text, tmp_path / "out", tmp_path / "cache")
    config["stages"]["finetune"]["kl_weight"] = 0.5
    result = linearize.run(config)
    arms = {row.name: row.perplexity for row in result.report.rows}
    assert all(torch.tensor(list(arms.values())).isfinite())
    assert "2 of its 2 attention layers converted" in (result.final / "README.md").read_text()
    described = info(result.final)
    assert described.model_type == "linearized_gptj" and described.layers == ["linear"] * 2
    assert described.state[-1].student < described.state[-1].teacher
    final = linearize.load_student(result.final)
    tokenizer = linearize.load_tokenizer(result.final)
    reply = final.generate(**tokenizer("the river ran", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert reply.shape[1] > 3


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft asks by a name that transformers has replaced
def test_finetuning_lowers_the_loss_and_merges(student, tmp_path):
    assert adaptable_layers(student) == ["k_proj", "v_proj", "q_proj", "out_proj", "fc_in", "fc_out"]
    config = settings(max_steps=20, gradient_checkpointing=True)
    result = finetune(student, token_blocks(12), config, output_dir=tmp_path, base_model="me/converted")
    layer = "base_model.model.transformer.h.0."
    names = [name for name, _ in result.model.named_parameters() if name.startswith(layer) and ".lora_A." in name]
    adapters = {name.removeprefix(layer).split(".lora_")[0] for name in names}
    assert adapters == {"attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj"}
    losses = [record["loss"] for record in read_log(result.log_path)]
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    trained = fixed_logits(result.model)
    again = PeftModel.from_pretrained(make_student(make_gptj(), MIXERS), result.adapter_path)
    torch.testing.assert_close(fixed_logits(again), trained, rtol=0, atol=1e-5)
    torch.testing.assert_close(fixed_logits(merge(result.model)), trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n_inner", [96, None])
def test_parameters_are_counted_exactly(n_inner):
    student = make_student(make_gptj(n_inner=n_inner), MIXERS)
    shape = Shape.of(student.config)
    assert shape == Shape.of(make_gptj(n_inner=n_inner).config)
    parameters = {name: parameter.numel() for name, parameter in student.named_parameters()}
    mixers = sum(count for name, count in parameters.items() if ".mixer." in name)
    assert memory.Mechanism.of(shape, {}, []).parameters == mixers
    assert shape.linear_parameters + shape.other_parameters == sum(parameters.values()) - mixers
    for targets in (None, ["q_proj"], ["fc_in", "fc_out"]):
        student = make_student(make_gptj(n_inner=n_inner))
        adapted = add_adapters(student, FinetuneConfig(lora_targets=targets), train_mixers=False)
        lora = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
        assert memory.adapter_parameters(shape, FinetuneConfig(lora_targets=targets)) == lora


def test_a_plan_and_what_it_refuses(directory, tmp_path):
    def planned(**changes):
        config = tiny_config(directory, tmp_path / "text.jsonl", tmp_path / "out", tmp_path / "cache")
        for section, values in changes.items():
            (config["stages"] if section in config["stages"] else config)[section] |= values
        return plan(config)

    assert [stage.trained["mechanism"] > 0 for stage in planned().plans] == [True, True]
    with pytest.raises(linearize.UserError, match="no linear layer named o_proj; there are"):
        planned(finetune={"lora_targets": ["o_proj"]})


def test_speed_is_measured(student):
    for model in (make_gptj(n_positions=48), student):
        speed = measure_speed(model)
        assert speed.prefill > 0 and speed.decode > 0
