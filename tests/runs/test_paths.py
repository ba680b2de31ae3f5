"""`~` in paths: one function expands it for settings, configs, command lines and calls."""

import os
from pathlib import Path

import pytest
import yaml
from tiny_runs import make_teacher_directory, tiny_config, write_text

import linearize
from linearize.cli import main
from linearize.config.record import find_converted
from linearize.config.yaml_io import resolve, to_values
from linearize.conversion.students import load_config, load_tokenizer
from linearize.errors import UserError
from linearize.evaluation.glue.settings import GlueRunConfig
from linearize.paths import expand_words, user_path
from linearize.runs.settings import RunConfig, resolve_run
from linearize.training.checkpointing import checkpoint_to_resume


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def test_only_a_home_at_the_start_is_expanded(home):
    assert user_path("~/a") == str(home / "a") and user_path(Path("~/a")) == str(home / "a")
    assert [user_path(name) for name in ("a/~", "owner/name", "~nobody-has-this-name/a", "")] == [
        "a/~",
        "owner/name",
        "~nobody-has-this-name/a",
        "",
    ]
    words = ["run", "~/c.yaml", "--output_dir=~/out", "--data.dataset", "~/a.txt", "--note=a~b"]
    assert expand_words(words) == [
        "run",
        f"{home}/c.yaml",
        f"--output_dir={home}/out",
        "--data.dataset",
        f"{home}/a.txt",
        "--note=a~b",
    ]


DATA = {"dataset": ["~/a.txt", "~/b.txt"], "cache_dir": "~/cache", "validation": "~/v.txt"}
TAUGHT = {"kind": "train", "weights": "all", "max_steps": 1, "teacher": "~/teacher"}


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        (RunConfig, {"output_dir": "~/out", "model_name_or_path": "~/model", "data": DATA, "stages": {"a": TAUGHT}}),
        (RunConfig, {"architecture": {}, "tokenizer": {"name_or_path": "~/words"}, "stages": {}}),
        (GlueRunConfig, {"output_dir": "~/out", "models": ["~/a", "~/b"], "data": {"dataset": "~/glue"}}),
    ],
)
def test_every_path_of_the_settings_is_expanded(home, settings, values):
    resolved = resolve_run(values) if settings is RunConfig else resolve(values, settings=settings)

    def paths(given, found):
        for name, value in given.items():
            if isinstance(value, dict):
                yield from paths(value, found[name])
            elif "~" in str(value):
                yield from found[name] if isinstance(value, list) else [found[name]]

    found = list(paths(values, to_values(resolved)))
    assert found and all(path.startswith(f"{home}/") for path in found)


def test_a_run_lies_in_one_place_and_is_resumed_there(home, tmp_path, capsys):
    make_teacher_directory(home / "teacher")
    write_text(home / "text.jsonl")
    settings = tiny_config("~/teacher", "~/text.jsonl", "~/out", "~/cache")
    (home / "config.yaml").write_text(yaml.safe_dump({**settings, "evaluation": None}, sort_keys=False))
    assert main(["run", "~/config.yaml", "--finetune=none"]) == 0
    assert (home / "out" / "final").is_dir() and (home / "cache").is_dir()
    assert not os.listdir(tmp_path / "work")
    assert main(["run", "--output_dir=~/out", "--resume_from_checkpoint"]) == 0
    assert "is complete" in capsys.readouterr().out
    assert find_converted("~/out") == home / "out" / "final"
    assert linearize.load_student("~/out/final").config.mixer_types == ["linear", "linear"]
    assert load_config("~/teacher").num_hidden_layers == 2 and len(load_tokenizer("~/teacher"))
    with pytest.raises(UserError, match=f"{home}/nothing"):
        checkpoint_to_resume(home / "out" / "empty", "~/nothing")
