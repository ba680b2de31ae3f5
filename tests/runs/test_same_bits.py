"""The one engine trains as the six kinds of run before it did: the losses of tiny runs are those that were recorded.

The numbers in `losses_before_stages.json` are of commit 156e45b, the last one before runs had stages. On the machine
where they were recorded losses and final weights are equal bit for bit; another processor or another PyTorch may round
otherwise.
"""

import json
import random
from pathlib import Path

import pytest
import torch
from tiny_runs import WORDS, make_bert_directory, make_teacher_directory, write_text

import linearize
from linearize.training.log import read_log

BEFORE = json.loads(Path(__file__).with_name("losses_before_stages.json").read_text())
STEPS = {"max_steps": 4, "batch_size": 2, "tokens_per_step": 128, "logging_steps": 1, "save_steps": 2}
FULL = {"kind": "train", "weights": "all", **STEPS, "learning_rate": 1e-3, "warmup_steps": 1, "eval_steps": 2}
FITTED = {"kind": "calibrate", "sequences": 8}
COSINE = {"type": "cosine", "window": 8, "sinks": 2, "feature_map": "softmax"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    make_teacher_directory(root / "teacher")
    make_bert_directory(root / "bert", sentences=True)
    write_text(root / "text.jsonl", documents=200)
    draw = random.Random(0)
    texts = [" ".join(" ".join(draw.choices(WORDS, k=8)).capitalize() + "." for _ in range(6)) for _ in range(120)]
    (root / "sentences.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return root


def adapters(attention, **stages):
    stages |= {
        "transfer": {"kind": "transfer", **STEPS},
        "finetune": {"kind": "train", "weights": "lora", **STEPS, "kl_weight": 0.5, "learning_rate": 1e-3},
    }
    given = {"dtype": "bfloat16", "yardstick": "same_tokens", "evaluation": {"max_tokens": 256}}
    return {**given, "attention": attention, "stages": stages}


def gain_cells():
    stages = {
        "scalers": {"kind": "calibrate", "sequences": 6, "batch_size": 2},
        "transfer": {"kind": "transfer", "branch": "mixed", **STEPS},
        "linear": {**FULL, "teacher": "yardstick"},
        "adapted": {
            "kind": "adapt", "attention": {"cell_kind": "nonlinear"}, "sequences": 6, "batch_size": 2, "iterations": 5,
        },
        "refined": {**FULL, "weights": "mechanism", "teacher": "linear", "labels_weight": 0},
        "nonlinear": {**FULL, "teacher": "yardstick"},
    }  # fmt: skip
    attention = {"type": "gain_cell", "window": 64, "cell_kind": "linear"}
    return {"yardstick": "same_tokens", "attention": attention, "stages": stages}


def landmarks():
    stages = {"calibrate": FITTED, "landmark": {**FULL, "teacher": "yardstick"}, "fitted": FITTED}
    attention = {"type": "landmark", "block_size": 8, "top_k": 2, "block_weight": "tokens"}
    attention |= {"block_dropout": 0.5, "block_dropout_rows": 0.5}
    return {"sliding_window": "lift", "yardstick": "same_tokens", "attention": attention, "stages": stages}


def embeddings():
    learning = {**STEPS, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 1}
    stages = {
        "calibrate": {**FITTED, "batch_size": 32},
        "transfer": {"kind": "transfer", "branch": "mixed", **STEPS},
        "distillation": {"kind": "train", "weights": "all", "objective": "embeddings", **learning},
    }
    return {"attention": {**COSINE, "window": 0, "sinks": 0}, "stages": stages, "evaluation": {"batch_size": 8}}


def random_weights(kind, objective):
    shape = {"type": kind, "n_layer": 2, "n_head": 2, "n_embd": 32, "dropout": 0.1}
    training = {"training": {**FULL, "objective": objective}}
    own = {"architecture": shape, "tokenizer": {"source": "train", "vocab_size": 300}, "stages": training}
    return {**own, "attention": {"type": "cosine", "window": 0, "sinks": 0}, "evaluation": {}}


RUNS = {
    "linear": lambda: adapters({"type": "linear", "window": 8, "sinks": 2}),
    "cosine": lambda: adapters(COSINE, calibrate=FITTED),
    "gain": gain_cells,
    "landmark": landmarks,
    "minilm": embeddings,
    "pre_gpt2": lambda: random_weights("gpt2", "next_token"),
    "pre_bert": lambda: random_weights("bert", "masked"),
}


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_of_before(name, inputs, tmp_path):
    settings = {"evaluation": None, **RUNS[name]()}
    encoder = name in ("minilm", "pre_bert")
    data = {
        "dataset": str(inputs / ("sentences.jsonl" if encoder else "text.jsonl")),
        "cache_dir": str(tmp_path / "c"),
    }
    data |= {"sequence_length": 32, "validation_documents": 12, **({"sentences_per_row": 3} if encoder else {})}
    if "architecture" not in settings:
        settings["model_name_or_path"] = str(inputs / ("bert" if encoder else "teacher"))
    linearize.run({**settings, "device": "cpu", "seed": 3, "output_dir": str(tmp_path / "out"), "data": data})
    for stage, losses in BEFORE[name].items():
        records = [x["loss"] for x in read_log(tmp_path / "out" / "logs" / f"{stage}.jsonl") if "loss" in x]
        assert records == pytest.approx(losses, rel=1e-6), stage
