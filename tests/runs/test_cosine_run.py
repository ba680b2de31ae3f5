"""Whole runs onto cosine attention: plan, calibration, attention transfer, LoRA, report, and the repository left."""

import copy
import json

import pytest
import torch
import yaml
from tiny_models import make_gpt2, make_gptj, make_mistral, make_student, make_teacher
from tiny_runs import make_bert_directory, make_teacher_directory, tiny_config, write_text
from transformers import AutoModel, AutoModelForCausalLM

import linearize
from linearize.cli import main
from linearize.config.record import read_record
from linearize.config.settings import TransferConfig
from linearize.data.sequences import TokenBlocks
from linearize.errors import UserError
from linearize.evaluation import evaluate, info, state_bytes
from linearize.runs.attention import complete
from linearize.runs.engine import plan
from linearize.runs.settings import resolve_run
from linearize.stages.transfer import mixer_parameters, transfer_attention
from linearize.training.log import TrainingDiverged

VARIANTS = {
    "window": {"window": 8, "sinks": 2},
    "pure": {"window": 0, "sinks": 0},
    "key": {"window": 0, "sinks": 0, "scale_side": "key"},
    "map": {"window": 8, "sinks": 2, "feature_map": "softmax"},
}
TEACHERS = {"llama": make_teacher, "gpt2": make_gpt2, "gptj": make_gptj, "mistral": make_mistral}
PAIRS = [("llama", "window"), ("llama", "key"), ("gpt2", "map"), ("gptj", "key"), ("mistral", "pure")]


@pytest.fixture
def make_settings(tmp_path):
    def make(backbone="llama", variant="window"):
        teacher = make_teacher_directory(tmp_path / "teacher", make=TEACHERS[backbone])
        config = tiny_config(teacher, write_text(tmp_path / "text.jsonl"), tmp_path / "out", tmp_path / "cache")
        config["attention"] = {"type": "cosine", **VARIANTS[variant]}
        config["stages"]["transfer"]["branch"] = "mixed"
        config["stages"]["calibrate"]["sequences"] = 3
        return config

    return make


@pytest.mark.parametrize("backbone, variant", PAIRS)
def test_a_run_leaves_a_repository(make_settings, backbone, variant, tmp_path, capsys):
    settings = make_settings(backbone, variant)
    result = linearize.run(copy.deepcopy(settings))
    assert "calibration: 3 sequences, squared error" in capsys.readouterr().out
    final = tmp_path / "out" / "final"
    model = AutoModelForCausalLM.from_pretrained(final, trust_remote_code=True)
    start = linearize.convert(settings["model_name_or_path"], linearize.CosineAttentionConfig(**settings["attention"]))
    before, after = start.mixer_state_dict(), model.mixer_state_dict()
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before if ".scales." in name)
    tokens = model.generate(torch.arange(5, 17)[None], max_new_tokens=4, do_sample=False)
    assert 12 < tokens.shape[1] <= 16
    greedy = [model(tokens[:, :place]).logits[0, -1].argmax() for place in range(12, tokens.shape[1])]
    assert tokens[0, 12:].tolist() == greedy  # the state gives what the whole text gives
    rows = [row.name for row in result.report.rows]
    assert {"teacher", "student after conversion", "student after calibration", "student"} <= set(rows)
    windowed = bool(VARIANTS[variant]["window"])
    assert any(name.startswith("control: softmax window 8 + 2 sinks") for name in rows) is windowed
    assert (result.report.share is not None) is windowed
    record = read_record(final)
    assert record["calibration"]["after"] < record["calibration"]["before"]
    assert len(json.loads((tmp_path / "out" / "logs" / "calibrate.json").read_text())["values"]["exponents"]) == 2
    card = (final / "README.md").read_text()
    assert "with cosine attention" in card and "2409.18747" in card and "- calibration: 3 sequences" in card
    described = info(final)
    assert {settings["type"] for settings in described.mechanisms.values()} == {"cosine"}
    assert [x.student for x in described.state] == [x.student for x in state_bytes(model.config)]


def test_the_plan_names_the_calibration_and_counts_the_numbers_of_the_heads(make_settings):
    settings = make_settings()
    planned = plan(settings)
    calibration, transfer, lora = planned.plans
    assert transfer.forecast.total > 0 and lora.forecast.total > transfer.forecast.total
    assert transfer.trained == {"mechanism": 2 * 3 * 4}
    assert (calibration.steps, calibration.trained, calibration.tokens) == (None, {}, 0)
    shown = [row[:3] for row in planned.tables()[1].rows]
    assert shown[0] == ["calibrate", "nothing", "3 sequences, no gradients"]
    for changes in ({"attention": {"type": "linear", "window": 8}}, {"calibrate": None}):
        assert [stage.name for stage in plan(settings, changes).plans] == ["transfer", "finetune"]


def test_branches_that_are_not_there_are_named_before_anything_runs(make_settings, tmp_path):
    settings = make_settings(variant="pure")
    transfer = settings["stages"]["transfer"]
    transfer["branch"] = "both"
    with pytest.raises(UserError, match="set transfer.branch to mixed"):
        linearize.run(settings)
    transfer |= {"branch": "mixed", "window_dropout": [0.0, 0.3]}
    with pytest.raises(UserError, match="set transfer.window_dropout to 0"):
        linearize.run(settings)
    assert not (tmp_path / "out").exists()
    student = make_student(make_teacher(), {"cosine": {"type": "cosine", **VARIANTS["pure"]}})
    blocks = TokenBlocks(torch.arange(3, 35)[None])
    with pytest.raises(UserError, match="set transfer.window_dropout to 0"):
        transfer_attention(student, blocks, TransferConfig(window_dropout=0.3), output_dir=tmp_path / "out")


@pytest.mark.parametrize(
    "attention, branch",
    [
        ({"type": "linear"}, "both"),
        ({"type": "linear", "window": 0, "sinks": 2}, "both"),
        ({"type": "linear", "window": 0, "sinks": 0}, "mixed"),
        ({"type": "cosine"}, "mixed"),
        ({"type": "cosine", "window": 0, "sinks": 0}, "mixed"),
    ],
    ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else x,
)
def test_the_branch_that_trains_is_the_mechanism_s(make_settings, attention, branch, tmp_path, capsys):
    """In the plan, and in the settings that a run keeps; a branch that is named stays."""
    settings = {**make_settings(), "attention": attention}
    transfer = settings["stages"]["transfer"]
    del transfer["branch"]
    assert resolve_run(settings).stages["transfer"].branch is None
    assert complete(resolve_run(settings)).stages["transfer"].branch == branch
    assert plan(settings).of("transfer").settings.branch == branch
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    capsys.readouterr()
    assert main(["run", str(tmp_path / "config.yaml"), "--dry_run"]) == 0
    assert f"{branch}: " in capsys.readouterr().out
    transfer["branch"] = "mixed"
    assert complete(resolve_run(settings)).stages["transfer"].branch == "mixed"


def test_the_branch_of_a_converted_model_is_its_own_mechanism_s(make_settings, tmp_path, capsys):
    """The settings of the stage name no attention; the model's counts."""
    settings = {**make_settings(), "evaluation": None}
    del settings["stages"]["transfer"]["branch"], settings["stages"]["finetune"]
    start = linearize.convert(settings["model_name_or_path"], linearize.CosineAttentionConfig(window=8, sinks=2))
    start.save_pretrained(tmp_path / "start")
    linearize.load_tokenizer(settings["model_name_or_path"]).save_pretrained(tmp_path / "start")
    settings |= {"model_name_or_path": str(tmp_path / "start"), "attention": {"type": "linear"}}
    settings["stages"]["transfer"]["max_steps"] = 1
    linearize.run(copy.deepcopy(settings))
    stored = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert stored["stages"]["transfer"]["branch"] == "mixed" and "mixed: " in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "logs" / "transfer.jsonl").read_text().splitlines()[0])
    assert not any("linear" in name for name in record)
    linearize.run({**settings, "resume_from_checkpoint": True})
    assert "is complete" in capsys.readouterr().out


def test_a_calibration_alone(make_settings, tmp_path):
    settings = {**make_settings(), "evaluation": None}
    settings["stages"] = {"calibrate": settings["stages"]["calibrate"]}
    result = linearize.run(settings)
    assert (
        result.record["calibration"]["sequences"] == 3 and read_record(result.final)["calibration"]["sequences"] == 3
    )
    model = linearize.load_student(result.final)
    assert all(attention.mixer.scales.gain.all() for attention in model.mixer_attentions())


def test_the_commands_calibrate_once(make_settings, tmp_path, capsys):
    """A converted model before its first stage, and not one that has been fitted."""
    settings = make_settings()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    flags = ["--config", str(tmp_path / "config.yaml")]
    assert main(["convert", settings["model_name_or_path"], str(tmp_path / "start"), *flags]) == 0
    assert "calibration" not in read_record(tmp_path / "start")
    capsys.readouterr()
    assert main(["transfer", str(tmp_path / "start"), str(tmp_path / "one"), *flags]) == 0
    assert capsys.readouterr().out.count("calibration: 3 sequences") == 1
    assert main(["finetune", str(tmp_path / "one"), str(tmp_path / "two"), *flags]) == 0
    assert "calibration:" not in capsys.readouterr().out
    records = [read_record(tmp_path / name / "final") for name in ("one", "two")]
    assert records[0]["calibration"] == records[1]["calibration"]
    assert set(records[1]["tokens"]) == {"transfer", "finetune"}
    assert (
        main(["evaluate", str(tmp_path / "one"), "--text", settings["data"]["dataset"], "--sequence_length", "32"])
        == 0
    )
    shown = capsys.readouterr().out
    assert "linear arm" in shown and "share of the output" in shown
    assert main(["info", str(tmp_path / "two")]) == 0 and "cosine" in capsys.readouterr().out


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stage_that_diverges_names_the_rates_that_count(variant, tmp_path):
    """Without a window `window_learning_rate` moves nothing."""
    student = make_student(make_teacher(), {"cosine": {"type": "cosine", **VARIANTS[variant]}})
    with torch.no_grad():
        student.mixer_attentions()[1].mixer.scales.gain[0] = float("nan")
    blocks = TokenBlocks(torch.arange(3, 43)[None])
    config = TransferConfig(max_steps=1, tokens_per_step=40)
    with pytest.raises(TrainingDiverged) as caught:
        transfer_attention(student, blocks, config, output_dir=tmp_path, device="cpu")
    assert "lower transfer.learning_rate" in str(caught.value)
    assert ("window_learning_rate" in str(caught.value)) is bool(VARIANTS[variant]["window"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_transfer_learns(variant, tmp_path):
    student = make_student(make_teacher(), {"cosine": {"type": "cosine", **VARIANTS[variant]}})
    ids = torch.randint(3, 97, (8, 40), generator=torch.Generator().manual_seed(3))
    blocks = TokenBlocks(ids)
    steps = {"max_steps": 30, "batch_size": 4, "tokens_per_step": 160, "logging_steps": 4, "branch": "mixed"}
    result = transfer_attention(student, blocks, TransferConfig(**steps), output_dir=tmp_path, device="cpu")
    first, last = (sum(result.losses_per_layer[i]) for i in (0, -1))
    assert last < 0.98 * first
    groups = mixer_parameters(student)
    windowed = {"window"} if VARIANTS[variant]["window"] else set()
    assert set(groups) == {"scalers"} | windowed | ({"maps"} if variant == "map" else set())
    assert all("window_weight" in name for name in groups.get("window", ()))
    assert all(parameter.dtype == torch.float32 for group in groups.values() for parameter in group.values())


def test_the_evaluation_has_the_arms_of_a_window_alone():
    ids = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(3))
    blocks = TokenBlocks(ids)
    for variant, rows in (("window", 5), ("pure", 2)):
        student = make_student(make_teacher(), {"cosine": {"type": "cosine", **VARIANTS[variant]}})
        report = evaluate(student, blocks)
        assert len(report.rows) == rows, [row.name for row in report.rows]


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--attention.scale_side", "value"], "scale_side is 'value': choose one of query, key"),
        (["--attention.window", "-1"], "window is -1"),
        (["--attention.exponent", "[0.1, 0.2]"], "exponent lists 2 numbers, but the attention has 4 query heads"),
        (["--attention.exponent", "2"], "exponent is 2"),
        (["--calibrate.sequences", "-1"], "calibrate.sequences is -1"),
        (["--attention.feature_map", "fourier"], "feature_map is 'fourier'"),
        (["--attention.initialization", "kaiming"], "initialization belong to a feature map"),
        (
            ["--attention", "{type: cosine, window: 0, sinks: 0, window_weight: 2}"],
            "window_weight belongs to a softmax",
        ),
    ],
)
def test_bad_input_is_one_sentence(make_settings, flags, sentence, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(make_settings(), sort_keys=False))
    capsys.readouterr()
    assert main(["run", str(tmp_path / "config.yaml"), *flags]) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def encoder_settings(variant, tmp_path):
    teacher = make_bert_directory(tmp_path / "teacher", sentences=True)
    for name, words in (("train", "abcdef"), ("validation", "uvwxyz")):
        texts = [f"The old cats ran past {x} houses. Two {x} cats slept in it. All {x} cats ran." for x in words]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    steps = {"max_steps": 2, "batch_size": 2, "tokens_per_step": 64}
    return {
        "model_name_or_path": str(teacher),
        "output_dir": str(tmp_path / "out"),
        "device": "cpu",
        "attention": {"type": "cosine", **VARIANTS[variant]},
        "data": {
            "dataset": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "validation.jsonl"),
            "sequence_length": 32, "cache_dir": str(tmp_path / "cache"),
        },
        "stages": {
            "calibrate": {"kind": "calibrate", "sequences": 4, "batch_size": 2},
            "transfer": {"kind": "transfer", **steps, "branch": "mixed"},
            "distillation": {"kind": "train", "weights": "all", "objective": "embeddings", **steps, "warmup_steps": 1},
        },
        "evaluation": {"pairs": 4},
    }  # fmt: skip


@pytest.mark.parametrize("variant", ["pure", "map"])
def test_an_encoder(variant, tmp_path, capsys):
    settings = encoder_settings(variant, tmp_path)
    result = linearize.run(settings)
    assert capsys.readouterr().out.count("calibration: 4 sequences") == 1
    assert "student after calibration" in [row.name for row in result.report.rows]
    assert read_record(result.final)["calibration"]["sequences"] == 4
    model = AutoModel.from_pretrained(result.final, trust_remote_code=True)
    assert model.config.mixers["cosine"]["window"] == VARIANTS[variant]["window"]
    assert (tmp_path / "out" / "logs" / "calibrate.json").is_file()


@pytest.mark.parametrize(
    "change, sentence",
    [({"branch": "both"}, "set transfer.branch to mixed"), ({"window_dropout": 0.5}, "set transfer.window_dropout")],
    ids=["branch", "dropout"],
)
def test_an_encoder_s_transfer_is_checked_before_its_data(change, sentence, tmp_path):
    settings = encoder_settings("pure", tmp_path)
    settings["stages"]["transfer"] |= change
    settings["data"]["dataset"] = str(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match=sentence):
        linearize.run(settings)
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


def test_an_encoder_has_no_scale_on_the_key_s_side_beside_a_window(tmp_path):
    teacher = make_bert_directory(tmp_path / "teacher")
    with pytest.raises(UserError, match="an encoder can only have with window 0 and sinks 0") as caught:
        linearize.convert(teacher, {"type": "cosine", "window": 4, "scale_side": "key"})
    assert "\n" not in str(caught.value)
