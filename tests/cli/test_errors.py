"""Bad input: exit code 2, one sentence on stderr, nothing half-written; Ctrl-C: exit code 130, and the run goes on."""

import json
import shutil
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_runs import make_teacher_directory, tiny_config, write_text

from linearize.cli import main
from linearize.training.checkpointing import latest_checkpoint
from linearize.training.log import TrainingLog, read_log


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A teacher, text and a cache of tokenised data for all tests here."""
    root = tmp_path_factory.mktemp("inputs")
    make_teacher_directory(root / "teacher")
    write_text(root / "text.jsonl")
    return root


@pytest.fixture
def config(inputs, tmp_path):
    return tiny_config(inputs / "teacher", inputs / "text.jsonl", tmp_path / "out", inputs / "cache")


@pytest.fixture
def call(tmp_path, capsys):
    """Run the command line; with settings, `linearize run` on them. Returns the exit code and stderr's last line."""

    def run(*arguments, settings=None):
        if settings is not None:
            (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
            arguments = ("run", str(tmp_path / "config.yaml"), *arguments)
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("linearize: ")]
        assert len(lines) <= 1
        return code, lines[0] if lines else ""

    return run


def with_teacher(inputs, tmp_path, **changes):
    """A copy of the teacher's config alone, with changes."""
    values = json.loads((inputs / "teacher" / "config.json").read_text())
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps({**values, **changes}))
    return tmp_path / "odd"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--transfer.learning_rate", "1e400"], "a number"),
        (["--attention.type", "gated"], "unknown attention 'gated'"),
        (["--attention", "gated"], "linear"),
        (["--attention.window", "-1"], "window is -1"),
        (["--attention.sinks", "-2"], "sinks is -2"),
        (["--attention.feature_dim", "0"], "feature_dim is 0"),
        (["--attention.feature_dim", "64"], "feature_dim 64 is wider than the head dimension 16"),
        (["--attention.window", "wide"], "window"),
        (["--softmax_layers", "7"], "layers 0 to 1"),
        (["--softmax_layers", "0,-1"], "no converted layer to train"),
        (["--sliding_window", "wide"], "sliding_window is 'wide', but it must be one of keep, lift"),
        (["--data.sequence_length", "512"], "the teacher's context is 256 tokens"),
        (["--evaluation.sequence_length", "512"], "evaluation.sequence_length is 512"),
        (["--transfer.tokens_per_step", "50"], "multiple of"),
        (["--data.dataset", "missing.jsonl"], "missing.jsonl"),
        (["--data.text_field", "body"], "body"),
        (["--evaluation.texts", "missing.txt"], "missing.txt"),
        (["--evaluation.tasks", "piqa", "--evaluation.include_path", "nowhere"], "nowhere"),
        (["--report_to", "crayon"], "unknown tracker 'crayon'"),
        (["--finetune.lora_targets", "q_prj"], "no linear layer named q_prj"),
        (["--dtype", "float16"], "finetuning in float16"),
        (["--model_name_or_path", "missing/model.gguf"], "there is no file missing/model.gguf"),
        (["--overwrite", "--resume_from_checkpoint"], "choose one"),
        (["--seed", "many"], "seed is 'many'"),
    ],
)
def test_wrong_settings(call, config, tmp_path, monkeypatch, flags, says):
    monkeypatch.chdir(tmp_path)
    code, sentence = call(*flags, settings=config)
    assert code == 2
    assert says in sentence
    assert not (tmp_path / "out").exists()


def test_triton_where_it_cannot_run(call, config, tmp_path, monkeypatch):
    monkeypatch.setattr("linearize.kernels.triton_support.INTERPRETING", False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, sentence = call("--op_backend", "triton", settings=config)
    assert code == 2 and "op_backend is triton, but Triton needs a GPU" in sentence
    assert not (tmp_path / "out").exists()


def test_unknown_settings_in_a_file(call, config, tmp_path):
    code, sentence = call(settings={**config, "windw": 3})
    assert code == 2 and "Unknown setting windw" in sentence
    code, sentence = call(settings={**config, "attention": {"type": "linear", "windw": 3}})
    assert code == 2 and "attention.windw" in sentence
    assert not (tmp_path / "out").exists()


def test_an_unknown_task_is_refused_before_training(call, config, tmp_path):
    code, sentence = call("--evaluation.tasks", "no_such_task", settings=config)
    assert code == 2 and "no_such_task" in sentence
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_made(call, inputs, tmp_path):
    (tmp_path / "file").write_text("")
    code, sentence = call("convert", inputs / "teacher", tmp_path / "file" / "out")
    assert code == 2 and "Not a directory" in sentence


def test_unknown_flag_and_unknown_command(call):
    assert call("run", "--transfer.tokns", "5")[0] == 2
    assert call("translate")[0] == 2


def test_a_gpu_that_is_not_there(call, config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, sentence = call("--device", "cuda", settings=config)
    assert code == 2 and "no GPU" in sentence


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "opt"}, "opt model"),
        ({"model_type": "no_such_model"}, "no_such_model"),
        ({"num_key_value_heads": 3}, "do not divide"),
        ({"model_type": "mistral", "sliding_window": 1}, "sliding_window is 1, but it must be at least 2 tokens"),
        ({"model_type": "mistral", "sliding_window": "wide"}, "holds a value that it cannot have"),
        ({}, "weights"),
    ],
)
def test_wrong_teachers(call, config, inputs, tmp_path, changes, says):
    teacher = with_teacher(inputs, tmp_path, **changes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (teacher / name).write_bytes((inputs / "teacher" / name).read_bytes())
    code, sentence = call(settings={**config, "model_name_or_path": str(teacher)})
    assert code == 2
    assert says in sentence
    assert not (tmp_path / "out").exists()
    code, sentence = call("convert", teacher, tmp_path / "converted")
    assert code == 2 and says in sentence
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda teacher: (teacher / "tokenizer.json").write_text("{}"), "the tokenizer of"),
        (lambda teacher: [path.unlink() for path in teacher.glob("tokenizer*")], "no tokenizer"),
        (
            lambda teacher: (teacher / "config.json").write_text(
                (teacher / "config.json").read_text().replace('"hidden_size": 32', '"hidden_size": 64')
            ),
            "other shapes",
        ),
    ],
    ids=["damaged tokenizer", "no tokenizer", "another config"],
)
def test_an_incomplete_teacher(call, inputs, tmp_path, damage, says):
    teacher = tmp_path / "damaged"
    shutil.copytree(inputs / "teacher", teacher)
    damage(teacher)
    code, sentence = call("convert", teacher, tmp_path / "converted")
    assert code == 2 and says in sentence
    assert not (tmp_path / "converted").exists()


def test_a_directory_that_is_no_model(call, config, tmp_path):
    (tmp_path / "empty").mkdir()
    code, sentence = call(settings={**config, "model_name_or_path": str(tmp_path / "empty")})
    assert code == 2 and "config.json" in sentence


def test_a_damaged_weight_file(call, inputs, config, tmp_path):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for file in (inputs / "teacher").iterdir():
        (teacher / file.name).write_bytes(file.read_bytes())
    weights = (teacher / "model.safetensors").read_bytes()
    (teacher / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    code, sentence = call(settings={**config, "model_name_or_path": str(teacher)})
    assert code == 2 and "damaged" in sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content",
    [b"not a model", b"GGUF" + b"\x00" * 64, b"GGUF\x03\x00\x00\x00" + b"\xff" * 64],
    ids=["text", "zeros", "ones"],
)
def test_a_broken_gguf_file(call, config, tmp_path, content):
    (tmp_path / "broken.gguf").write_bytes(content)
    code, sentence = call(settings={**config, "model_name_or_path": str(tmp_path / "broken.gguf")})
    assert code == 2 and "broken.gguf" in sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "says"), [("", "empty"), ('{"text": "too short"}\n', "sequence"), ("{oops\n", "text.jsonl")]
)
def test_wrong_data_files(call, config, tmp_path, content, says):
    (tmp_path / "text.jsonl").write_text(content)
    config["data"]["dataset"] = str(tmp_path / "text.jsonl")
    code, sentence = call(settings=config)
    assert code == 2
    assert says in sentence
    assert not (tmp_path / "out").exists()


def test_training_text_is_not_held_out(call, config, inputs, tmp_path):
    copy = tmp_path / "copy.jsonl"
    shutil.copy(inputs / "text.jsonl", copy)
    code, sentence = call("--evaluation.texts", copy, settings=config)
    assert code == 2 and "copy.jsonl is part of the training data" in sentence
    assert not (tmp_path / "out").exists()


def test_an_output_directory_that_holds_a_run(call, config, tmp_path):
    (tmp_path / "out" / "logs").mkdir(parents=True)
    (tmp_path / "out" / "logs" / "transfer.jsonl").write_text("mine")
    code, sentence = call(settings=config)
    assert code == 2
    assert "--overwrite" in sentence and "--resume_from_checkpoint" in sentence
    assert (tmp_path / "out" / "logs" / "transfer.jsonl").read_text() == "mine"


def test_an_output_that_is_a_file(call, config, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert call(settings=config)[0] == 2
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("command", ["transfer", "finetune", "evaluate", "chat", "info", "push"])
def test_commands_on_what_is_not_converted(call, inputs, tmp_path, command):
    rest = {
        "transfer": [tmp_path / "o", "--data", inputs / "text.jsonl"],
        "finetune": [tmp_path / "o", "--data", inputs / "text.jsonl"],
        "evaluate": ["--text", inputs / "text.jsonl"],
        "push": ["me/model"],
    }
    code, sentence = call(command, tmp_path / "nothing", *rest.get(command, []))
    assert code == 2 and "nothing" in sentence
    if command in ("transfer", "finetune", "info", "push"):
        code, sentence = call(command, inputs / "teacher", *rest.get(command, []))
        assert code == 2 and "linearize convert" in sentence


def test_running_out_of_memory_says_what_to_lower(call, config, monkeypatch):
    def no_memory(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("linearize.stages.transfer.transfer_attention", no_memory)
    code, sentence = call("--transfer.batch_size", "2", settings=config)
    assert code == 2
    assert (
        "attention transfer" in sentence and "transfer.batch_size (now 2)" in sentence and "load_in_4bit" in sentence
    )
    monkeypatch.setattr("linearize.stages.finetuning.finetune", no_memory)
    code, sentence = call("--transfer", "none", "--overwrite", settings=config)
    assert code == 2
    assert "finetune (finetuning)" in sentence and "gradient_checkpointing" in sentence


def test_bugs_keep_their_trace(call, config, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("a bug")

    monkeypatch.setattr("linearize.stages.transfer.transfer_attention", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        call(settings=config)


def test_a_full_disk_while_saving_leaves_the_checkpoints(call, config, tmp_path, monkeypatch):
    import transformers.modeling_utils

    write = transformers.modeling_utils.safe_save_file

    def full(tensors, path, *arguments, **options):
        if ".final." in str(path):
            write(dict(list(tensors.items())[:1]), path, *arguments, **options)
            raise OSError(28, "No space left on device")
        write(tensors, path, *arguments, **options)

    config["evaluation"] = None
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(transformers.modeling_utils, "safe_save_file", full)
        code, sentence = call(settings=config)
    assert code == 2
    assert "space" in sentence
    assert not (out / "final").exists()
    whole = {"config.yaml", "logs", "plots", "checkpoints", "transfer", "adapter"}
    assert {path.name for path in out.iterdir()} == whole
    assert latest_checkpoint(out / "checkpoints" / "transfer") and latest_checkpoint(out / "checkpoints" / "finetune")
    code, _ = call("--resume_from_checkpoint", settings=config)
    assert code == 0
    assert (out / "final" / "model.safetensors").is_file()


@pytest.mark.parametrize("stage", ["transfer", "finetune"])
def test_control_c_leaves_a_checkpoint_and_resume_goes_on(call, config, tmp_path, monkeypatch, stage):
    config["evaluation"] = None
    whole = {**config, "output_dir": str(tmp_path / "whole")}
    assert call(settings=whole)[0] == 0

    write = TrainingLog.write

    def interrupted(log, record):
        write(log, record)
        if log.path.stem == stage and record["step"] == 1:
            signal.raise_signal(signal.SIGINT)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(TrainingLog, "write", interrupted)
        code, sentence = call(settings=config)
    assert code == 130
    assert "interrupted" in sentence
    assert latest_checkpoint(out / "checkpoints" / stage) is not None
    assert not (out / "final").exists()

    assert call("run", "--output_dir", out, "--resume_from_checkpoint")[0] == 0
    for name in ("transfer", "finetune"):
        logs = [read_log(path / "logs" / f"{name}.jsonl") for path in (out, tmp_path / "whole")]
        assert [record["loss"] for record in logs[0]] == [record["loss"] for record in logs[1]]
    ours, theirs = (load_file(path / "final" / "model.safetensors") for path in (out, tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_resuming_another_run_is_refused(call, config, tmp_path):
    config["evaluation"] = config["stages"]["finetune"] = None
    assert call(settings=config)[0] == 0
    code, sentence = call("--resume_from_checkpoint", "--attention.window", "4", settings=config)
    assert code == 2 and "attention.window" in sentence
    assert call("--resume_from_checkpoint", settings=config)[0] == 0
