"""Pretraining of every architecture with every mechanism: it learns, what it leaves, how it goes on, and what cannot
be."""

import dataclasses
import json
import math
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from pretraining_toys import report_of
from safetensors.torch import load_file
from tiny_runs import make_bert_tokenizer, make_tokenizer, without_package
from torch.utils.data import Subset
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

import linearize
from linearize import UserError
from linearize.cli import main
from linearize.config.record import read_record
from linearize.config.yaml_io import write_config
from linearize.conversion.own_tokenizers import MARKS, train_wordpiece
from linearize.conversion.random_models import STOCK, random_configs, random_model, stock_config
from linearize.data.masking import Masking
from linearize.data.rows import prepare_rows
from linearize.evaluation.masked import masked_scores
from linearize.modeling import BACKBONES
from linearize.modeling.registry import ATTENTIONS
from linearize.runs.engine import run
from linearize.runs.settings import resolve_run
from linearize.stages.full_trainers import FullTrainer, MaskedTrainer, decay_groups
from linearize.training.log import read_log

DEMO_TEXT = Path(linearize.__file__).parent / "demo_text"
SETTINGS = {
    "linear": {"window": 8, "sinks": 2},
    "cosine": {"window": 0, "sinks": 0},
    "gain_cell": {"window": 16, "cell": {"tile": 8, "score_saturation": 20.0, "output_saturation": 10.0}},
    "landmark": {"block_size": 8, "top_k": 2},
}
"""Of each mechanism, at the size of the test; its defaults where there are none."""
SHAPES = {
    "gpt2": {},
    "llama": {"n_kv_head": 1, "head_dim": 32, "n_inner": 48, "rope_theta": 500.0, "vocab_multiple": 64},
    "bert": {},
    "gptj": {"rotary_dim": 8, "n_inner": 48},
}
PAIRS = [(kind, mechanism) for kind in SHAPES for mechanism in ("softmax", *ATTENTIONS)]
VALID = [
    (kind, mechanism)
    for kind, mechanism in PAIRS
    if mechanism == "softmax" or ATTENTIONS[mechanism].bidirectional or not BACKBONES[kind].encoder
]
INVALID = [pair for pair in PAIRS if pair not in VALID]
NAMES = {"ids": "-".join}


def attention_of(mechanism):
    return None if mechanism == "softmax" else {"type": mechanism, **SETTINGS.get(mechanism, {})}


def tiny(root, kind, mechanism="softmax", name=None, **changes):
    """Two layers, 32 wide, on the demo text; `changes` as dotted names with `__` for the dot. An encoder, which has a
    seventh of the tokens to learn from, takes more of them."""
    steps, rows = (40, 16) if kind == "bert" else (12, 4)
    values = {
        "output_dir": str(root / (name or f"{kind}-{mechanism}")),
        "device": "cpu",
        "tokenizer": {"source": "train", "vocab_size": 400, "characters": 200_000},
        "architecture": {"type": kind, "n_layer": 2, "n_head": 2, "n_embd": 32, **SHAPES[kind]},
        "attention": attention_of(mechanism),
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
                "objective": "masked" if kind == "bert" else "next_token",
                "max_steps": steps,
                "batch_size": rows,
                "tokens_per_step": 2 * rows * 32,
                "learning_rate": 1e-2 if kind == "bert" else 2e-2,
                "warmup_steps": 2,
                "logging_steps": 1,
                "save_steps": 5,
                "eval_steps": steps // 2,
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
def trained(root):
    """The run of a pair, made at its first use."""
    results = {}

    def make(kind, mechanism):
        if (kind, mechanism) not in results:
            results[kind, mechanism] = run(tiny(root, kind, mechanism))
        return results[kind, mechanism]

    return make


@pytest.mark.parametrize("pair", VALID, **NAMES)
def test_every_valid_pair_learns(pair, trained):
    kind, mechanism = pair
    result = trained(kind, mechanism)
    report = report_of(result)
    losses = [loss for _, loss in report.losses]
    assert losses[0] == pytest.approx(math.log(report.vocab_size), abs=0.4)  # random weights: uniform
    assert sum(losses[-3:]) / 3 < losses[0] - 0.3
    assert report.perplexity < report.validation[0][1] < report.vocab_size
    assert (report.accuracy is None) == (kind != "bert")
    stock = STOCK[kind]
    expected = stock if mechanism == "softmax" else BACKBONES[kind].model([stock.__name__])
    assert report.architecture == expected.__name__
    record = read_record(result.final)
    if mechanism == "softmax":
        assert not record and not list(result.final.glob("*.py"))
        return
    assert record["teacher"] is None and record["tokens"] == {"training": report.tokens}
    assert record["recipe"]["attention"]["type"] == mechanism and record["parameters"] == report.parameters
    card = (result.final / "README.md").read_text()
    assert "trained from random weights" in card and "base_model" not in card and "no teacher" in card
    assert f"{report.perplexity:.2f}" in card and str(result.final.parent) not in card


@pytest.mark.parametrize("kind", SHAPES)
def test_every_head_learns_its_exponent(kind, root, tmp_path):
    """With a tokenizer that is there: one that is trained differs a little from run to run."""
    (make_bert_tokenizer() if kind == "bert" else make_tokenizer()).save_pretrained(tmp_path / "words")
    words = {"tokenizer": {"source": "load", "name_or_path": str(tmp_path / "words")}}
    final = run(tiny(root, kind, "cosine", f"exponents-{kind}", **words)).final
    for attention in linearize.load_student(final).mixer_attentions():
        assert (attention.mixer.scales.exponent_logit - 0.5).abs().min() > 1e-3


FRESH = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
for final, encoder in json.loads(sys.argv[1]):
    auto = AutoModelForMaskedLM if encoder else AutoModelForCausalLM
    model = auto.from_pretrained(final, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(final)
    inputs = tokenizer("The old house", return_tensors="pt")
    with torch.no_grad():
        torch.save(model(**inputs).logits, final + "/logits.pt")
    if not encoder:
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
"""


def test_every_valid_pair_loads_in_a_fresh_process(trained, tmp_path):
    finals = [(str(trained(*pair).final), pair[0] == "bert") for pair in VALID]
    done = subprocess.run(without_package(FRESH) + [json.dumps(finals)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for final, encoder in finals:
        load = linearize.conversion.students.load_encoder if encoder else linearize.conversion.students.load_model
        with torch.no_grad():
            ours = load(final)(**AutoTokenizer.from_pretrained(final)("The old house", return_tensors="pt")).logits
        theirs = torch.load(f"{final}/logits.pt", weights_only=True)
        Path(final, "logits.pt").unlink()
        assert torch.allclose(ours, theirs, atol=1e-5), final


@pytest.mark.parametrize("pair", VALID, **NAMES)
def test_every_valid_pair_resumes_bit_for_bit(pair, root, trained, monkeypatch):
    """Stopped by Ctrl-C in step 7, from a checkpoint that is no measurement."""
    whole, name = trained(*pair), "-".join(pair) + "-parts"
    losses, calls = FullTrainer.training_step, []

    def interrupted(self, *arguments, **others):
        calls.append(1)
        if len(calls) == 13:
            signal.raise_signal(signal.SIGINT)
        return losses(self, *arguments, **others)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FullTrainer, "training_step", interrupted)
        run(tiny(root, *pair, name))
    assert (root / name / "checkpoints" / "training" / "step-7").is_dir() and not (root / name / "final").exists()
    rest = run(tiny(root, *pair, name, resume_from_checkpoint=True))
    ours, theirs = (load_file(run.final / "model.safetensors") for run in (rest, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert (
        report_of(rest).losses == report_of(whole).losses and report_of(rest).validation == report_of(whole).validation
    )
    assert report_of(rest).accuracy == report_of(whole).accuracy


@pytest.mark.parametrize("pair", INVALID, **NAMES)
def test_every_invalid_pair_is_one_sentence(pair, root, tmp_path, capsys):
    kind, mechanism = pair
    write_config(tiny(root, kind, mechanism, "refused"), tmp_path / "tiny.yaml")
    assert main(["run", str(tmp_path / "tiny.yaml")]) == 2
    error = capsys.readouterr().err
    assert f"{mechanism} attention sees only the tokens before it" in error and "choose one of linear" in error
    assert "Traceback" not in error and error.count("\n") == 1 and not (root / "refused").exists()


@pytest.mark.parametrize("kind", SHAPES)
def test_all_mechanisms_start_from_the_stock_weights(kind, root):
    """The stock class draws the weights; the mechanism's own are those that it starts with in a conversion."""
    tokenizer = make_bert_tokenizer() if kind == "bert" else make_tokenizer()
    torch.manual_seed(3)
    stock = random_model(tiny(root, kind), tokenizer).state_dict()
    for mechanism in (pair[1] for pair in VALID if pair[0] == kind and pair[1] not in ("softmax", "landmark")):
        torch.manual_seed(3)
        student = random_model(tiny(root, kind, mechanism), tokenizer)
        theirs = student.state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in stock.items())
        mixers = [module for attention in student.mixer_attentions() for module in attention.mixer.modules()]
        started = [module for module in mixers if hasattr(module, "reset_parameters")]
        learns = any(list(attention.mixer.parameters()) for attention in student.mixer_attentions())
        assert len(started) >= student.config.num_hidden_layers * learns and learns == (mechanism != "salient")
        for module in started:
            before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
            module.reset_parameters()
            assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_what_comes_after_claims_no_teacher(root, trained, tmp_path):
    final = trained("llama", "linear").final
    flags = ["--text", str(DEMO_TEXT / "validation.jsonl.gz"), "--sequence_length", "32", "--max_tokens", "512"]
    assert main(["evaluate", str(final), *flags, "--device", "cpu", "--output", str(tmp_path / "measured")]) == 0
    measured = json.loads((tmp_path / "measured" / "evaluation.json").read_text())
    assert measured["reference"] == "its weights with softmax attention"
    settings = {
        "model_name_or_path": str(final),
        "output_dir": str(tmp_path / "out"),
        "device": "cpu",
        "data": dataclasses.asdict(tiny(root, "llama").data),
        "stages": {
            "finetune": {"kind": "train", "weights": "lora", "max_steps": 1, "batch_size": 2, "tokens_per_step": 64}
        },
        "evaluation": None,
    }
    record = read_record(linearize.run(settings).final)
    assert record["teacher"] is None and set(record["tokens"]) == {"training", "finetune"}


def test_hybrids_by_layer_and_by_name(root):
    steps = {"training__max_steps": 2, "training__eval_steps": None}
    one = run(tiny(root, "gpt2", "linear", "hybrid", softmax_layers=[-1], **steps))
    assert linearize.load_student(one.final).config.mixer_types == ["linear", "softmax"]
    mixers = {"near": {"type": "linear", "window": 4}, "far": {"type": "linear", "window": 16}}
    names = {"attention": None, "mixers": mixers, "mixer_types": ["far", "near"]}
    two = run(tiny(root, "bert", name="named", **names, **steps))
    config = linearize.load_student(two.final).config
    assert config.mixer_types == ["far", "near"] and config.mixers["near"]["window"] == 4
    stored = yaml.safe_load((root / "named" / "config.yaml").read_text())
    assert stored["mixers"]["far"]["sinks"] == 4  # a default of today
    with pytest.raises(UserError, match=r"other settings \(mixers"):
        far = {**mixers, "far": {"type": "linear", "window": 8}}
        run(tiny(root, "bert", name="named", **{**names, "mixers": far}, **steps, resume_from_checkpoint=True))


# --- shapes


def test_a_shape_is_what_it_says(root):
    llama = stock_config(tiny(root, "llama"), make_tokenizer())
    assert (llama.hidden_size, llama.head_dim, llama.num_key_value_heads, llama.intermediate_size) == (32, 32, 1, 48)
    assert len(make_tokenizer()) <= llama.vocab_size == 384 and not llama.tie_word_embeddings
    assert llama.rope_parameters["rope_theta"] == 500
    assert llama.max_position_embeddings == 32 and (llama.bos_token_id, llama.eos_token_id) == (1, 2)
    plain = {
        "architecture__n_kv_head": None,
        "architecture__head_dim": None,
        "architecture__n_inner": None,
        "architecture__rope_theta": None,
    }
    llama = stock_config(
        tiny(root, "llama", architecture__n_positions=128, architecture__tie_embeddings=True, **plain)
    )
    assert (llama.head_dim, llama.num_key_value_heads, llama.intermediate_size) == (16, 2, 128)
    assert llama.rope_parameters["rope_theta"] == 10_000 and llama.max_position_embeddings == 128
    assert llama.tie_word_embeddings and llama.vocab_size == 448
    bert = stock_config(tiny(root, "bert", architecture__dropout=0.1), make_bert_tokenizer())
    assert (bert.intermediate_size, bert.hidden_dropout_prob, bert.attention_probs_dropout_prob) == (128, 0.1, 0.1)
    assert bert.pad_token_id == 0 and bert.vocab_size == len(make_bert_tokenizer())
    gptj = stock_config(tiny(root, "gptj"))
    assert (gptj.rotary_dim, gptj.n_inner, gptj.n_positions, gptj.tie_word_embeddings) == (8, 48, 32, False)
    assert stock_config(tiny(root, "gptj", architecture__rotary_dim=None)).rotary_dim == 16  # the whole head
    gpt2 = stock_config(tiny(root, "gpt2", architecture__n_inner=40))
    assert (gpt2.n_inner, gpt2.n_positions, gpt2.vocab_size) == (40, 32, 400)


def test_landmarks_have_positions_of_their_own(root):
    assert [config.n_positions for config in random_configs(tiny(root, "gpt2", "landmark"))] == [32 + 32 // 7] * 2
    assert random_configs(tiny(root, "llama", "landmark"))[1].max_position_embeddings == 32  # computed ones
    with pytest.raises(UserError, match="their landmarks take 36"):
        random_configs(tiny(root, "gpt2", "landmark", architecture__n_positions=34))


def test_a_padded_vocabulary_is_never_asked_for(trained):
    result = trained("llama", "softmax")
    model = linearize.conversion.students.load_model(result.final)
    tokenizer = AutoTokenizer.from_pretrained(result.final)
    assert report_of(result).vocab_size == model.config.vocab_size == 448 and len(tokenizer) == 400


def test_schedules_and_groups(root):
    changes = {"training__schedule": "linear", "training__min_lr_ratio": 0.25, "training__mixer_learning_rate": 1e-3}
    short = {"training__max_steps": 6, "training__eval_steps": None, "training__adam_epsilon": 1e-7}
    run(tiny(root, "gpt2", "linear", "linear-schedule", **changes, **short))
    rates = [record["learning_rate"] for record in read_log(root / "linear-schedule" / "logs" / "training.jsonl")]
    assert rates == pytest.approx([0.0, 1e-2, 2e-2, 1.625e-2, 1.25e-2, 0.875e-2])
    model = random_model(tiny(root, "gpt2", "linear"), make_tokenizer())
    groups = decay_groups(model, 0.01, "all", 1e-3)
    mixers = {id(p) for name, p in model.named_parameters() if ".mixer." in name}
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0, 0.0] and not groups[1]["params"]
    assert {id(p) for p in groups[2]["params"]} == mixers and groups[2]["lr"] == 1e-3
    assert len(groups[0]["params"]) + len(mixers) == len(list(model.parameters()))


# --- encoders


def test_the_reported_accuracy_is_that_of_the_saved_weights(root, trained):
    result, config = trained("bert", "linear"), tiny(root, "bert")
    tokenizer = AutoTokenizer.from_pretrained(result.final)
    rows = Subset(prepare_rows(config.data, tokenizer)[1], range(2048 // 32))
    model = AutoModelForMaskedLM.from_pretrained(result.final)
    scores = masked_scores(model, rows, Masking.of(tokenizer, 0.15), arm=None, batch_size=16)
    assert scores.accuracy == pytest.approx(report_of(result).accuracy, abs=1e-9)
    assert scores.perplexity == pytest.approx(report_of(result).perplexity, rel=1e-5)
    assert scores.tokens == report_of(result).perplexity_tokens and 0 < scores.accuracy < 1
    record = read_log(root / "bert-linear" / "logs" / "training_validation.jsonl")[-1]
    assert record["accuracy"] == report_of(result).accuracy
    assert f"{report_of(result).accuracy:.1%} of " in (result.final / "README.md").read_text()
    assert pipeline("fill-mask", model=str(result.final), trust_remote_code=True)("The old [MASK] stood there.")


def test_an_encoder_pretrained_in_bfloat16_is_measured_in_float32(root):
    steps = {"training__max_steps": 4, "training__eval_steps": 2, "training__precision": "bfloat16"}
    result = run(tiny(root, "bert", name="bert-bfloat16", training__save_steps=2, **steps))
    tokenizer = AutoTokenizer.from_pretrained(result.final)
    rows = Subset(prepare_rows(tiny(root, "bert").data, tokenizer)[1], range(2048 // 32))
    step = root / "bert-bfloat16" / "checkpoints" / "training" / "step-2"
    for place, perplexity in (
        (step, report_of(result).validation[0][1]),
        (result.final, report_of(result).perplexity),
    ):
        scores = masked_scores(
            AutoModelForMaskedLM.from_pretrained(place), rows, Masking.of(tokenizer, 0.15), arm=None
        )
        assert scores.perplexity == pytest.approx(perplexity, rel=1e-6)  # bfloat16 is off by 1e-4 and more


def test_an_encoder_sees_hidden_tokens_alone(root, trained, monkeypatch):
    seen = []
    losses = MaskedTrainer.losses

    def watched(self, model, inputs, denominator):
        seen.append((inputs, float(denominator)))
        return losses(self, model, inputs, denominator)

    monkeypatch.setattr(MaskedTrainer, "losses", watched)
    changes = {"data__mask_probability": 0.4, "training__max_steps": 1, "training__eval_steps": None}
    run(tiny(root, "bert", name="masks", **changes))
    chosen = [(batch["labels"] != -100).sum().item() for batch, _ in seen]
    places = sum(batch["attention_mask"].sum().item() for batch, _ in seen)
    assert [count for _, count in seen] == [sum(chosen)] * 2 and 0.2 < sum(chosen) / places < 0.5


def test_an_encoder_goes_on_from_a_checkpoint(root, trained):
    """At a longer length too, as BERT's last steps are: positions were asked for before."""
    steps = {"training__max_steps": 4, "training__eval_steps": None, "training__learning_rate": 2e-3}
    first = run(tiny(root, "bert", "linear", "short", architecture__n_positions=64, **steps))
    changes = {"model_name_or_path": str(first.final), "attention": None, **steps}
    after = run(tiny(root, "bert", name="long", data__sequence_length=64, **changes))
    record = read_record(after.final)
    assert record["tokens"] == {"training": 8 * 1024} and record["teacher"] is None
    assert record["validation"]["accuracy"] == report_of(after).accuracy
    assert report_of(after).perplexity < report_of(first).perplexity
    with pytest.raises(UserError, match="context is 64 tokens"):
        longer = {"data__sequence_length": 128, "training__tokens_per_step": 2048}
        run(tiny(root, "bert", name="longer", **longer, **changes))


def test_a_trained_wordpiece_marks_texts():
    tokenizer = train_wordpiece(iter(["The river ran past the red house"] * 20), 300)
    ids = tokenizer("the red RIVER", "past")["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens[0] == "[CLS]" and tokens.count("[SEP]") == 2 and tokens[-1] == "[SEP]"
    assert tokenizer("the red", "past")["token_type_ids"][-1] == 1
    assert tokenizer.convert_ids_to_tokens(range(5)) == list(MARKS.values()) and tokenizer.pad_token_id == 0
    assert tokenizer.decode(tokenizer("The river ran")["input_ids"], skip_special_tokens=True) == "The river ran"
    assert tokenizer("the [MASK] house")["input_ids"].count(tokenizer.mask_token_id) == 1


# --- bad input


@pytest.mark.parametrize(
    "kind, flags, sentence",
    [
        ("gpt2", ["--architecture.type", "t5"], "one of gpt2, llama, bert"),
        (
            "gpt2",
            ["--architecture.n_kv_head", "1"],
            "architecture.n_kv_head is set, but architecture.type gpt2 has no grouped",
        ),
        ("bert", ["--architecture.rope_theta", "500"], "architecture.type bert has no rotations"),
        (
            "gptj",
            ["--architecture.rotary_dim", "18"],
            "architecture.rotary_dim is 18, but it must be even and at most the width",
        ),
        (
            "gpt2",
            ["--architecture.rotary_dim", "8"],
            "architecture.rotary_dim is set, but architecture.type gpt2 has no part",
        ),
        ("llama", ["--architecture.n_kv_head", "3"], "must be a multiple of architecture.n_kv_head"),
        ("llama", ["--architecture.head_dim", "7"], "choose an even head_dim"),
        ("llama", ["--architecture.n_inner", "0"], "architecture.n_inner is 0"),
        (
            "gpt2",
            ["--architecture.n_positions", "16"],
            "architecture.n_positions is 16, but data.sequence_length is 32",
        ),
        ("gpt2", ["--attention", "spiral"], "spiral"),
        ("gpt2", ["--attention", "{type: linear, windw: 3}"], "Unknown setting attention.windw"),
        ("gpt2", ["--attention.type", "linear", "--attention.feature_dim", "64"], "feature_dim 64 is wider"),
        ("gpt2", ["--softmax_layers", "0"], "softmax_layers is set, but without attention"),
        ("gpt2", ["--attention", "linear", "--softmax_layers", "[5]"], "softmax_layers names layer 5"),
        ("gpt2", ["--attention", "landmark", "--softmax_layers", "[1]"], "landmark attention goes with no softmax"),
        ("gpt2", ["--attention", "linear", "--softmax_layers", "1"], "random weights have nothing to measure"),
        ("gpt2", ["--mixer_types", "softmax,near"], "mixer_types and mixers belong together"),
        ("gpt2", ["--mixer_types", "near", "--mixers", "{near: {type: linear}}"], "mixer_types names 1 layers"),
        ("gpt2", ["--mixer_types", "softmax,near", "--mixers", "{near: 3}"], "mixers.near must be a section"),
        ("gpt2", ["--model_name_or_path", "x"], "architecture and model_name_or_path are both set"),
        ("bert", ["--training.teacher", "x"], "an encoder predicts none"),
        ("bert", ["--data.mask_probability", "0"], "data.mask_probability is 0"),
        ("bert", ["--data.completion_only"], "plain text"),
        ("bert", ["--tokenizer.source", "load", "--tokenizer.name_or_path", "{plain}"], "no token that hides another"),
        ("gpt2", ["--tokenizer.source", "load", "--tokenizer.name_or_path", "{marked}"], "no token that ends a text"),
        ("gpt2", ["--training.schedule", "steps"], "one of linear, constant, cosine"),
        ("gpt2", ["--training.mixer_learning_rate", "-1"], "training.mixer_learning_rate is -1"),
        (
            "gpt2",
            {"attention": {"type": "gain_cell"}, "training__weights": "mechanism"},
            "all other weights are random",
        ),
        ("gpt2", {"training__objective": "masked"}, "is no encoder"),
        ("bert", {"training__objective": "next_token"}, "predicts no next token: set training.objective to masked"),
    ],
)
def test_bad_input_is_one_sentence(kind, flags, sentence, root, tmp_path, capsys):
    """Flags, or what the file says."""
    changes, flags = ({}, flags) if isinstance(flags, list) else (flags, [])
    make_tokenizer().save_pretrained(tmp_path / "plain")
    make_bert_tokenizer().save_pretrained(tmp_path / "marked")
    write_config(tiny(root, kind, name="bad", **changes), tmp_path / "tiny.yaml")
    words = [word.replace("{plain}", str(tmp_path / "plain")) for word in flags]
    words = [word.replace("{marked}", str(tmp_path / "marked")) for word in words]
    capsys.readouterr()
    assert main(["run", str(tmp_path / "tiny.yaml"), *words]) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error and error.count("\n") == 1
    assert not (root / "bad").exists()


def test_an_encoder_without_a_head_is_refused(root, tmp_path):
    from tiny_runs import make_bert_directory

    bare = make_bert_directory(tmp_path / "bare")
    with pytest.raises(UserError, match="has no head that finds hidden tokens"):
        run(tiny(root, "bert", name="bare", model_name_or_path=str(bare)))


def test_attention_by_flags(root, tmp_path):
    """`--attention softmax` and `none` are a stock model, `--attention.window 4` changes a preset's."""
    write_config(tiny(root, "gpt2", "linear", "flags"), tmp_path / "tiny.yaml")
    short = ["--training.max_steps", "1", "--training.eval_steps", "none", "--overwrite"]
    for flags, name in ((["--attention.window", "4"], "Linearized"), (["--attention", "none"], "GPT2LM")):
        assert main(["run", str(tmp_path / "tiny.yaml"), *flags, *short]) == 0
        config = json.loads((root / "flags" / "final" / "config.json").read_text())
        assert config["architectures"][0].startswith(name)
    assert tiny(root, "gpt2", attention={"type": "softmax"}).attention is None
