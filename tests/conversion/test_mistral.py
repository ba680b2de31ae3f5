"""The pipeline on a Mistral with a sliding window: a run, what it records, adapters, forecast and commands."""

import json

import pytest
import torch
from finetuning_toys import fixed_logits, settings, token_blocks
from tiny_models import make_mistral, make_student, perturb
from tiny_runs import make_teacher_directory, tiny_config, write_text
from transformers import DynamicCache

import linearize
from linearize.cli import main
from linearize.config.record import read_record
from linearize.config.settings import FinetuneConfig, TransferConfig
from linearize.conversion.students import convert_like
from linearize.evaluation import state_bytes
from linearize.evaluation.description import info
from linearize.hardware import memory
from linearize.runs.engine import plan
from linearize.stages.adapters import adaptable_layers, add_adapters, merge_into_unquantized
from linearize.stages.finetuning import finetune
from linearize.stages.transfer import transfer_attention
from linearize.stages.transfer_loss import LayerLosses
from linearize.training.log import read_log

LENGTH, WINDOW = 32, 12
MIXERS = {"linear": {"type": "linear", "window": 8, "sinks": 2}}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("stock") / "teacher"
    return make_teacher_directory(path, make=make_mistral, sliding_window=WINDOW)


@pytest.fixture
def student():
    model = make_student(make_mistral(sliding_window=WINDOW), MIXERS)
    perturb(model)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["keep", "lift"])
def test_a_whole_run(choice, directory, tmp_path):
    text = write_text(tmp_path / "text.jsonl")
    config = tiny_config(directory, text, tmp_path / "out", tmp_path / "cache")
    config["stages"]["finetune"]["kl_weight"] = 0.5
    result = linearize.run({**config, "softmax_layers": [-1], "sliding_window": choice})
    assert all(torch.tensor([row.perplexity for row in result.report.rows]).isfinite())
    window = WINDOW if choice == "keep" else None
    final = linearize.load_student(result.final)
    assert final.config.model_type == "linearized_mistral" and final.config.sliding_window == window
    described = info(result.final)
    assert described.layers == ["linear", "softmax"] and described.sliding_window == window
    shown = "sliding window of softmax layers" in described.markdown()
    card = (result.final / "README.md").read_text()
    assert shown == (f"Softmax layers see the last {WINDOW} tokens" in card) == (choice == "keep")
    assert read_record(result.final)["recipe"]["sliding_window"] == choice
    tokenizer = linearize.load_tokenizer(result.final)
    reply = final.generate(**tokenizer("the river ran", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert reply.shape[1] > 3


def test_attention_transfer_learns_the_window_s_output():
    """A softmax branch over as many tokens has nothing to learn from the window's output, and much from a full one."""
    losses = []
    for window in (WINDOW, None):
        student = make_student(
            make_mistral(sliding_window=window), {"linear": {"type": "linear", "window": WINDOW, "sinks": 0}}
        )
        with LayerLosses(student, "relative_mse") as layer_losses:
            layer_losses.run(token_blocks(12)[0]["input_ids"][None], weights={"softmax": 1.0}, gradient_factor=None)
            losses.append(layer_losses.means(torch.device("cpu"))["softmax"])
    assert (losses[0] < 1e-10).all() and (losses[1] > 0.01).all()


def test_attention_transfer_lowers_the_loss_and_touches_nothing_else(student, tmp_path):
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    config = TransferConfig(max_steps=30, batch_size=4, tokens_per_step=4 * LENGTH, logging_steps=1)
    result = transfer_attention(student, token_blocks(12), config, output_dir=tmp_path)
    first, last = (torch.tensor(result.losses_per_layer[i]).mean(0) for i in (slice(0, 3), slice(-3, None)))
    assert len(first) == 3 and (last < 0.8 * first).all()
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(student.mixer_state_dict())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft asks by a name that transformers has replaced
@pytest.mark.parametrize("choice", ["keep", "lift"])
def test_finetuning_lowers_the_loss_and_merges_into_the_full_weights(choice, tmp_path):
    """Merging loads the teacher anew, and must not bring a lifted window back."""
    make_mistral(sliding_window=WINDOW).save_pretrained(tmp_path / "teacher")
    options = {"softmax_layers": [1], "sliding_window": choice, "dtype": torch.float32}
    student = linearize.convert(tmp_path / "teacher", MIXERS["linear"], **options)
    perturb(student)
    assert adaptable_layers(student)[:4] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = settings(max_steps=20, gradient_checkpointing=True)
    result = finetune(student, token_blocks(12), config, output_dir=tmp_path / "out", base_model="me/converted")
    losses = [record["loss"] for record in read_log(result.log_path)]
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    trained = fixed_logits(result.model)
    merged = merge_into_unquantized(result.model, tmp_path / "teacher", dtype=torch.float32)
    assert merged.config.sliding_window == (WINDOW if choice == "keep" else None)
    torch.testing.assert_close(fixed_logits(merged), trained, rtol=0, atol=1e-5)


def test_converting_like_a_student_takes_every_setting(directory):
    layers = ["linear", "softmax"]
    first = linearize.convert(directory, mixers=MIXERS, mixer_types=layers, sliding_window="lift")
    again = convert_like(directory, first.config)
    assert again.config.to_dict() == first.config.to_dict() and again.config.sliding_window is None


def test_parameters_are_counted_exactly(student):
    shape = memory.Shape.of(student.config)
    assert shape == memory.Shape.of(make_mistral().config)
    parameters = {name: parameter.numel() for name, parameter in student.named_parameters()}
    mixers = sum(count for name, count in parameters.items() if ".mixer." in name)
    assert memory.Mechanism.of(shape, {}, []).parameters == mixers
    assert shape.linear_parameters + shape.other_parameters == sum(parameters.values()) - mixers
    for targets in (None, ["q_proj"], ["down_proj", "o_proj"]):
        adapted = add_adapters(make_student(make_mistral()), FinetuneConfig(lora_targets=targets), train_mixers=False)
        lora = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
        assert memory.adapter_parameters(shape, FinetuneConfig(lora_targets=targets)) == lora


@torch.no_grad()
@pytest.mark.parametrize("window", [WINDOW, None])
def test_state_bytes_are_the_real_caches(window):
    teacher = make_mistral(sliding_window=window)
    student = make_student(teacher, MIXERS, ["linear", "softmax", "linear"])
    for tokens in (8, 40):
        caches = []
        for model in (student, teacher):
            cache = DynamicCache(config=model.config)
            model(torch.randint(3, 97, (1, tokens)), past_key_values=cache, use_cache=True)
            layers = cache.layers
            caches.append([x.nbytes() if hasattr(x, "nbytes") else x.keys.nbytes + x.values.nbytes for x in layers])
        (ours,), (stock,) = state_bytes(student.config, [tokens]), state_bytes(teacher.config, [tokens])
        assert (ours.student, ours.teacher) == (sum(caches[0]), sum(caches[1]))
        assert stock.student == stock.teacher == sum(caches[1])


def test_a_plan_says_what_becomes_of_the_window(directory, tmp_path):
    config = tiny_config(directory, tmp_path / "text.jsonl", tmp_path / "out", tmp_path / "cache")
    for choice, word in (("keep", "kept"), ("lift", "lifted")):
        table = plan({**config, "sliding_window": choice}).tables()[0]
        assert ["sliding window", f"{WINDOW} tokens, {word}"] in table.rows
    linearize.convert(directory, MIXERS["linear"]).save_pretrained(tmp_path / "student")
    table = plan({**config, "model_name_or_path": str(tmp_path / "student")}).tables()[0]
    assert ["sliding window", f"{WINDOW} tokens, as converted"] in table.rows


def test_the_command_lifts_the_window_and_evaluates_with_it_lifted(directory, tmp_path, capsys):
    out, text = tmp_path / "student", write_text(tmp_path / "text.jsonl", documents=4)
    assert main(["convert", str(directory), str(out), "--softmax_layers", "[0]", "--sliding_window", "lift"]) == 0
    assert json.loads((out / "config.json").read_text())["sliding_window"] is None
    assert read_record(out)["recipe"]["sliding_window"] == "lift"
    capsys.readouterr()
    assert main(["convert", str(directory), str(tmp_path / "other"), "--sliding_window", "none"]) == 2
    assert "sliding_window is 'none', but it must be one of keep, lift" in capsys.readouterr().err
    flags = ["--text", str(text), "--sequence_length", "32", "--max_tokens", "128", "--teacher", str(directory)]
    assert main(["evaluate", str(out), *flags, "--output", str(tmp_path / "report")]) == 0
    rows = json.loads((tmp_path / "report" / "evaluation.json").read_text())["rows"]
    assert rows[0]["name"] == "teacher"
