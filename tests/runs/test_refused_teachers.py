"""Teachers that a run could not use are refused before anything is loaded, and what could not be saved is mended when
it is read."""

import json
import logging

import pytest
from tiny_models import make_bert, make_teacher
from tiny_runs import make_teacher_directory, tiny_config, write_text
from transformers import GenerationConfig

import linearize
from linearize import UserError
from linearize.cli import main
from linearize.conversion import load_student
from linearize.runs.engine import plan

QUANTISED = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


def quantised(path, make, settings):
    """The config of a quantised checkpoint: without weights, so nothing could be loaded."""
    make().config.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return str(path)


@pytest.mark.parametrize("method", QUANTISED)
def test_every_way_to_quantise_is_refused(tmp_path, method):
    teacher = quantised(tmp_path / "teacher", make_teacher, QUANTISED[method])
    with pytest.raises(UserError, match=rf"quantised already \({method}\)"):
        linearize.convert(teacher)


@pytest.mark.parametrize(
    "kind", ["run", "dry run", "cli", "encoder", "stock", "distillation", "landmark", "gain cell", "glue", "staged"]
)
def test_every_kind_of_run_refuses_a_quantised_teacher(tmp_path, capsys, kind):
    settings = QUANTISED["bitsandbytes"]
    decoder = quantised(tmp_path / "decoder", make_teacher, settings)
    encoder = quantised(tmp_path / "encoder", make_bert, settings)
    plain = tmp_path / "plain"
    make_teacher().config.save_pretrained(plain)
    text, out = write_text(tmp_path / "text.jsonl", 4), tmp_path / "out"
    common = {"output_dir": str(out), "device": "cpu", "data": {"dataset": str(text), "sequence_length": 32}}
    steps = {"kind": "train", "weights": "all", "max_steps": 1, "batch_size": 1, "tokens_per_step": 32}
    layers = {"stages": {"transfer": {"kind": "transfer", "max_steps": 1}}}
    whole = {"stages": {"training": steps}}
    taught = {"model_name_or_path": str(plain), "stages": {"training": {**steps, "teacher": decoder}}}
    sentences = {"stages": {"distillation": {**steps, "objective": "embeddings"}}}
    cells, landmarks, stock = (
        {"attention": {"type": "gain_cell"}},
        {"attention": {"type": "landmark"}},
        {"attention": None},
    )
    common |= {"model_name_or_path": decoder}
    runs = {
        "run": lambda: linearize.run({**common, **layers}),
        "dry run": lambda: plan({**common, **layers}),
        "encoder": lambda: linearize.run({**common, **sentences, "model_name_or_path": encoder}),
        "stock": lambda: linearize.run({**common, **stock, **whole}),
        "distillation": lambda: linearize.run({**common, **stock, **taught}),
        "landmark": lambda: linearize.run({**common, **landmarks, **whole}),
        "gain cell": lambda: linearize.run({**common, **cells, **layers}),
        "staged": lambda: linearize.run({**common, **cells, **taught}),
        "glue": lambda: linearize.run_glue({"models": [encoder], "output_dir": str(out), "device": "cpu"}),
    }
    if kind == "cli":
        assert main(["convert", decoder, str(out)]) == 2
        assert "quantised already (bitsandbytes)" in capsys.readouterr().err
    else:
        with pytest.raises(UserError, match="quantised already"):
            runs[kind]()
    assert not out.exists()


GENERATION = {
    "greedy": ({"temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 5]}, {"temperature", "top_p"}),
    "sampling": ({"do_sample": True, "temperature": 0.6, "early_stopping": True}, {"early_stopping"}),
    "beams": ({"length_penalty": 0.5, "output_scores": True, "top_k": 50}, {"length_penalty", "output_scores"}),
    "valid": ({"do_sample": True, "temperature": 0.6, "top_k": 20, "num_beams": 2, "length_penalty": 0.5}, set()),
}


@pytest.mark.parametrize("case", GENERATION)
def test_a_generation_config_that_cannot_be_saved_is_mended(tmp_path, caplog, case):
    given, dropped = GENERATION[case]
    teacher = make_teacher_directory(tmp_path / "teacher")
    (teacher / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "max_length": 64, **given}))
    with caplog.at_level(logging.WARNING, "linearize"):
        student = linearize.convert(teacher)
    found = student.generation_config
    found.validate(strict=True)
    plain = GenerationConfig()
    kept = {"bos_token_id": 1, "max_length": 64, **given}
    for name, value in kept.items():
        assert getattr(found, name) == (getattr(plain, name) if name in dropped else value), name
    warnings = [record.getMessage() for record in caplog.records if "generation config" in record.getMessage()]
    assert len(warnings) == bool(dropped) and all(name in warnings[0] for name in dropped)


def test_a_run_saves_what_its_teacher_generates_with(tmp_path, monkeypatch):
    """As transformers 5.17 saves: whatever the config was read from, it must be valid."""
    teacher, text = make_teacher_directory(tmp_path / "teacher"), write_text(tmp_path / "text.jsonl")
    (teacher / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}))
    save = GenerationConfig.save_pretrained

    def strict(self, *arguments, **options):
        self.validate(strict=True)
        return save(self, *arguments, **options)

    monkeypatch.setattr(GenerationConfig, "save_pretrained", strict)
    settings = tiny_config(teacher, text, tmp_path / "out", tmp_path / "cache") | {"evaluation": None}
    result = linearize.run(settings)
    assert load_student(result.final).generation_config.eos_token_id == 2
    # Of the stock model too, which all-weights training saves as the yardstick.
    training = {"kind": "train", "weights": "all", "max_steps": 1, "batch_size": 1, "tokens_per_step": 32}
    stock = {"attention": None, "output_dir": str(tmp_path / "more"), "stages": {"training": training}}
    linearize.run({**settings, **stock})
