"""Pretraining: a tiny GPT-2 from scratch on the demo text, what it leaves, how it goes on, and what it refuses."""

import dataclasses
import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from pretraining_toys import report_of
from safetensors.torch import load_file
from tiny_runs import make_tokenizer, write_text
from torch.utils.data import Subset
from transformers import AutoModelForCausalLM, AutoTokenizer

import linearize
from linearize import UserError
from linearize.cli import main
from linearize.cli.flags import field_help, setting_parameters, stage_parameters
from linearize.config.architecture import ArchitectureConfig, TokenizerConfig
from linearize.config.full_training import FullTrainingConfig
from linearize.config.presets import all_presets
from linearize.config.yaml_io import write_config
from linearize.conversion.own_tokenizers import END_OF_TEXT, train_tokenizer
from linearize.conversion.random_models import random_model
from linearize.data import load_text_blocks
from linearize.evaluation import perplexity
from linearize.runs.engine import run
from linearize.runs.settings import RunConfig, flat_names, resolve_run, run_values
from linearize.stages.full_trainers import FullTrainer, decay_groups
from linearize.training.log import read_log

DEMO_TEXT = Path(linearize.__file__).parent / "demo_text"


def tiny(root, name="out", **changes):
    """Two layers, 32 wide, with a tokenizer of 400 entries; `changes` as dotted names with `__` for the dot."""
    values = {
        "output_dir": str(root / name),
        "device": "cpu",
        "tokenizer": {"source": "train", "vocab_size": 400, "characters": 200_000},
        "architecture": {"n_layer": 2, "n_head": 2, "n_embd": 32},
        "attention": None,
        "data": {
            "dataset": str(DEMO_TEXT / "train.jsonl.gz"),
            "validation": str(DEMO_TEXT / "validation.jsonl.gz"),
            "sequence_length": 32,
            "max_tokens": 40_000,
            "cache_dir": str(root / "cache"),
        },
        "stages": {
            "training": {
                "kind": "train",
                "weights": "all",
                "max_steps": 12,
                "batch_size": 4,
                "tokens_per_step": 256,
                "learning_rate": 2e-2,
                "warmup_steps": 2,
                "logging_steps": 1,
                "save_steps": 5,
                "eval_steps": 6,
                "eval_tokens": 2048,
            }
        },
        "evaluation": None,
    }
    if "model_name_or_path" in changes:
        del values["architecture"], values["tokenizer"]
    return resolve_run(values, {key.replace("__", "."): value for key, value in changes.items()})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("pretraining")


@pytest.fixture(scope="module")
def result(root):
    return run(tiny(root))


def test_the_loss_falls_and_the_report_says_what_was_done(root, result):
    report, done = report_of(result), result.stages["training"]
    losses = [loss for _, loss in report.losses]
    assert losses[0] == pytest.approx(math.log(report.vocab_size), abs=0.3)  # random weights: uniform
    assert losses[-1] < losses[0] - 0.3
    assert (report.steps, report.tokens, report.vocab_size) == (12, 12 * 256, 400)
    assert done.figures["tokens_per_second"] == pytest.approx(done.tokens / done.seconds)
    assert [step for step, _ in report.validation] == [6, 12]
    assert report.validation[-1][1] == report.perplexity < report.validation[0][1]
    stored = json.loads((root / "out" / "report.json").read_text())["stages"]
    assert stored["training"].items() >= json.loads(json.dumps(done.figures)).items() and len(stored) == 1


def test_final_is_an_ordinary_repository_with_the_reported_perplexity(root, result):
    model = AutoModelForCausalLM.from_pretrained(result.final)
    tokenizer = AutoTokenizer.from_pretrained(result.final)
    assert type(model).__module__.startswith("transformers.") and model.config.use_cache
    assert model.num_parameters() == report_of(result).parameters
    assert tokenizer.eos_token == END_OF_TEXT and tokenizer.model_max_length == 32
    blocks = load_text_blocks(DEMO_TEXT / "validation.jsonl.gz", tokenizer, 32)
    measured = perplexity(model, Subset(blocks, range(2048 // 32)), arm=None)
    assert measured.perplexity == pytest.approx(report_of(result).perplexity, rel=1e-5)
    assert measured.tokens == report_of(result).perplexity_tokens


def test_the_learning_rate_rises_and_ends_at_its_floor(root, result):
    rates = [record["learning_rate"] for record in read_log(root / "out" / "logs" / "training.jsonl")]
    assert rates[0] < rates[1] < rates[2] == max(rates) == pytest.approx(2e-2)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 2e-3 < rates[-1] < 3e-3  # the step after it would have the floor


def test_resuming_continues_bit_for_bit(root, monkeypatch, capsys):
    """Dropout on; stopped by Ctrl-C between two lines of the log, from a checkpoint that is no measurement."""
    changes = {"architecture__dropout": 0.1, "training__logging_steps": 3}
    whole = run(tiny(root, "whole", **changes))
    losses, calls = FullTrainer.losses, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 13:  # in step 7, of 2 micro-batches each
            signal.raise_signal(signal.SIGINT)
        return losses(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FullTrainer, "losses", interrupted)
        run(tiny(root, "parts", **changes))
    assert (root / "parts" / "checkpoints" / "training" / "step-7").is_dir()
    assert not (root / "parts" / "final").exists()
    rest = run(tiny(root, "parts", resume_from_checkpoint=True, **changes))
    ours, theirs = (load_file(run.final / "model.safetensors") for run in (rest, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (
        report_of(rest).losses == report_of(whole).losses and report_of(rest).validation == report_of(whole).validation
    )
    capsys.readouterr()
    again = run(tiny(root, "parts", resume_from_checkpoint=True, **changes))
    assert "is complete" in capsys.readouterr().out
    assert report_of(again).perplexity == report_of(rest).perplexity


def test_mixed_precision_trains_float32_weights(root, result):
    mixed = run(tiny(root, "bfloat16", training__precision="bfloat16"))
    for (_, ours), (_, theirs) in zip(report_of(mixed).losses, report_of(result).losses, strict=True):
        assert ours != theirs and ours == pytest.approx(theirs, rel=0.02)
    weights = load_file(mixed.final / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_micro_batches_do_not_change_the_steps(root, result):
    other = run(tiny(root, "accumulated", training__batch_size=1, training__max_steps=3))
    one = run(tiny(root, "at_once", training__batch_size=8, training__max_steps=3))
    assert [loss for _, loss in report_of(other).losses] == pytest.approx(
        [loss for _, loss in report_of(one).losses], rel=1e-4
    )


def test_weight_decay_is_for_matrices_alone():
    config = tiny(Path("nowhere"))
    model = random_model(config, make_tokenizer())
    decayed, plain, mixers = decay_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert {names[id(parameter)].rpartition(".")[2] for parameter in plain["params"]} == {"weight", "bias"}
    assert all("bias" in names[id(p)] or "ln_" in names[id(p)] for p in plain["params"])
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.attn.c_attn.weight"} <= {
        names[id(parameter)] for parameter in decayed["params"]
    }


def test_a_trained_tokenizer_writes_anything_and_ends_texts():
    tokenizer = train_tokenizer(iter(["the river ran past the red house"] * 20), 270)
    text = "  The river:\tnaïve Ωmega\n\n🦊"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 270 and tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    assert tokenizer(f"a{END_OF_TEXT}")["input_ids"][-1] == 0


def test_a_tokenizer_can_be_loaded(root, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    words = {"source": "load", "name_or_path": str(tmp_path / "tokenizer")}
    changes = {"tokenizer": words, "training__max_steps": 1}
    done = run(
        tiny(root, "loaded", data__validation=None, data__validation_documents=0, training__eval_steps=None, **changes)
    )
    assert report_of(done).vocab_size == len(tokenizer) and report_of(done).perplexity is None
    assert AutoTokenizer.from_pretrained(done.final).eos_token == "</s>"


BAD = {
    "an unknown setting": ({"architecture": {"width": 3}}, "Unknown setting width"),
    "heads": ({"architecture": {"n_embd": 30, "n_head": 4}}, "architecture.n_embd is 30"),
    "tokens_per_step": ({"training": {"tokens_per_step": 100}}, "training.tokens_per_step is 100"),
    "vocabulary": ({"tokenizer": {"vocab_size": 100}}, "tokenizer.vocab_size is 100"),
    "tokenizer": ({"tokenizer": {"source": "make"}}, "one of load, train"),
    "no such tokenizer": ({"tokenizer": {"source": "load", "name_or_path": "./nowhere"}}, "nowhere"),
    "no such data": ({"data": {"dataset": "nowhere.jsonl"}}, "nowhere.jsonl does not exist"),
    "short text": ({"data": {"sequence_length": 4096, "max_tokens": 300}, "training": {"batch_size": 1}}, "tokens"),
    "beta": ({"training": {"adam_beta2": 1.5}}, "training.adam_beta2 is 1.5"),
    "no validation": ({"data": {"validation": "none", "validation_documents": 0}}, "training.eval_steps is set"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case, root, tmp_path, capsys):
    changes, says = BAD[case]
    write_config(tiny(root), tmp_path / "tiny.yaml")
    flags = ["--output_dir", str(tmp_path / "out")]
    for name, value in changes.items():
        for key, inner in value.items() if isinstance(value, dict) else [("", value)]:
            flags += [f"--{name}.{key}".rstrip("."), str(inner)]
    if case == "an unknown setting":
        (tmp_path / "tiny.yaml").write_text("architecture: {width: 3}\n")
        flags = []
    if case == "short text":
        flags += ["--training.tokens_per_step", "4096"]
    assert main(["run", str(tmp_path / "tiny.yaml"), *flags]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("linearize: ") == 1 and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_chat_records_train_no_tokenizer(root, tmp_path):
    write_text(tmp_path / "text.jsonl")
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    with pytest.raises(UserError, match="plain text"):
        run(tiny(root, "chat", data__dataset=str(tmp_path / "chat.jsonl")))


def test_a_checkpoint_of_other_text_is_refused(root, tmp_path):
    """Text of as many sequences in the same place."""
    text = tmp_path / "text.jsonl"
    write_text(text)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    words = {"source": "load", "name_or_path": str(tmp_path / "tokenizer")}
    changes = {"tokenizer": words, "data__dataset": str(text)}
    changes |= {"training__max_steps": 2, "training__save_steps": 1, "training__eval_steps": None}
    changes |= {"data__validation": None, "data__validation_documents": 0}
    run(tiny(tmp_path, **changes))
    (tmp_path / "out" / "report.json").unlink()
    run(tiny(tmp_path, resume_from_checkpoint=True, **changes))
    (tmp_path / "out" / "report.json").unlink()
    lines = text.read_text().splitlines()
    text.write_text("\n".join(reversed(lines)) + "\n")
    with pytest.raises(UserError, match="holds a run with other training data"):
        run(tiny(tmp_path, resume_from_checkpoint=True, **changes))
    (tmp_path / "out" / "logs" / "inputs.json").unlink()  # as a run that an earlier version began
    shutil.rmtree(tmp_path / "out" / "final")
    with pytest.raises(UserError, match="trained with other training data; set"):
        run(tiny(tmp_path, resume_from_checkpoint=True, **changes))


def test_a_directory_that_holds_a_run_is_refused(root, result):
    with pytest.raises(UserError, match="already holds a run"):
        run(tiny(root))
    with pytest.raises(UserError, match="other settings .*architecture.n_layer"):
        run(tiny(root, resume_from_checkpoint=True, architecture__n_layer=3))


def test_overwrite_replaces_the_run_and_nothing_else(root):
    (root / "again").mkdir()
    (root / "again" / "mine.txt").write_text("kept")
    run(tiny(root, "again", training__max_steps=2))
    run(tiny(root, "again", training__max_steps=1, overwrite=True))
    report = json.loads((root / "again" / "report.json").read_text())
    assert report["stages"]["training"]["steps"] == 1
    assert (root / "again" / "mine.txt").read_text() == "kept"


def test_presets_are_valid_and_small_is_gpt2():
    names = {preset.name for preset in all_presets() if "architecture" in preset.values()}
    assert {"gpt2_small_pretrain", "gpt2_mini_pretrain"} <= names
    for name in names:
        config = resolve_run(name)
        for stage in config.stages.values():
            plan = stage.plan(config.data.sequence_length)
            assert plan.tokens_per_step == stage.tokens_per_step
    small = resolve_run("gpt2_small_pretrain")
    shape = small.architecture
    assert (shape.n_layer, shape.n_head, shape.n_embd) == (12, 12, 768)
    assert small.data.sequence_length == 1024


def test_every_field_has_a_docstring_and_a_flag():
    for settings in (RunConfig, FullTrainingConfig, ArchitectureConfig, TokenizerConfig):
        fields = {field.name for field in dataclasses.fields(settings)}
        assert set(field_help(settings)) == fields
    names = [field.name for field in dataclasses.fields(RunConfig) if field.name != "stages"]
    parameters = [
        *setting_parameters(names, RunConfig),
        *stage_parameters({"training": FullTrainingConfig}, {"training": {}}),
    ]
    flags = {parameter.name.replace("__dot__", ".") for parameter in parameters}
    of_files = {"stages", "data", "select", "tokenizer", "training.kind"}
    assert set(flat_names(run_values("gpt2_small_pretrain"))) - of_files <= flags


@pytest.mark.parametrize("converted", [False, True], ids=["stock", "converted"])
def test_training_goes_on_from_a_checkpoint(root, result, converted):
    """All weights of a stock model, or of a student with its scalers; what comes out is of the same kind."""
    start = result.final
    if converted:
        start = root / "student"
        cell = {"tile": 8, "score_saturation": 20.0, "output_saturation": 10.0}
        attention = {"type": "gain_cell", "window": 16, "cell": cell}
        student = linearize.convert(result.final, attention)
        student.save_pretrained(start)
        AutoTokenizer.from_pretrained(result.final).save_pretrained(start)
    changes = {"model_name_or_path": str(start), "training__learning_rate": 2e-3}
    after = run(tiny(root, f"on-{converted}", **changes))
    before = load_file(start / "model.safetensors")
    trained = load_file(after.final / "model.safetensors")
    assert set(trained) >= set(before)
    assert all(not torch.equal(before[name], trained[name]) for name in before if "scaler" in name or "c_attn" in name)
    losses = [loss for _, loss in report_of(after).losses]
    assert losses[0] < math.log(report_of(after).vocab_size)  # no random weights
    curve = [perplexity for _, perplexity in report_of(after).validation]
    assert curve[-1] < (curve[0] if converted else report_of(result).perplexity)
    if converted:
        record = json.loads((after.final / "linearize.json").read_text())
        assert record["tokens"] == {"training": report_of(after).tokens}
        loaded = AutoModelForCausalLM.from_pretrained(after.final, trust_remote_code=True)
        assert loaded.config.model_type == "linearized_gpt2"


def test_checkpoints_that_do_not_fit_are_named(root, result):
    cases = [
        ({"data__sequence_length": 64}, "context is 32 tokens"),
        ({"tokenizer__source": "train"}, "vocabulary of its own"),
        ({"model_name_or_path": str(root / "nowhere")}, "nowhere"),
        ({"architecture__n_layer": 3}, "both set, but the model has a shape of its own"),
    ]
    for changes, sentence in cases:
        changes = {"model_name_or_path": str(result.final), **changes}
        with pytest.raises(UserError, match=sentence):
            run(tiny(root, "bad", **changes))
