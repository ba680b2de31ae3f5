"""Encoders in the pipeline: conversion with every head, saving, loading, pipelines, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from fakehub import FakeHub
from tiny_models import make_bert, make_student, perturb
from tiny_runs import MODULES, make_bert_directory, without_package
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    pipeline,
)

import linearize
from linearize.cli import main
from linearize.config.record import make_record
from linearize.errors import UserError
from linearize.evaluation import info, linear_share
from linearize.evaluation.embeddings import embed
from linearize.hub.repository import _operations, save_final
from linearize.hub.sentence_files import sentence_transformer_files

ROOT = Path(__file__).parents[2]
LINEAR = {"type": "linear", "window": 4, "sinks": 2}
TEXT = "the river ran past a small red house where two old cats slept"
STEP = ["--finetune.max_steps", "1", "--data.sequence_length", "64"]
RUN = ["--output_dir", "{out}", "--transfer.max_steps", "1", *STEP]
"""With the stages that a run has where none are named."""
HEADS = {
    "base": (BertModel, "AutoModel", "feature-extraction"),
    "masked": (BertForMaskedLM, "AutoModelForMaskedLM", "fill-mask"),
    "sequence": (BertForSequenceClassification, "AutoModelForSequenceClassification", "text-classification"),
    "token": (BertForTokenClassification, "AutoModelForTokenClassification", "token-classification"),
    "answer": (BertForQuestionAnswering, "AutoModelForQuestionAnswering", "question-answering"),
}


def inputs_of(path):
    return linearize.load_tokenizer(path)([TEXT, "two old cats"], padding=True, return_tensors="pt")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_bert_directory(tmp_path_factory.mktemp("encoder") / "teacher", sentences=True)


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
def test_every_head_converts_saves_and_loads(head, tmp_path):
    kind, auto_class, task = HEADS[head]
    path = make_bert_directory(tmp_path / "teacher", kind=kind, num_labels=2)
    stock, inputs = kind.from_pretrained(path).eval(), inputs_of(path)
    student = linearize.convert(path, LINEAR, softmax_layers=[-1])
    assert type(student).__name__ == f"Linearized{kind.__name__}" and len(student.mixer_attentions()) == 2
    with student.use_arm("teacher"):
        for name, expected in stock(**inputs).items():
            assert torch.equal(student(**inputs)[name], expected), name
    perturb(student)
    tokenizer = linearize.load_tokenizer(path)
    out = save_final(student, tokenizer, tmp_path / "final", make_record(path, recipe={"attention": LINEAR}))
    loaded = linearize.load_student(out)
    assert type(loaded) is type(student)
    for name, expected in student(**inputs).items():
        assert torch.equal(loaded(**inputs)[name], expected), name
    card = (out / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == task
    assert f'"{out.name}"' in card and "Generation keeps" not in card and "expect poor results" in card
    code = card.split("```python\n")[1].split("```")[0].replace('"final"', repr(str(out)))
    exec(compile(code, "card", "exec"), {})


@torch.no_grad()
def test_a_pretraining_checkpoint_keeps_its_masked_head(tmp_path):
    path = make_bert_directory(tmp_path / "teacher", kind=BertForPreTraining)
    student, inputs = linearize.convert(path, LINEAR), inputs_of(path)
    assert type(student).__name__ == "LinearizedBertForMaskedLM"
    with student.use_arm("teacher"):
        expected = BertForPreTraining.from_pretrained(path).eval()(**inputs).prediction_logits
        assert torch.equal(student(**inputs).logits, expected)


@torch.no_grad()
def test_a_head_that_no_student_has_is_left_out(tmp_path):
    path = make_bert_directory(tmp_path / "teacher", kind=BertForNextSentencePrediction)
    student, inputs = linearize.convert(path, LINEAR), inputs_of(path)
    assert type(student).__name__ == "LinearizedBertModel"
    with student.use_arm("teacher"):
        expected = BertModel.from_pretrained(path).eval()(**inputs)
        assert torch.equal(student(**inputs).pooler_output, expected.pooler_output)


@torch.no_grad()
def test_a_checkpoint_without_pooler_or_architectures(tmp_path, caplog):
    path = make_bert_directory(tmp_path / "teacher", kind=BertForMaskedLM)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "architectures": None}))
    student, inputs = linearize.convert(path, LINEAR), inputs_of(path)
    assert "pooler.dense.weight" in caplog.text
    with student.use_arm("teacher"):
        expected = BertModel.from_pretrained(path).eval()(**inputs).last_hidden_state
        assert torch.equal(student(**inputs).last_hidden_state, expected)


@torch.no_grad()
def test_half_precision_keeps_the_mechanism_in_float32(tmp_path):
    path = make_bert_directory(tmp_path / "teacher")
    student = linearize.convert(path, LINEAR, dtype=torch.bfloat16)
    kinds = {(".mixer." in name, parameter.dtype) for name, parameter in student.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert student(**inputs_of(path)).last_hidden_state.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def converted(teacher, tmp_path_factory):
    out = tmp_path_factory.mktemp("encoder") / "converted"
    assert main(["convert", str(teacher), str(out), "--attention.window", "4", "--softmax_layers", "[1]"]) == 0
    return out


def test_convert_carries_the_sentence_transformers_files(teacher, converted):
    names = ["modules.json", "sentence_bert_config.json", "1_Pooling/config.json"]
    assert sorted(sentence_transformer_files(str(teacher))) == sorted(names)
    for name in names:
        assert (converted / name).read_bytes() == (teacher / name).read_bytes()
    pushed = {operation.path_in_repo for operation in _operations(converted, "me/model", [])}
    assert {*names, "config.json", "modeling_bert.py", "model.safetensors"} <= pushed


HUB = """
import sys
from linearize.cli import main
assert main(["convert", "someone/encoder", sys.argv[1], "--attention.window", "4"]) == 0
assert main(["push", sys.argv[1], "tester/encoder"]) == 0
"""


@pytest.mark.slow
def test_an_encoder_of_the_hub_and_back(teacher, tmp_path):
    with FakeHub() as hub:
        hub.add_directory("someone/encoder", teacher)
        environment = {**hub.environment(tmp_path / "home"), "PYTHONPATH": str(ROOT), "HF_TOKEN": "hf_valid"}
        command = [sys.executable, "-c", HUB, str(tmp_path / "out")]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        files = hub.files("tester/encoder")
    for name in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json"):
        assert files[name] == (teacher / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert {"config_sentence_transformers.json", "2_Normalize/config.json"}.isdisjoint(files)


def test_sentence_transformers_files_that_cannot_be_taken(tmp_path):
    assert sentence_transformer_files(str(tmp_path)) == {}
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(UserError, match="modules.json is damaged"):
        sentence_transformer_files(str(tmp_path))
    (tmp_path / "modules.json").write_text(json.dumps([{**MODULES[1], "path": "../other"}]))
    with pytest.raises(UserError, match="outside the repository"):
        sentence_transformer_files(str(tmp_path))
    (tmp_path / "modules.json").write_text(json.dumps([{**MODULES[1], "path": "2_Dense"}]))
    (tmp_path / "2_Dense").mkdir()
    (tmp_path / "2_Dense" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="a pickle"):
        sentence_transformer_files(str(tmp_path))


def test_info_shows_no_state(converted, capsys):
    found = info(converted)
    assert found.model_type == "linearized_bert" and found.layers == ["linear", "softmax", "linear"]
    assert found.state == [] and found.layer_state == {} and found.mixer_parameters
    assert main(["info", str(converted)]) == 0
    printed = capsys.readouterr().out
    assert "window=4" in printed and "KV cache" not in printed and "state a layer" not in printed


@torch.no_grad()
def test_share_of_the_linear_branch(converted):
    student = linearize.load_student(converted)
    rows = [{"input_ids": torch.randint(5, 60, (20,))} for _ in range(3)]
    share = linear_share(student, rows)
    assert set(share.per_layer) == {0, 2} and all(0 < value < 1 for value in share.per_layer.values())
    assert share.tokens == 60


@torch.no_grad()
def test_other_auto_classes_load_the_base(converted):
    """A head starts anew on the converted base, as on a stock one: what task finetuning begins with."""
    base = AutoModel.from_pretrained(converted)
    for auto_class in (AutoModelForSequenceClassification, AutoModelForMaskedLM):
        model = auto_class.from_pretrained(converted)
        weights = model.bert.encoder.layer[0].attention.self.mixer.feature_map_q.weight
        assert torch.equal(weights, base.encoder.layer[0].attention.self.mixer.feature_map_q.weight)


@torch.no_grad()
def test_pipelines(converted, tmp_path):
    embed = pipeline("feature-extraction", model=str(converted), trust_remote_code=True)
    inputs = linearize.load_tokenizer(converted)(TEXT, return_tensors="pt")
    expected = linearize.load_student(converted)(**inputs).last_hidden_state
    assert torch.equal(embed(TEXT, return_tensors=True), expected)
    batched = embed([TEXT, "two old cats"], return_tensors=True, batch_size=2)
    assert (batched[0] - expected).abs().max() < 1e-5
    for kind, task, text, key in (
        (BertForMaskedLM, "fill-mask", "two old [MASK] slept", "token_str"),
        (BertForSequenceClassification, "text-classification", TEXT, "label"),
        (BertForTokenClassification, "token-classification", TEXT, "entity"),
    ):
        path = make_bert_directory(tmp_path / task, kind=kind, num_labels=3)
        student = linearize.convert(path, LINEAR)
        save_final(student, linearize.load_tokenizer(path), tmp_path / f"{task}-out", make_record(path))
        found = pipeline(task, model=str(tmp_path / f"{task}-out"), trust_remote_code=True)(text)
        assert found and key in found[0]


ALONE = """
import sys, torch
from transformers import AutoModel, AutoTokenizer, pipeline
source = sys.argv[1]
states = pipeline("feature-extraction", model=source, trust_remote_code=True)(sys.argv[2], return_tensors=True)
torch.save(states, sys.argv[3])
"""


@pytest.mark.slow
@torch.no_grad()
def test_a_pipeline_without_the_package(converted, tmp_path):
    command = [*without_package(ALONE), str(converted), TEXT, str(tmp_path / "states.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    inputs = linearize.load_tokenizer(converted)(TEXT, return_tensors="pt")
    expected = linearize.load_student(converted)(**inputs).last_hidden_state
    assert (torch.load(tmp_path / "states.pt", weights_only=True) - expected).abs().max() < 1e-5


SENTENCES = """
import sys, torch
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], trust_remote_code=True, device="cpu")
torch.save(model.encode(sys.argv[3:], convert_to_tensor=True), sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("attention", [LINEAR, {"type": "cosine", "window": 0, "sinks": 0, "feature_map": "softmax"}])
def test_sentence_transformers_embeds_without_the_package(attention, teacher, tmp_path):
    student, tokenizer = linearize.convert(teacher, attention), linearize.load_tokenizer(teacher)
    perturb(student)
    record, files = make_record(teacher, recipe={"attention": attention}), sentence_transformer_files(str(teacher))
    out = save_final(student, tokenizer, tmp_path / "final", record, files)
    texts = [TEXT, "two old cats", "red"]
    command = [*without_package(SENTENCES), str(out), str(tmp_path / "embeddings.pt"), *texts]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(tmp_path / "embeddings.pt", weights_only=True)
    assert (found - embed(student, tokenizer, texts)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["convert", "{teacher}", "{out}", "--attention.type", "gain_cell"], "choose one of linear"),
        (["run", "--model_name_or_path", "{teacher}", *RUN], "train it with `linearize run minilm_linear`"),
        (["finetune", "{converted}", "{out}", *STEP], "train it with `linearize run minilm_linear`"),
        (["chat", "{converted}", "--prompt", "hello"], "predicts no next token"),
        (["info", "{teacher}", "--hardware", "gain-cell"], "which gain cells cannot run"),
        (["run", "bert_base_linear", "{converted}", "--data.sequence_length", "64"], "no head that finds hidden"),
    ],
)
def test_what_encoders_cannot_do_is_one_sentence(arguments, sentence, teacher, converted, tmp_path, capsys):
    places = {"teacher": teacher, "converted": converted, "out": tmp_path / "out"}
    assert main([word.format(**places) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error and not (tmp_path / "out").exists()


def test_finetuning_and_perplexity_refuse_an_encoder(tmp_path):
    student = make_student(make_bert(), {"linear": LINEAR})
    with pytest.raises(UserError, match="predicts no next token"):
        linearize.evaluation.perplexity(student, [])
    with pytest.raises(UserError, match="is an encoder"):
        linearize.finetune(student, [], linearize.config.settings.FinetuneConfig(), output_dir=tmp_path)
