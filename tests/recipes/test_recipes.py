"""The recipe as a user starts it, and what its result is good for; and every shipped YAML."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fakehub import FakeHub
from tiny_runs import (
    BLOCK_PACKAGE,
    WORDS,
    make_bert_directory,
    make_teacher_directory,
    tiny_config,
    without_package,
    write_text,
)
from transformers import BertForMaskedLM

from linearize.encoder_settings import EncoderRunConfig
from linearize.gain_cell_stages import GainCellRunConfig
from linearize.glue_settings import GlueRunConfig
from linearize.landmark_stages import LandmarkRunConfig
from linearize.pretraining_settings import PretrainConfig
from linearize.settings import RunConfig
from linearize.settings_io import flat_names, preset_names, resolve

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "linearize_llama3.py"
PRETRAIN = ROOT / "recipes" / "pretrain.py"
GPT2 = ROOT / "recipes" / "linearize_gpt2.py"
BERT = ROOT / "recipes" / "linearize_bert.py"
MISTRAL = ROOT / "recipes" / "linearize_mistral.py"
LANDMARK = ROOT / "recipes" / "linearize_landmark.py"
GLUE = ROOT / "recipes" / "finetune_glue.py"
SETTINGS = {
    RECIPE: RunConfig,
    MISTRAL: RunConfig,
    PRETRAIN: PretrainConfig,
    GPT2: GainCellRunConfig,
    LANDMARK: LandmarkRunConfig,
    BERT: EncoderRunConfig,
    GLUE: GlueRunConfig,
}
"""Recipe -> what its YAML files and flags set."""

LOAD = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
results = []
for source in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    inputs = AutoTokenizer.from_pretrained(source, trust_remote_code=True)("the river", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=16, max_length=None, do_sample=False)
    results.append([type(model).__module__.partition(".")[0], output[0].tolist()])
print("RESULT", json.dumps(results))
"""


def environment(**changes):
    """The checkout on the path, one thread, no GPU and no network."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    fixed = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **fixed, **changes}


def launch(
    *arguments,
    recipe=RECIPE,
    launcher=("accelerate", "launch", "--cpu", "--num_processes", "1"),
    timeout=300,
    **changes,
):
    """Run the recipe as its docstring says, from another directory."""
    command = [str(Path(sys.executable).parent / launcher[0]), *launcher[1:], str(recipe), *map(str, arguments)]
    return subprocess.run(
        command, env=environment(**changes), capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
    )


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipe")
    make_teacher_directory(root / "teacher")
    write_text(root / "text.jsonl")
    config = tiny_config(root / "teacher", root / "text.jsonl", root / "out", root / "cache")
    (root / "tiny.yaml").write_text(yaml.safe_dump(config))
    return root


@pytest.fixture(scope="module")
def final(workspace):
    """The repository that the recipe leaves."""
    run = launch("--config", workspace / "tiny.yaml", "--transfer.max_steps", "2")
    assert run.returncode == 0, run.stderr[-3000:]
    assert "MiB" in run.stdout  # the memory that it expects
    assert run.stdout.index("attention") < run.stdout.index("attention transfer: 2 steps")
    return workspace / "out" / "final"


@pytest.mark.slow
def test_final_loads_alone_and_goes_through_the_hub(final, workspace, tmp_path):
    with FakeHub() as hub:
        online = hub.environment(tmp_path / "home")
        push = [sys.executable, "-m", "linearize.cli", "push", str(final), "tester/tiny"]
        pushed = subprocess.run(
            push, env={**online, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
        )
        assert pushed.returncode == 0, pushed.stderr[-2000:]
        command = [*without_package(LOAD), str(final), "tester/tiny"]
        loaded = subprocess.run(command, env=online, cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert "RESULT" in loaded.stdout, loaded.stderr[-3000:]
        local, pulled = json.loads(loaded.stdout.rpartition("RESULT ")[2])
        assert local == pulled
        assert local[0] == "transformers_modules" and len(local[1]) > 10


@pytest.mark.slow
def test_unmodified_lm_eval_scores_final(final, tmp_path):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    questions = [
        {"question": f"the river ran past {i}", "choices": ["snow", "cats"], "answer": i % 2} for i in range(4)
    ]
    (tasks / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    task = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tasks / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    (tasks / "tiny_choice.yaml").write_text(yaml.safe_dump(task))
    code = BLOCK_PACKAGE + "from lm_eval.__main__ import cli_evaluate\ncli_evaluate()"
    arguments = ["run", "--model", "hf", "--model_args", f"pretrained={final},trust_remote_code=True,dtype=float32"]
    arguments += ["--tasks", "tiny_choice", "--include_path", str(tasks), "--device", "cpu", "--batch_size", "2"]
    arguments += ["--output_path", str(tmp_path / "scores")]
    offline = {**environment(HF_DATASETS_OFFLINE="1", HF_HOME=str(tmp_path / "home")), "PYTHONPATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=offline,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads(next((tmp_path / "scores").rglob("results_*.json")).read_text())
    assert 0 <= results["results"]["tiny_choice"]["acc,none"] <= 1


@pytest.mark.slow
def test_bad_input_is_said_once_by_several_processes(workspace, tmp_path):
    launcher = ("torchrun", "--nproc_per_node", "2", "--log-dir", str(tmp_path / "logs"))
    flags = ["--config", workspace / "tiny.yaml", "--output_dir", tmp_path / "out", "--attention.window", "-1"]
    run = launch(*flags, launcher=launcher, ACCELERATE_USE_CPU="true")
    assert run.returncode != 0
    assert run.stderr.count("window is -1") == 1
    assert re.search(r"exitcode\s*:\s*2", run.stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_bad_input_under_accelerate_launch(workspace, final):
    run = launch("--config", workspace / "tiny.yaml")
    assert run.returncode != 0
    assert run.stderr.count("already holds a run") == 1
    assert "exit status 2" in run.stderr


@pytest.mark.slow
def test_two_processes_make_the_same_repository(workspace, tmp_path):
    launcher = ("torchrun", "--nproc_per_node", "2")
    run = launch(
        "--config",
        workspace / "tiny.yaml",
        "--output_dir",
        tmp_path / "out",
        launcher=launcher,
        ACCELERATE_USE_CPU="true",
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("Saved ") == 1
    assert (tmp_path / "out" / "final" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [{"model": {}}, {"model": {"type": "bert"}, "attention": {"type": "linear", "window": 4}}],
    ids=["", "bert"],
)
def test_pretraining_by_one_process_and_by_two(model, workspace, tmp_path):
    config = {
        "device": "cpu",
        "tokenizer": "train",
        "vocab_size": 300,
        **model,
        "data": {"dataset": str(workspace / "text.jsonl"), "sequence_length": 16, "validation_documents": 6},
        "training": {"max_steps": 6, "batch_size": 2, "tokens_per_step": 128, "warmup_steps": 1, "save_steps": 3},
    }
    config["data"]["cache_dir"] = str(tmp_path / "cache")
    config["model"] = {"n_layer": 2, "n_head": 2, "n_embd": 32, **model["model"]}
    config["training"] |= {"eval_steps": 2, "logging_steps": 1}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    reports = []
    for name, launcher in {
        "one": ("accelerate", "launch", "--cpu", "--num_processes", "1"),
        "two": ("torchrun", "--nproc_per_node", "2"),
    }.items():
        flags = ["--config", tmp_path / "tiny.yaml", "--output_dir", tmp_path / name]
        run = launch(*flags, recipe=PRETRAIN, launcher=launcher, ACCELERATE_USE_CPU="true")
        assert run.returncode == 0, run.stderr[-3000:]
        assert run.stdout.count("Saved ") == 1
        assert (tmp_path / name / "final" / "model.safetensors").is_file()
        reports.append(json.loads((tmp_path / name / "report.json").read_text()))
    one, two = reports
    assert [step for step, _ in one["validation"]] == [2, 4, 6]
    for name in ("losses", "validation"):
        assert [value for _, value in two[name]] == pytest.approx([value for _, value in one[name]], rel=1e-4)


@pytest.mark.slow
def test_an_encoder_by_one_process_and_by_two(tmp_path):
    stage = {"max_steps": 3, "batch_size": 2, "tokens_per_step": 128, "logging_steps": 1}
    config = {
        "model_name_or_path": str(make_bert_directory(tmp_path / "teacher", kind=BertForMaskedLM)),
        "device": "cpu",
        "attention": {"type": "linear", "window": 3, "sinks": 1},
        "data": {"dataset": str(tmp_path / "text.jsonl"), "sequence_length": 32, "cache_dir": str(tmp_path / "cache")},
        "transfer": stage,
        "mlm": {**stage, "warmup_steps": 1, "dropout": False},
        "distillation": {**stage, "warmup_steps": 1},
        "evaluation": {"pairs": 4},
    }
    text = "\n".join(json.dumps({"text": f"The {a} ran past a house. Two old cats {a} slept there."}) for a in WORDS)
    (tmp_path / "text.jsonl").write_text(text)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    logs = []
    for number in ("1", "2"):
        flags = ["--config", tmp_path / "tiny.yaml", "--output_dir", tmp_path / number]
        launcher = ("torchrun", "--nproc_per_node", number)
        run = launch(*flags, recipe=BERT, launcher=launcher, ACCELERATE_USE_CPU="true")
        assert run.returncode == 0, run.stderr[-3000:]
        assert run.stdout.count("Saved ") == 1
        stages = [tmp_path / number / "logs" / f"{name}.jsonl" for name in ("transfer", "mlm", "distillation")]
        logs.append([json.loads(line)["loss"] for path in stages for line in path.read_text().splitlines()])
    assert len(logs[0]) == 9 and logs[1] == pytest.approx(logs[0], rel=1e-3)


@pytest.mark.slow
def test_glue_by_one_process_and_by_two(tmp_path):
    teacher = make_bert_directory(tmp_path / "teacher")
    for split in ("train", "validation_matched", "validation_mismatched"):
        rows = [{"premise": f"two {a} cats", "hypothesis": a, "label": i % 3} for i, a in enumerate(WORDS)]
        path = tmp_path / "files" / "mnli" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(map(json.dumps, rows)))
    flags = ["--models", teacher, "--tasks", "mnli", "--seeds", "0,1", "--device", "cpu"]
    flags += ["--data.dataset", tmp_path / "files", "--data.sequence_length", "16", "--training.batch_size", "4"]
    flags += ["--training.max_steps", "3", "--training.learning_rates", "1e-3", "--training.logging_steps", "1"]
    logs = []
    for number in ("1", "2"):
        launcher = ("torchrun", "--nproc_per_node", number)
        out = tmp_path / number
        run = launch(*flags, "--output_dir", out, recipe=GLUE, launcher=launcher, ACCELERATE_USE_CPU="true")
        assert run.returncode == 0, run.stderr[-3000:]
        assert run.stdout.count("Saved ") == 1 and run.stdout.count("MNLI, teacher") == 2
        assert len(json.loads((out / "report.json").read_text())["results"]) == 2
        logs.append([json.loads(line)["loss"] for line in next(out.rglob("lr0.001-seed1.jsonl")).open()])
    assert len(logs[0]) == 3 and logs[1] == pytest.approx(logs[0], rel=1e-4)


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.stem)
def test_every_recipe_is_a_page_and_importable(path, capsys):
    import importlib.util

    assert len(path.read_text().splitlines()) <= 150
    spec = importlib.util.spec_from_file_location("recipe", path)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    assert recipe.main(["--data.sequence_length", "many"]) == 2
    assert capsys.readouterr().err.count("data.sequence_length is 'many'") == 1
    assert recipe.DEFAULT_CONFIG in preset_names(SETTINGS[path])


def test_the_defaults_of_the_recipe_are_the_issue_s():
    config = resolve("llama3_8b_linear")
    assert config.model_name_or_path == "meta-llama/Meta-Llama-3-8B"
    assert config.data.dataset == "yahma/alpaca-cleaned" and config.data.sequence_length == 1024
    assert config.transfer.tokens == config.finetune.tokens == 20_000_000


def test_every_yaml_is_valid():
    configs = sorted((ROOT / "recipes" / "configs").rglob("*.yaml"))
    assert len(configs) >= 3
    folders = {settings.preset_folder: settings for settings in SETTINGS.values()}
    for path in configs:
        folder = path.parent.relative_to(ROOT / "recipes" / "configs")
        config = resolve(path, settings=folders[str(folder)])
        assert config.output_dir and path.read_text().startswith("#")
    launchers = sorted((ROOT / "recipes" / "accelerate").rglob("*.yaml"))
    assert launchers
    for path in launchers:
        assert yaml.safe_load(path.read_text())["mixed_precision"] == "no"
    assert (ROOT / "linearize" / "configs").resolve() == ROOT / "recipes" / "configs"


@pytest.mark.parametrize("recipe", SETTINGS, ids=lambda path: path.stem)
def test_commands_in_the_docstring_name_files_and_flags_that_exist(recipe):
    settings = SETTINGS[recipe]
    text = recipe.read_text().partition('"""')[2].partition('"""')[0]
    for path in re.findall(r"recipes/\S+\.(?:py|yaml)", text):
        assert (ROOT / path).is_file(), path
    known = {*flat_names(settings), "config", "dry_run", "help", "config_file", "num_processes", "passkey"}
    flags = {re.sub(r"^attention\.\w+", "attention", flag) for flag in re.findall(r"--([\w.]+)", text)}
    assert flags <= known
    assert set(re.findall(r"--config (\w+)(?!\.)\b", text)) - {"my"} <= set(preset_names(settings))
