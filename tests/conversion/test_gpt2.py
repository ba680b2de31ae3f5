"""The pipeline on a GPT-2: both stages, adapters on Conv1D weights, evaluation, forecast and messages."""

import importlib.util
import warnings

import pytest
import torch
from finetuning_toys import fixed_logits, settings, token_blocks
from peft import PeftModel
from tiny_models import make_gpt2, make_student, perturb
from tiny_runs import make_teacher_directory, tiny_config, write_text

import linearize
from linearize.config.settings import FinetuneConfig, TransferConfig
from linearize.conversion.quantization import is_quantized, quantization_config
from linearize.evaluation import measure_speed
from linearize.evaluation.description import info
from linearize.hardware import memory
from linearize.hardware.shape import Shape
from linearize.runs.engine import plan
from linearize.stages.adapters import adaptable_layers, add_adapters, merge, merge_into_unquantized
from linearize.stages.finetuning import finetune
from linearize.stages.transfer import transfer_attention
from linearize.training.log import read_log

LENGTH = 32
MIXERS = {"linear": {"type": "linear", "window": 8, "sinks": 2}}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_teacher_directory(tmp_path_factory.mktemp("stock") / "teacher", make=make_gpt2, resid_pdrop=0.1)


@pytest.fixture
def student():
    model = make_student(make_gpt2(), MIXERS)
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
    card = (result.final / "README.md").read_text()
    assert "2 of its 2 attention layers converted" in card
    described = info(result.final)
    assert described.model_type == "linearized_gpt2" and described.layers == ["linear"] * 2
    assert described.state[-1].student < described.state[-1].teacher
    final = linearize.load_student(result.final)
    tokenizer = linearize.load_tokenizer(result.final)
    reply = final.generate(**tokenizer("the river ran", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert reply.shape[1] > 3


def test_attention_transfer_lowers_the_loss_and_touches_nothing_else(student, tmp_path):
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    config = TransferConfig(max_steps=30, batch_size=4, tokens_per_step=4 * LENGTH, logging_steps=1)
    result = transfer_attention(student, token_blocks(12), config, output_dir=tmp_path)
    first, last = (torch.tensor(result.losses_per_layer[i]).mean(0) for i in (slice(0, 3), slice(-3, None)))
    assert len(first) == 3 and (last < 0.8 * first).all()
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(student.mixer_state_dict())


def test_attention_transfer_is_taught_without_dropout(tmp_path):
    """The targets are those of the teacher at work, whatever it dropped in its own training."""
    config = TransferConfig(max_steps=2, batch_size=4, tokens_per_step=4 * LENGTH, logging_steps=1)
    losses = []
    for share in (0.0, 0.5):
        model = make_student(make_gpt2(attn_pdrop=share, resid_pdrop=share, embd_pdrop=share), MIXERS).train()
        result = transfer_attention(model, token_blocks(8), config, output_dir=tmp_path / str(share))
        losses.append(result.losses_per_layer)
        assert model.training
    assert losses[0] == losses[1]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft asks by a name that transformers has replaced
def test_finetuning_lowers_the_loss_and_merges(student, tmp_path):
    """peft is told that Conv1D weights lie the other way round, so it has nothing to warn about."""
    assert adaptable_layers(student) == ["c_attn", "c_proj", "c_fc"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "fan_in_fan_out.*")
        config = settings(max_steps=20, gradient_checkpointing=True)
        result = finetune(student, token_blocks(12), config, output_dir=tmp_path, base_model="me/converted")
    layer = "base_model.model.transformer.h.0."
    names = [name for name, _ in result.model.named_parameters() if name.startswith(layer) and ".lora_A." in name]
    adapters = {name.removeprefix(layer).split(".lora_")[0] for name in names}
    assert adapters == {"attn.c_attn", "attn.c_proj", "mlp.c_proj"}
    losses = [record["loss"] for record in read_log(result.log_path)]
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    trained = fixed_logits(result.model)
    again = PeftModel.from_pretrained(make_student(make_gpt2(), MIXERS), result.adapter_path)
    torch.testing.assert_close(fixed_logits(again), trained, rtol=0, atol=1e-5)
    torch.testing.assert_close(fixed_logits(merge(result.model)), trained, rtol=0, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_a_quantised_base_trains_and_merges_into_the_full_weights(tmp_path):
    make_gpt2().save_pretrained(tmp_path / "teacher")
    bits = quantization_config(load_in_4bit=True, compute_dtype=torch.float32)
    model = linearize.convert(tmp_path / "teacher", MIXERS["linear"], dtype=torch.float32, quantization_config=bits)
    assert is_quantized(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "fan_in_fan_out.*")
        result = finetune(model, token_blocks(12), settings(), output_dir=tmp_path / "out")
        merged = merge_into_unquantized(result.model, tmp_path / "teacher", dtype=torch.float32)
    weight = "transformer.h.1.attn.c_attn.weight"
    assert not torch.equal(merged.state_dict()[weight], make_gpt2().state_dict()[weight])
    assert (fixed_logits(merged) - fixed_logits(result.model)).abs().mean() < 0.5 * fixed_logits(merged).abs().mean()


def test_parameters_are_counted_exactly(student):
    shape = Shape.of(student.config)
    assert shape == Shape.of(make_gpt2().config)
    parameters = {name: parameter.numel() for name, parameter in student.named_parameters()}
    mixers = sum(count for name, count in parameters.items() if ".mixer." in name)
    assert memory.Mechanism.of(shape, {}, []).parameters == mixers
    assert shape.linear_parameters + shape.other_parameters == sum(parameters.values()) - mixers
    for targets in (None, ["c_attn"], ["c_fc", "c_proj"]):
        adapted = add_adapters(make_student(make_gpt2()), FinetuneConfig(lora_targets=targets), train_mixers=False)
        lora = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
        assert memory.adapter_parameters(shape, FinetuneConfig(lora_targets=targets)) == lora


def test_a_plan_and_what_it_refuses(directory, tmp_path):
    def planned(**changes):
        config = tiny_config(directory, tmp_path / "text.jsonl", tmp_path / "out", tmp_path / "cache")
        for section, values in changes.items():
            (config["stages"] if section in config["stages"] else config)[section] |= values
        return plan(config)

    assert [stage.trained["mechanism"] > 0 for stage in planned().plans] == [True, True]
    with pytest.raises(linearize.UserError, match="no linear layer named q_proj; there are c_attn, c_proj, c_fc"):
        planned(finetune={"lora_targets": ["q_proj"]})
    with pytest.raises(linearize.UserError, match="the teacher's context is 256 tokens"):
        stage = {"tokens_per_step": 512}
        planned(data={"sequence_length": 512}, transfer=stage, finetune=stage)


def test_a_plan_counts_the_positions_of_landmarks(directory, tmp_path):
    config = tiny_config(directory, tmp_path / "text.jsonl", tmp_path / "out", tmp_path / "cache")
    config["attention"] = {"type": "landmark", "block_size": 8}
    del config["stages"]["transfer"]
    config["data"]["sequence_length"] = 256
    with pytest.raises(linearize.UserError, match="context is 224 tokens with its landmarks: set it to 224 or lower"):
        plan(config)


def test_speed_is_measured_within_the_positions():
    for model in (make_gpt2(n_positions=48), make_student(make_gpt2(n_positions=48), MIXERS)):
        speed = measure_speed(model)
        assert speed.prefill > 0 and speed.decode > 0
