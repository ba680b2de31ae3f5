"""Tokenizers that do not fit: ids beyond the embedding are refused before training; ids with holes do not wrap."""

import numpy as np
import pytest
import yaml
from data_toys import flat, make_config, write_texts
from tiny_models import make_gpt2, make_mistral
from tiny_runs import make_bert_directory, make_teacher_directory, tiny_config, write_text
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from linearize.cli import main
from linearize.config.settings import DataConfig
from linearize.data import prepare_data
from linearize.data.rows import prepare_rows
from linearize.data.vocabulary import vocabulary_size


def holey_tokenizer():
    """Four words, the largest id of which takes 17 bits."""
    words = {"<end>": 0, "river": 7, "stone": (1 << 16) + 3, "bed": (1 << 16) + 9}
    core = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>")


def test_ids_with_holes_do_not_wrap(tmp_path):
    tokenizer = holey_tokenizer()
    assert len(tokenizer) == 4 and vocabulary_size(tokenizer) == (1 << 16) + 10
    path = write_texts(tmp_path / "a.jsonl", ["river stone bed river. Stone bed river stone"] * 40)
    train, _ = prepare_data(make_config(tmp_path, path, sequence_length=8, validation_documents=0), tokenizer)
    assert set(flat(train)) == {0, 7, (1 << 16) + 3, (1 << 16) + 9}
    rows, _ = prepare_rows(
        DataConfig(dataset=path, sequence_length=8, validation_documents=0, cache_dir=str(tmp_path / "cache")),
        tokenizer,
    )
    assert np.max(rows.input_ids) == (1 << 16) + 9


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    make_teacher_directory(root / "llama")
    make_teacher_directory(root / "gpt2", make=make_gpt2)
    make_teacher_directory(root / "mistral", make=make_mistral)
    make_bert_directory(root / "bert")
    for folder in [*root.iterdir()]:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(["nobody-knows", "this-one"])
        tokenizer.save_pretrained(folder)
    write_text(root / "text.jsonl")
    return root


TRAINING = {"kind": "train", "weights": "all", "batch_size": 1, "tokens_per_step": 32, "max_steps": 1}
RUNS = {
    "gain cell": ("gpt2", {"attention": {"type": "gain_cell"}, "stages": {"linear": TRAINING}}),
    "landmark": ("mistral", {"attention": {"type": "landmark"}, "stages": {"training": TRAINING}}),
    "encoder": ("bert", {"stages": {"distillation": {**TRAINING, "objective": "embeddings"}}}),
    "stock": ("llama", {"attention": None, "stages": {"training": TRAINING}}),
    "transfer": ("llama", {}),
}
"""What runs start from, and what they do that the tiny run does not."""
COMMANDS = {"glue": "bert", "evaluate": "llama", "evaluate an encoder": "bert"}


def refused(capsys, rows, *arguments):
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert f"ids up to {rows + 1}, but the model's embedding has {rows} rows" in error and "Traceback" not in error


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_both_sizes(root, tmp_path, capsys, command):
    model = root / COMMANDS[command]
    rows = vocabulary_size(AutoTokenizer.from_pretrained(model)) - 2
    text, out = root / "text.jsonl", tmp_path / "out"
    options = ["--output_dir", out, "--device", "cpu"]
    arguments = {
        "evaluate": ["evaluate", model, "--text", text, "--device", "cpu"],
        "evaluate an encoder": ["evaluate", model, "--text", text, "--device", "cpu"],
        "glue": ["glue", "--models", model, "--tasks", "sst2", "--data.sequence_length", "32", *options],
    }
    refused(capsys, rows, *arguments[command])


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_names_both_sizes(root, tmp_path, capsys, kind):
    model, changes = RUNS[kind]
    settings = tiny_config(root / model, root / "text.jsonl", tmp_path / "out", root / "cache") | changes
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    rows = vocabulary_size(AutoTokenizer.from_pretrained(root / model)) - 2
    refused(capsys, rows, "run", tmp_path / "config.yaml")
    assert not (tmp_path / "out").exists()
