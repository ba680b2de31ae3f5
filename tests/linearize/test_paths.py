"""`~` in paths: one function expands it for settings, configs, command lines and calls."""

import os
from pathlib import Path

import pytest
import yaml
from tiny_runs import make_teacher_directory, tiny_config, write_text

import linearize
from linearize.cli import main
from linearize.config.encoder import EncoderRunConfig
from linearize.config.pretraining import PretrainConfig
from linearize.config.record import find_converted
from linearize.config.settings import RunConfig
from linearize.config.yaml_io import resolve, to_values
from linearize.conversion.students import load_config, load_tokenizer
from linearize.errors import UserError
from linearize.evaluation.glue.settings import GlueRunConfig
from linearize.paths import expand_words, user_path
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


@pytest.mark.parametrize("settings", [RunConfig, PretrainConfig, EncoderRunConfig, GlueRunConfig])
def test_every_path_of_the_settings_is_expanded(home, settings):
    paths = {
        "output_dir": "~/out",
        "model_name_or_path": "~/model",
        "tokenizer_name_or_path": "~/words",
        "models": ["~/a", "~/b"],
    }
    data = {"dataset": ["~/a.txt", "~/b.txt"], "cache_dir": "~/cache", "validation": "~/v.txt"}
    known = settings.__dataclass_fields__
    values = {name: value for name, value in paths.items() if name in known}
    values["data"] = {"dataset": "~/glue"} if settings is GlueRunConfig else data
    resolved = to_values(resolve(values, settings=settings))
    found = [resolved[name] for name in paths if name in known] + [resolved["data"][name] for name in values["data"]]
    for path in (part for value in found for part in ([value] if isinstance(value, str) else value)):
        assert path.startswith(f"{home}/"), path


def test_a_run_lies_in_one_place_and_is_resumed_there(home, tmp_path, capsys):
    make_teacher_directory(home / "teacher")
    write_text(home / "text.jsonl")
    settings = tiny_config("~/teacher", "~/text.jsonl", "~/out", "~/cache")
    (home / "config.yaml").write_text(yaml.safe_dump({**settings, "evaluation": None}))
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
