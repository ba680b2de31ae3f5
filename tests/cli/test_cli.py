"""The command line: help, the commands in a row on directories, and a whole run."""

import json
import subprocess
import sys
import weakref

import pytest
import torch
import yaml
from tiny_runs import make_teacher_directory, tiny_config, write_text
from transformers import AutoModelForCausalLM, AutoTokenizer

import linearize
from linearize.cli import main
from linearize.config.record import read_record
from linearize.conversion.quantization import is_quantized
from linearize.runs.models import RunModels
from linearize.runs.report import ALL_QUANTIZED, QUANTIZED, RunReport
from linearize.runs.settings import resolve_run

COMMANDS = (
    "convert",
    "transfer",
    "finetune",
    "evaluate",
    "chat",
    "info",
    "push",
    "run",
    "select",
    "glue",
    "import",
    "diff",
    "presets",
    "export-vectors",
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    make_teacher_directory(root / "teacher", chat=True)
    write_text(root / "text.jsonl")
    write_text(root / "other.jsonl", documents=10, seed=9)
    return root


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """A whole run by `linearize run`, YAML and flags."""
    root = tmp_path_factory.mktemp("run")
    config = tiny_config(inputs / "teacher", inputs / "text.jsonl", root / "ignored", inputs / "cache")
    (root / "tiny.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert main(["run", str(root / "tiny.yaml"), "--output_dir", str(root / "out"), "--attention.sinks", "1"]) == 0
    return root / "out"


def greedy(directory, text="the river ran past"):
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer(text, return_tensors="pt")
    return model.generate(**inputs, max_new_tokens=8, max_length=None, do_sample=False)[0].tolist()


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)


def test_help_of_every_command_ends_well(capsys):
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
    assert "--transfer.tokens" in capsys.readouterr().out


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from linearize.cli import main; code = main(['--help']); "
        "heavy = [name for name in ('peft', 'datasets', 'lm_eval', 'matplotlib', 'bitsandbytes') "
        "if name in sys.modules and sys.modules[name] is not None]; print('HEAVY', code, heavy)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "HEAVY 0 []" in run.stdout


def test_a_run_leaves_its_directory(finished):
    assert {path.name for path in finished.iterdir()} == {
        "config.yaml",
        "logs",
        "plots",
        "checkpoints",
        "transfer",
        "adapter",
        "final",
        "report.json",
        "report.md",
    }
    config = resolve_run(finished / "config.yaml")
    assert config.attention["sinks"] == 1 and config.attention["window"] == 8
    assert config.attention["window_reference"] == "logsumexp"
    assert {path.name for path in (finished / "plots").iterdir()} >= {"transfer_loss.png", "finetune_loss.png"}
    record = read_record(finished / "final")
    assert record["tokens"] == {"transfer": 192, "finetune": 192}
    assert record["trained"] == {"transfer": "mechanism", "finetune": "lora"}
    report = json.loads((finished / "report.json").read_text())
    assert {name: done["steps"] for name, done in report["stages"].items()} == {"transfer": 3, "finetune": 3}
    assert report["evaluation"] == record["evaluation"]
    assert record["teacher"] == "teacher"
    assert torch.__version__.startswith(record["versions"]["torch"])
    names = [row["name"] for row in record["evaluation"]["rows"]]
    assert names[0] == "teacher" and "control" in names[1] and "student" in names
    files = {path.name for path in (finished / "final").iterdir()}
    assert {"README.md", "linearize.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]


def test_a_record_names_no_place_of_this_machine(finished, inputs):
    for name in ("linearize.json", "README.md", "config.json"):
        assert str(inputs.parent) not in (finished / "final" / name).read_text()


def test_the_card_can_be_read_by_the_hub(finished):
    from huggingface_hub import ModelCard

    card = ModelCard.load(finished / "final" / "README.md")
    assert card.data.library_name == "transformers" and "linear-attention" in card.data.tags
    assert "| teacher |" in card.text and "## Quick start" in card.text and "sequence_length: 32" in card.text
    (student,) = (row for row in read_record(finished / "final")["evaluation"]["rows"] if row["name"] == "student")
    (result,) = card.data.eval_results
    assert (result.task_type, result.metric_type, result.metric_value) == (
        "text-generation",
        "perplexity",
        student["perplexity"],
    )


def test_a_complete_run_is_not_run_again(finished, capsys):
    before = (finished / "final" / "model.safetensors").stat().st_mtime_ns
    assert main(["run", "--output_dir", str(finished), "--resume_from_checkpoint"]) == 0
    assert "complete" in capsys.readouterr().out
    assert (finished / "final" / "model.safetensors").stat().st_mtime_ns == before


def test_resuming_a_complete_run_makes_a_failed_push_good(finished, monkeypatch):
    pushed = []
    monkeypatch.setattr("linearize.hub.repository.check_token", lambda *arguments: "me")
    monkeypatch.setattr("linearize.hub.repository.push", lambda *arguments: pushed.append(arguments))
    assert main(["run", "--output_dir", str(finished), "--resume_from_checkpoint", "--push_to_hub", "me/tiny"]) == 0
    assert pushed == [(finished / "final", "me/tiny")]


def test_overwrite_replaces_the_run_and_nothing_else(inputs, tmp_path):
    config = tiny_config(inputs / "teacher", inputs / "text.jsonl", tmp_path / "out", inputs / "cache")
    config |= {"stages": {}, "evaluation": None}
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    (tmp_path / "out" / "checkpoints" / "old").write_text("old")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert main(["run", str(tmp_path / "tiny.yaml"), "--overwrite"]) == 0
    left = {"config.yaml", "logs", "final", "report.json", "report.md", "notes.txt"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == left


def test_dry_run_prints_the_plan_and_writes_nothing(inputs, tmp_path, capsys):
    config = tiny_config(inputs / "teacher", inputs / "text.jsonl", tmp_path / "out", inputs / "cache")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert main(["run", str(tmp_path / "tiny.yaml"), "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "attention" in shown and "192" in shown and "MiB" in shown
    assert not (tmp_path / "out").exists()


def test_the_commands_in_a_row(inputs, tmp_path, capsys):
    """convert, transfer, finetune, evaluate, info and chat, each on the directory that the one before left."""
    one, two, three = (str(tmp_path / name) for name in ("converted", "transferred", "finetuned"))
    teacher, text, small = (
        str(inputs / "teacher"),
        str(inputs / "text.jsonl"),
        ["--device", "cpu"],
    )
    data = ["--data", text, "--data.sequence_length", "32", "--data.cache_dir", str(inputs / "cache"), *small]
    assert main(["convert", teacher, one, "--attention.window", "8", "--softmax_layers", "[0]"]) == 0
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert config["mixer_types"] == ["softmax", "linear"] and config["mixers"]["linear"]["window"] == 8
    assert main(["convert", teacher, one]) == 2
    assert main(["transfer", one, two, *data, "--transfer.max_steps", "2", "--transfer.tokens_per_step", "32"]) == 0
    flags = [
        "--finetune.max_steps",
        "2",
        "--finetune.tokens_per_step",
        "32",
        "--finetune.lora_targets",
        "q_proj,v_proj",
    ]
    assert main(["finetune", two, three, *data, *flags]) == 0
    record = read_record(tmp_path / "finetuned" / "final")
    assert record["tokens"] == {"transfer": 64, "finetune": 64} and record["teacher"] == "teacher"
    recipe = record["recipe"]
    assert recipe["attention"]["window"] == 8 and recipe["softmax_layers"] == [0]
    assert recipe["stages"]["transfer"]["max_steps"] == recipe["stages"]["finetune"]["max_steps"] == 2
    config = json.loads((tmp_path / "finetuned" / "final" / "config.json").read_text())
    assert config["dtype"] == "float32", "the type of the teacher's weights"
    capsys.readouterr()

    other = ["--text", str(inputs / "other.jsonl"), "--sequence_length", "32", "--max_tokens", "128"]
    measure = ["evaluate", three, *other, "--teacher", teacher, "--output", str(tmp_path / "report")]
    assert main(measure) == 0
    rows = json.loads((tmp_path / "report" / "evaluation.json").read_text())["rows"]
    assert [row["name"] for row in rows][0] == "teacher" and len(rows) == 5
    assert main(["evaluate", three, *other, "--batch_size", "0"]) == 2
    assert main(["chat", three, "--prompt", "the cats", "--max_new_tokens", "4"]) == 0
    assert main(["chat", three, "--prompt", ""]) == 2
    assert len(greedy(tmp_path / "finetuned" / "final")) > 8


def test_info_as_json_and_as_tables(finished, capsys):
    assert main(["info", str(finished), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["layers"] == ["linear", "linear"] and described["teacher"] == "teacher"
    assert main(["info", str(finished)]) == 0
    assert "32,768" in capsys.readouterr().out


def test_chat_holds_a_conversation(finished, capsys, monkeypatch):
    lines = iter(["the cats", "and the snow"])

    def read(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    assert main(["chat", str(finished), "--max_new_tokens", "3", "--temperature", "0.7"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_a_quantised_run_ends_in_full_weights(inputs, tmp_path):
    make_teacher_directory(tmp_path / "teacher", hidden_size=64)
    config = tiny_config(tmp_path / "teacher", inputs / "text.jsonl", tmp_path / "out", inputs / "cache")
    config["stages"]["finetune"] |= {"gradient_checkpointing": True, "kl_weight": 0.5}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert main(["run", str(tmp_path / "tiny.yaml"), "--load_in_4bit"]) == 0
    saved = json.loads((tmp_path / "out" / "final" / "config.json").read_text())
    assert "quantization_config" not in saved and saved["dtype"] == "float32"
    assert read_record(tmp_path / "out" / "final")["evaluation"]["notes"]
    assert len(greedy(tmp_path / "out" / "final")) > 8


@pytest.mark.parametrize("room", [True, False])
def test_after_a_quantised_run_its_base_is_gone_before_the_full_weights_move(inputs, tmp_path, monkeypatch, room):
    """Where they do not fit all the same, what was saved is measured in the run's bits."""
    make_teacher_directory(tmp_path / "teacher", hidden_size=64)
    config = tiny_config(tmp_path / "teacher", inputs / "text.jsonl", tmp_path / "out", inputs / "cache")
    bases, measured = [], []
    load, finish = RunModels.first, RunReport.finish

    def loaded(self, *, quantized=True, **options):
        model = load(self, quantized=quantized, **options)
        if quantized:
            bases.append(weakref.ref(model))
        return model

    def finished(self, model):
        assert [base() for base in bases] == [None]
        measured.append(is_quantized(model))
        return finish(self, model)

    monkeypatch.setattr(RunModels, "first", loaded)
    monkeypatch.setattr(RunReport, "finish", finished)
    monkeypatch.setattr("linearize.hardware.memory_full.fits", lambda model, device: room)
    result = linearize.run({**config, "load_in_4bit": True})
    assert measured == [not room] and len(bases) == 1
    assert result.report.notes.count(QUANTIZED if room else ALL_QUANTIZED) == 1
    saved = json.loads((tmp_path / "out" / "final" / "config.json").read_text())
    assert "quantization_config" not in saved


def test_run_is_a_function_too(inputs, tmp_path):
    config = tiny_config(inputs / "teacher", inputs / "text.jsonl", tmp_path / "out", inputs / "cache")
    config["data"]["completion_only"] = False
    result = linearize.run({**config, "softmax_layers": [-1]}, {"finetune": None})
    assert list(result.stages) == ["transfer"] and result.stages["transfer"].steps == 3
    names = [row.name for row in result.report.rows]
    assert names[2:4] == ["student after conversion", "student"], "the last stage's is the finished one"
    assert result.final == tmp_path / "out" / "final" and result.final.is_dir()
