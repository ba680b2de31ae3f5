"""What a run that goes on may change and what it may not: its data and base, its settings stage by stage."""

import json
import logging
import shutil
import signal

import pytest
import torch
import yaml
from finetuning_toys import settings as finetune_settings
from finetuning_toys import stock_llama, student, token_blocks
from safetensors.torch import load_file, save_file
from tiny_models import make_student, make_teacher
from tiny_runs import make_teacher_directory, tiny_config, write_text

import linearize
from linearize import failures
from linearize.cli import main
from linearize.config.settings import TransferConfig
from linearize.config.yaml_io import resolve
from linearize.conversion.importers import checkpoint_files
from linearize.data.sequences import TokenBlocks
from linearize.errors import Terminated, UserError
from linearize.evaluation.glue.settings import GlueRunConfig
from linearize.runs.glue import GlueDirectory
from linearize.runs.settings import resolve_run
from linearize.stages.finetuning import finetune
from linearize.stages.identity import StageState, base_identity, changed_settings, data_identity
from linearize.stages.transfer import transfer_attention
from linearize.training.checkpointing import latest_checkpoint
from linearize.training.log import TrainingLog, read_log

LENGTH = 24


def other_weights(directory):
    """Other weights of the same shapes in place of a checkpoint's."""
    path = directory / "model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def blocks(seed=5):
    return TokenBlocks(torch.randint(3, 97, (10, LENGTH), generator=torch.Generator().manual_seed(seed)))


# ---- identities


def test_the_identity_of_a_base_is_that_of_its_files(tmp_path, monkeypatch):
    make_teacher().save_pretrained(tmp_path / "base")
    loaded = [linearize.convert(tmp_path / "base", dtype=dtype) for dtype in ("float32", "bfloat16")]
    before = base_identity(loaded[0])
    assert before == base_identity(loaded[1]) and before.startswith("sha256 ")
    other_weights(tmp_path / "base")
    assert base_identity(loaded[0]) != before
    # A large checkpoint is sampled.
    monkeypatch.setattr(checkpoint_files, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(checkpoint_files, "SAMPLE_EVERY", 1 << 13)
    sampled = base_identity(loaded[0])
    other_weights(tmp_path / "base")
    assert base_identity(loaded[0]) != sampled


def test_the_identity_of_a_model_in_memory_leaves_the_mechanism_out():
    model = make_student(make_teacher())
    before = base_identity(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.mixer.feature_map_q.weight.add_(1.0)
        assert base_identity(model) == before
        model.model.layers[0].self_attn.q_proj.weight.mul_(1.1)
    assert base_identity(model) != before


def test_the_identity_of_data():
    assert data_identity(blocks(5)) == data_identity(blocks(5)) != data_identity(blocks(6))
    assert data_identity(TokenBlocks(blocks().input_ids, identity="key")) == "key"
    masked = blocks().input_ids.clone()
    masked[0, 0] = -100
    assert data_identity(TokenBlocks(blocks().input_ids, masked)) != data_identity(blocks())
    rows = [{"input_ids": row} for row in blocks().input_ids]
    assert data_identity(rows) != data_identity(rows[1:])


# ---- stages


def test_transfer_refuses_other_data_and_another_base(tmp_path):
    config = TransferConfig(max_steps=2, tokens_per_step=LENGTH, save_steps=1)
    transfer_attention(make_student(make_teacher()), blocks(), config, output_dir=tmp_path)
    longer = TransferConfig(max_steps=4, tokens_per_step=LENGTH, learning_rate=1e-3)

    def go_on(seed=0, data=5, settings=longer):
        model = make_student(make_teacher(seed))
        return transfer_attention(model, blocks(data), settings, output_dir=tmp_path, resume=True)

    with pytest.raises(UserError, match="cannot resume .* it was trained with other training data; set"):
        go_on(data=6)
    with pytest.raises(UserError, match="cannot resume .* it was trained with another base model .*; set"):
        go_on(seed=1)
    assert go_on().steps == 4
    with pytest.raises(UserError, match="4 steps are done, and the settings ask for 3 in all"):
        go_on(settings=TransferConfig(max_steps=3, tokens_per_step=LENGTH))


def test_finetuning_refuses_others_and_goes_on_at_the_rate_of_now(tmp_path):
    base = stock_llama(tmp_path / "base")

    def go_on(train=None, **changes):
        config = finetune_settings(max_steps=4, save_steps=1, **changes)
        return finetune(
            student(base), train or token_blocks(), config, output_dir=tmp_path / "out", resume=True, seed=1
        )

    first = finetune_settings(max_steps=2, save_steps=1)
    finetune(student(base), token_blocks(), first, output_dir=tmp_path / "out", seed=1)
    with pytest.raises(UserError, match="other training data"):
        go_on(token_blocks(seed=9))
    result = go_on(learning_rate=1e-4, mixer_learning_rate=2e-4, gradient_checkpointing=True, batch_size=4)
    rates = {record["step"]: record["learning_rate"] for record in read_log(result.log_path)}
    assert rates[1] > 5e-3 and rates[3] == pytest.approx(1e-4 * 2 / 4) and rates[4] == pytest.approx(1e-4 / 4)
    other_weights(tmp_path / "base")
    with pytest.raises(UserError, match="another base model"):
        go_on()


# ---- settings


STAGES = {
    "transfer": {"kind": "transfer", "tokens": 1000},
    "finetune": {"kind": "train", "weights": "lora", "tokens": 1000},
}
WAITING = dict.fromkeys(("transfer", "finetune"), StageState.WAITING)
BEGUN = {**WAITING, "transfer": StageState.OPEN}
LATER = {"transfer": StageState.CLOSED, "finetune": StageState.OPEN}


@pytest.mark.parametrize(
    ("changes", "stages", "refused"),
    [
        ({"transfer.batch_size": 4, "load_in_4bit": True, "dtype": "float32", "device": "cpu"}, LATER, []),
        ({"finetune.gradient_checkpointing": True, "finetune.logits_chunk": 16, "finetune.save_steps": 3}, LATER, []),
        ({"finetune.lora_rank": 4, "transfer.loss": "mse"}, WAITING, []),
        ({"finetune.lora_rank": 4, "transfer.loss": "mse"}, BEGUN, ["transfer.loss"]),
        ({"transfer.learning_rate": 1e-3, "transfer.tokens": 9, "transfer.warmup_steps": 1}, BEGUN, []),
        ({"transfer.learning_rate": 1e-3, "transfer.tokens": 9}, LATER, ["transfer.tokens", "transfer.learning_rate"]),
        ({"transfer.tokens_per_step": 1024}, BEGUN, ["transfer.tokens_per_step"]),
        ({"finetune.learning_rate": 1e-5, "finetune.max_steps": 9}, LATER, []),
        ({"finetune.lora_rank": 4}, LATER, ["finetune.lora_rank"]),
        ({"finetune": None}, BEGUN, []),
        ({"transfer": None}, BEGUN, ["transfer"]),
        ({"seed": 1, "attention.window": 5, "data.max_tokens": 7}, WAITING, ["seed", "attention.window"]),
        ({"evaluation.max_tokens": 5, "evaluation": None}, LATER, []),
    ],
)
def test_settings_are_compared_stage_by_stage(changes, stages, refused):
    old = resolve_run({"model_name_or_path": "teacher", "stages": STAGES})
    found = changed_settings(old, resolve_run(old, changes), stages, ("device",))
    assert set(refused) <= set(found)
    assert all(name in refused or name.startswith("data.") for name in found)


def test_a_table_of_glue_keeps_its_batch():
    old = GlueRunConfig(models=["a"])
    for name, value in (("batch_size", 16), ("precision", "float32"), ("warmup_ratio", 0.2)):
        new = resolve(old, {f"training.{name}": value}, settings=GlueRunConfig)
        found = changed_settings(old, new, {}, GlueDirectory.free_to_change, GlueDirectory.fixed)
        assert found == [f"training.{name}"]
    free = {"training.micro_batch_size": 4, "training.learning_rates": [1e-5], "training.eval_batch_size": 2}
    new = resolve(old, free, settings=GlueRunConfig)
    assert changed_settings(old, new, {}, GlueDirectory.free_to_change, GlueDirectory.fixed) == []
    assert new.training.stage(100, 32, 1e-5, 2).plan(32, 2).accumulation == 4
    with pytest.raises(UserError, match="micro_batch_size is 5, but it must divide the 16 examples"):
        resolve(old, {"training.micro_batch_size": 5}, settings=GlueRunConfig).training.stage(100, 32, 1e-5, 2)


# ---- runs


def changed_stages(config, **changes):
    """The settings of a run with others in some of its stages."""
    stages = {name: {**stage, **changes.get(name, {})} for name, stage in config["stages"].items()}
    return {**config, "stages": stages}


@pytest.fixture
def config(tmp_path):
    make_teacher_directory(tmp_path / "teacher")
    write_text(tmp_path / "text.jsonl")
    settings = tiny_config(tmp_path / "teacher", tmp_path / "text.jsonl", tmp_path / "out", tmp_path / "cache")
    return settings | {"evaluation": None}


@pytest.fixture
def call(tmp_path, capsys):
    """`linearize run` on settings and flags; the exit code and what is said on stderr."""

    def run(settings, *flags):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        capsys.readouterr()
        code = main(["run", str(tmp_path / "config.yaml"), *map(str, flags)])
        return code, "".join(x for x in capsys.readouterr().err.splitlines() if x.startswith("linearize: "))

    return run


def at_step(stage, step, action, monkeypatch):
    """Does something after a step of a stage was logged."""
    write = TrainingLog.write

    def write_and_act(log, record):
        write(log, record)
        if log.path.stem == stage and record["step"] == step:
            action()

    monkeypatch.setattr(TrainingLog, "write", write_and_act)


def fail(error):
    def raise_it():
        raise error

    return raise_it


def test_a_run_goes_on_as_its_advice_says(call, config, tmp_path, monkeypatch):
    """Out of memory in stage 1, then NaN in stage 2: each time what the sentence asks for is taken."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        at_step("transfer", 3, fail(torch.OutOfMemoryError("CUDA out of memory")), patch)
        code, sentence = call(changed_stages(config, transfer={"batch_size": 2}))
    assert code == 2 and "lower transfer.batch_size (now 2)" in sentence and "load_in_4bit" in sentence
    assert latest_checkpoint(out / "checkpoints" / "transfer").name == "step-2"
    # The rank is of a stage that has not begun.
    changed = changed_stages(config, transfer={"batch_size": 1}, finetune={"lora_rank": 2})
    with monkeypatch.context() as patch:
        at_step("finetune", 3, fail(UserError("finetuning stopped: the loss is nan")), patch)
        code, sentence = call(changed, "--resume_from_checkpoint")
    assert code == 2 and "nan" in sentence, sentence
    assert latest_checkpoint(out / "checkpoints" / "finetune").name == "step-2"
    repository = linearize.load_student(out / "transfer")
    assert json.loads((out / "transfer" / "linearize.json").read_text())["tokens"] == {"transfer": 192}
    tensors = load_file(out / "checkpoints" / "transfer" / "step-3" / "mixers.safetensors")
    assert all(torch.equal(tensors[name], x) for name, x in repository.mixer_state_dict().items())

    code, sentence = call(changed, "--resume_from_checkpoint", "--finetune.lora_rank", 4)
    assert code == 2 and "finetune.lora_rank" in sentence
    flags = ["--finetune.learning_rate", 1e-6, "--finetune.gradient_checkpointing", "--finetune.max_steps", 5]
    code, sentence = call(changed, "--resume_from_checkpoint", *flags)
    assert code == 0, sentence
    records = read_log(out / "logs" / "finetune.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5] and records[-1]["learning_rate"] < 1e-6
    assert call(changed, "--resume_from_checkpoint", *flags[:-1], 6)[0] == 0  # more, after the end
    assert read_log(out / "logs" / "finetune.jsonl")[-1]["step"] == 6
    assert json.loads((out / "final" / "linearize.json").read_text())["tokens"] == {"transfer": 192, "finetune": 384}


def test_a_run_refuses_what_changed_under_its_names(call, config, tmp_path):
    config["stages"]["finetune"] = None
    assert call(config)[0] == 0
    shutil.rmtree(tmp_path / "out" / "final")
    text = (tmp_path / "text.jsonl").read_text()
    write_text(tmp_path / "text.jsonl", seed=1)
    code, sentence = call(config, "--resume_from_checkpoint")
    assert code == 2 and "holds a run with other training data, though the names are the same" in sentence
    (tmp_path / "text.jsonl").write_text(text)
    other_weights(tmp_path / "teacher")
    code, sentence = call(config, "--resume_from_checkpoint")
    assert code == 2 and "holds a run with another base model" in sentence
    assert call(config, "--overwrite")[0] == 0


@pytest.mark.parametrize("stage", ["transfer", "finetune"])
def test_sigterm_leaves_a_checkpoint_and_exit_code_143(call, config, tmp_path, monkeypatch, stage):
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        at_step(stage, 1, lambda: signal.raise_signal(signal.SIGTERM), patch)
        code, sentence = call(config)
    assert code == 143 and sentence.startswith("linearize: terminated")
    assert signal.getsignal(signal.SIGTERM) == before
    assert latest_checkpoint(tmp_path / "out" / "checkpoints" / stage) is not None
    assert call(config, "--resume_from_checkpoint")[0] == 0


def test_sigterm_between_stages_leaves_nothing_half_written(call, config, tmp_path, monkeypatch):
    import linearize.hub.repository

    def terminated(directory, record, config, **options):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(linearize.hub.repository, "write_record", terminated)
    assert call(config | {"stages": {"transfer": config["stages"]["transfer"]}})[0] == 143
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.yaml", "logs", "plots", "checkpoints"}


def test_a_damaged_checkpoint_of_stage_2_gives_way(tmp_path, caplog):
    base = stock_llama(tmp_path / "base")
    config = finetune_settings(max_steps=4, save_steps=2)
    whole = finetune(student(base), token_blocks(), config, output_dir=tmp_path / "out")
    path = tmp_path / "out" / "checkpoints" / "finetune" / "step-4" / "scheduler.pt"
    path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        rest = finetune(student(base), token_blocks(), config, output_dir=tmp_path / "out", resume=True)
    assert "step-4 is damaged (scheduler.pt has" in caplog.text and "going on from step-2" in caplog.text
    assert rest.losses == whole.losses[2:]


def test_a_sentence_of_any_process_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(failures, "PATIENCE", 0)
    monkeypatch.setenv("RANK", "3")
    assert failures.guarded(fail(UserError("this disk alone is full"))) == 2
    assert "linearize: this disk alone is full (process 3)" in capsys.readouterr().err
    assert failures.guarded(fail(Terminated())) == 143
