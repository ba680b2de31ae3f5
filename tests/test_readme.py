"""Every shell command of the README is run as it stands: tiny models and texts lie where it has its own.

A command that trains is read first without training, and then trains for two steps of small sequences: the flags that
make it small come last, so those of the README stay in force beside them. What needs a network, several processes or
tasks of another package is parsed.
"""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from accelerate.commands.launch import launch_command_parser
from cosine_toys import write as write_cosine_checkpoint
from test_gain_cell_import import write as write_gain_cell_checkpoint
from test_landmark_import import write as write_landmark_checkpoint
from tiny_models import make_gpt2, make_mistral, make_teacher
from tiny_runs import WORDS, make_bert_directory, make_teacher_directory

import linearize
from linearize.cli import main
from linearize.config.yaml_io import to_values

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = ("make", "pip", "accelerate", "linearize", "lm_eval")
SMALL = {
    "": {"device": "cpu"},
    "data": {"sequence_length": 64, "max_tokens": 8192, "validation_documents": 8},
    "select": {"sequence_length": 64, "tokens": 128, "windows": "8,16,32"},
    "architecture": {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_inner": 64, "n_positions": 64},
    "evaluation": {"max_tokens": 128, "pairs": 4, "length_tokens": 0},
    "tokenizer": {"vocab_size": 300},
}
STAGE = {
    "max_steps": 2, "batch_size": 1, "tokens_per_step": 64, "warmup_steps": 0, "compile": "false", "eval_tokens": 128,
    "sequences": 4, "iterations": 2,
}  # fmt: skip
MECHANISMS = {
    "linear": {"feature_dim": 8, "window": 8},
    "cosine": {"window": 8},
    "gain_cell": {"cell": "{tile: 8, score_saturation: 20.0, output_saturation: 10.0}"},
    "landmark": {"block_size": 8, "top_k": 3},
    "salient": {},
}
LLAMA = {"hidden_size": 64, "head_dim": 64, "num_hidden_layers": 5, "max_position_embeddings": 2048}
MEASURES = {
    "--passkey": "320",
    "--natural": "420",
    "--context_perplexity": "32,64",
    "--trials": "2",
    "--max_tokens": "256",
    "--sequence_length": "64",
}


def command_lines(text):
    """The commands of a block, a continued one whole, without what stands behind `  #`."""
    lines = text.replace("\\\n", " ").splitlines()
    commands = [re.split(r"\s{2,}#", line)[0].strip() for line in lines]
    return [line for line in commands if line.split(" ")[0] in PROGRAMS]


def blocks():
    """The commands of the README, those of a code block together; of its prose those with something to run on."""
    parts = re.split(r"^```(.*)\n", README, flags=re.MULTILINE)  # prose, language, block, "", prose, ...
    fenced = [block for language, block in zip(parts[1::4], parts[2::4], strict=True) if not language]
    inline = re.findall(r"`(linearize (?:run|evaluate|select) [^`]+)`", "".join(parts[0::4]))
    return [found for block in [*fenced, *inline] if (found := command_lines(block))]


def write_texts(folder):
    """The texts that the README names, of sentences."""
    sentence = " ".join(WORDS).capitalize() + "."
    lines = [f"The {a} ran past a house. Two old cats {b} slept there. {sentence}" for a in WORDS for b in WORDS[:8]]
    for name, part in (("text.jsonl", lines[20:]), ("other.jsonl", lines[:20])):
        (folder / name).write_text("".join(f'{{"text": "{line}"}}\n' for line in part))
    for name in ("held_out.txt", "long.txt", "news.txt", "TEXT"):
        (folder / name).write_text("\n\n".join(lines))


def stand_in(name):
    """A tiny model where the README or a preset has its own, if none is there."""
    path = Path(name)
    if path.exists():
        return
    if "bert" in name.lower() or "minilm" in name.lower():
        make_bert_directory(path, sentences="minilm" in name.lower())
        return
    gpt2 = "gpt2" in name
    make = make_gpt2 if gpt2 else make_mistral if "mistral" in name.lower() else make_teacher
    make_teacher_directory(path, make=make, **({} if gpt2 else LLAMA))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with all that the README's commands start from."""
    root = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        write_texts(root)
        for name in ("path/to/llama", "path/to/gpt2", "path/to/minilm"):
            stand_in(name)
        shutil.copytree("path/to/llama", "path/to/base")
        write_gain_cell_checkpoint(Path("ckpt.pt"))
        start = "linearize run smollm2_135m path/to/llama --data text.jsonl --output_dir prepared"
        train(start.split(), patch)
    return root


def small(settings, command):
    """Flags that make a run of these settings small."""
    values = to_values(settings)
    stages = values.pop("stages", {"training": values["training"]} if "training" in values else {})
    flags = {name: value for name, value in SMALL[""].items() if name in values}
    for name, section in values.items():
        if (
            isinstance(section, dict)
            and name in SMALL
            and not (name == "tokenizer" and values["architecture"] is None)
        ):
            flags |= {f"{name}.{key}": value for key, value in SMALL[name].items() if key in section}
    for name, stage in stages.items():
        flags |= {f"{name}.{key}": value for key, value in STAGE.items() if key in stage}
    if command in ("transfer", "finetune"):  # one stage of a model that has its attention
        flags = {name: value for name, value in flags.items() if not name.startswith(("select.", "evaluation."))}
        return [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    if not values.get("mixer_types") and values.get("attention"):
        flags |= {f"attention.{key}": value for key, value in MECHANISMS[values["attention"]["type"]].items()}
    if values.get("state_budget"):
        flags["state_budget"] = "20KB/layer"
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def call(words):
    """Run a command in this process: its exit code must be 0."""
    if words[0] == "linearize":
        assert main(words[1:]) == 0
        return
    module = {"__name__": "recipe", "__file__": str(ROOT / words[1])}
    exec(compile((ROOT / words[1]).read_text(), words[1], "exec"), module)  # noqa: S102
    assert module["main"](words[2:]) == 0


def train(words, monkeypatch):
    """Read a command that trains, as it stands; then run it, small."""
    seen = []

    def read(settings):
        seen.append(settings)
        raise typer.Exit

    with monkeypatch.context() as patch:
        patch.setattr("linearize.runs.engine.run", read)
        patch.setattr("linearize.runs.engine.rehearse", read)
        patch.setattr(linearize, "run_glue", read)
        call(words)
    (settings,) = seen
    tokenizer = getattr(settings, "tokenizer", None)
    for name in (getattr(settings, "model_name_or_path", None), tokenizer and tokenizer.name_or_path):
        if name:
            stand_in(name)
    shutil.rmtree(settings.output_dir, ignore_errors=True)
    flags = small(settings, words[1])
    if not Path(settings.data.dataset).exists():  # of the Hub, and so may its split be
        Path(settings.data.dataset).mkdir(parents=True)
        shutil.copy("text.jsonl", settings.data.dataset)
    if not {"--data", "--data.dataset"} & set(words) and settings.data.validation:
        flags += ["--data.validation", "other.jsonl"]
    call([*words, *flags])


def run_linearize(words, monkeypatch):
    """A command of the package that is no training."""
    command = words[1]
    if command == "evaluate":
        with monkeypatch.context() as patch:
            patch.setattr("linearize.cli.evaluate.evaluate_model", lambda *arguments: None)
            call(words)
        given = [flag for flag in MEASURES if flag in words]
        given += [flag for flag in ("--sequence_length", "--max_tokens") if flag not in given]
        depths = ["--depths", "2"] if "--passkey" in words else []
        words = [*words, *(word for flag in given for word in (flag, MEASURES[flag])), *depths, "--device", "cpu"]
    elif command == "select":
        words = [*words, "--device", "cpu", "--dtype", "float32", "--state_budget", "40KB/layer"]
        words += ["--data.sequence_length", "64", "--attention.feature_dim", "8"]
        words += [word for key, value in SMALL["select"].items() for word in (f"--select.{key}", str(value))]
    elif command == "chat":
        words = [*words, "--max_new_tokens", "4"]
    elif command in ("import", "diff", "convert"):
        output = words[3] if command == "convert" else words[4 if command == "import" else 5]
        shutil.rmtree(output, ignore_errors=True)
    call(words)


def run(line, monkeypatch):
    """One command of the README."""
    words = shlex.split(line)
    program = words[0]
    if program == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif program == "pip":
        extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        assert words[:3] == ["pip", "install", "-e"] and set(words[3][2:-1].split(",")) <= set(extras)
    elif program == "lm_eval":
        from lm_eval._cli.harness import HarnessCLI

        monkeypatch.setattr(sys, "argv", words)
        assert HarnessCLI().parse_args().tasks
    elif program == "accelerate":
        launched = launch_command_parser().parse_args(words[2:])
        train(["python", launched.training_script, *launched.training_script_args], monkeypatch)
    elif program == "linearize" and words[1] in ("run", "glue", "transfer", "finetune") and "--help" not in words:
        train(words, monkeypatch)
    else:
        run_linearize(words, monkeypatch)


@pytest.mark.parametrize("commands", blocks(), ids=lambda commands: commands[0][:60])
def test_the_commands_run(commands, workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    shutil.rmtree("out", ignore_errors=True)
    shutil.copytree("prepared", "out")
    monkeypatch.setattr("linearize.hub.repository.push", lambda *arguments, **options: "https://hub/me")
    monkeypatch.setattr("linearize.evaluation.run_tasks", lambda *arguments, **options: type("", (), {"show": print}))
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, target, **options: None)  # the slowest part
    lines = iter(["the cats", ""] * 9)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    for line in commands:
        print(line)
        if "path/to/checkpoint" in line:
            shutil.rmtree("path/to/checkpoint", ignore_errors=True)
            if "cosine" in line:
                write_cosine_checkpoint(Path("path/to/checkpoint"), "gptj")
            else:
                write_landmark_checkpoint(Path("path/to/checkpoint"))
        run(line, monkeypatch)
        ended = "\nrepository  " in (shown := capsys.readouterr().out) and "\nnext        linearize " in shown
        trains = re.search(r"linearize (run|transfer|finetune) |(linearize (?!select)|recipes/).*--output_dir", line)
        assert ended == (bool(trains) and "--dry_run" not in line), shown


def test_the_readme_has_commands():
    found = [line for block in blocks() for line in block]
    assert len(found) > 40 and {line.split()[0] for line in found} == set(PROGRAMS)
