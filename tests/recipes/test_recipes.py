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

from linearize.config import yaml_io
from linearize.config.presets import all_presets, find_preset
from linearize.evaluation.glue.settings import GlueRunConfig
from linearize.runs.settings import flat_names, resolve_run, run_values

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "linearize_llama3.py"
PRETRAIN = ROOT / "recipes" / "pretrain.py"
GPT2 = ROOT / "recipes" / "linearize_gpt2.py"
BERT = ROOT / "recipes" / "linearize_bert.py"
MISTRAL = ROOT / "recipes" / "linearize_mistral.py"
LANDMARK = ROOT / "recipes" / "linearize_landmark.py"
GLUE = ROOT / "recipes" / "finetune_glue.py"
COMMANDS = {RECIPE: "run", MISTRAL: "run", PRETRAIN: "run", GPT2: "run", LANDMARK: "run", BERT: "run", GLUE: "glue"}
"""Recipe -> the command that runs it."""

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


def recipe_module(path):
    import importlib.util

    spec = importlib.util.spec_from_file_location("recipe", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipe")
    make_teacher_directory(root / "teacher")
    write_text(root / "text.jsonl")
    config = tiny_config(root / "teacher", root / "text.jsonl", root / "out", root / "cache")
    (root / "tiny.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
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
        push = [sys.executable, "-m", "linearize", "push", str(final), "tester/tiny"]
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


def pretraining_job(root, text, name, **changes):
    config = {
        "device": "cpu",
        "tokenizer": {"source": "train", "vocab_size": 300},
        "attention": None,
        **changes,
        "data": {"dataset": str(text), "sequence_length": 16, "validation_documents": 6},
        "evaluation": None,
    }
    config["data"]["cache_dir"] = str(root / f"{name}-cache")
    config["architecture"] = {"n_layer": 2, "n_head": 2, "n_embd": 32, **changes.get("architecture", {})}
    objective = "masked" if config["architecture"].get("type") == "bert" else "next_token"
    training = {"kind": "train", "weights": "all", "objective": objective, "max_steps": 6, "batch_size": 2}
    training |= {"tokens_per_step": 128, "warmup_steps": 1, "save_steps": 3, "eval_steps": 2, "logging_steps": 1}
    config["stages"] = {"training": training}
    (root / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return PRETRAIN, ["--config", root / f"{name}.yaml"]


def encoder_job(root):
    stage = {"max_steps": 3, "batch_size": 2, "tokens_per_step": 128, "logging_steps": 1}
    train = {"kind": "train", "weights": "all"}
    text, teacher = root / "sentences.jsonl", make_bert_directory(root / "masked-teacher", kind=BertForMaskedLM)
    config = {
        "model_name_or_path": str(teacher),
        "device": "cpu",
        "attention": {"type": "linear", "window": 3, "sinks": 1},
        "data": {"dataset": str(text), "sequence_length": 32, "cache_dir": str(root / "encoder-cache")},
        "stages": {
            "transfer": {"kind": "transfer", **stage},
            "mlm": {**train, **stage, "objective": "masked", "warmup_steps": 1, "dropout": False},
            "distillation": {**train, **stage, "objective": "embeddings", "warmup_steps": 1},
        },
        "evaluation": {"pairs": 4},
    }
    lines = (json.dumps({"text": f"The {a} ran past a house. Two old cats {a} slept there."}) for a in WORDS)
    text.write_text("\n".join(lines))
    (root / "encoder.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return BERT, ["--config", root / "encoder.yaml"]


def glue_job(root):
    teacher = make_bert_directory(root / "glue-teacher")
    for split in ("train", "validation_matched", "validation_mismatched"):
        rows = [{"premise": f"two {a} cats", "hypothesis": a, "label": i % 3} for i, a in enumerate(WORDS)]
        path = root / "files" / "mnli" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(map(json.dumps, rows)))
    flags = ["--models", teacher, "--tasks", "mnli", "--seeds", "0,1", "--device", "cpu"]
    flags += ["--data.dataset", root / "files", "--data.sequence_length", "16", "--training.batch_size", "4"]
    flags += ["--training.max_steps", "3", "--training.learning_rates", "1e-3", "--training.logging_steps", "1"]
    return GLUE, flags


SEVERAL = """
import importlib.util, json, sys

for recipe, flags in json.loads(sys.argv[1]):
    spec = importlib.util.spec_from_file_location("recipe", recipe)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(flags) == 0, flags
"""


@pytest.fixture(scope="module")
def by_one_and_by_two(workspace, tmp_path_factory):
    """The output directories of a job's run by this process and by two. The two go through all jobs one after the
    other, for they take longer to start than to run."""
    root = tmp_path_factory.mktemp("two")
    jobs = {
        "linear": (RECIPE, ["--config", workspace / "tiny.yaml"]),
        "gpt2": pretraining_job(root, workspace / "text.jsonl", "gpt2"),
        "bert": pretraining_job(
            root,
            workspace / "text.jsonl",
            "bert",
            architecture={"type": "bert"},
            attention={"type": "linear", "window": 4},
        ),
        "encoder": encoder_job(root),
        "glue": glue_job(root),
    }

    def arguments(name, where):
        return [*map(str, jobs[name][1]), "--output_dir", str(where / name)]

    (root / "several.py").write_text(SEVERAL)
    todo = [[str(recipe), arguments(name, root / "by_two")] for name, (recipe, _) in jobs.items()]
    launcher = ("torchrun", "--nproc_per_node", "2")
    two = launch(json.dumps(todo), recipe=root / "several.py", launcher=launcher, ACCELERATE_USE_CPU="true")
    assert two.returncode == 0, two.stderr[-3000:]
    assert two.stdout.count("Saved ") == len(jobs)  # one of the two speaks
    assert two.stdout.count("MNLI, glue-teacher") == 2

    def run(name):
        assert recipe_module(jobs[name][0]).main(arguments(name, root / "by_one")) == 0
        return root / "by_one" / name, root / "by_two" / name

    return run


def losses_of(path):
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_run_by_one_process_and_by_two(by_one_and_by_two):
    one, two = by_one_and_by_two("linear")
    assert (two / "final" / "model.safetensors").is_file()
    for stage in ("transfer", "finetune"):
        path = Path("logs") / f"{stage}.jsonl"
        assert losses_of(two / path) == pytest.approx(losses_of(one / path), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_pretraining_by_one_process_and_by_two(kind, by_one_and_by_two):
    folders = by_one_and_by_two(kind)
    assert all((folder / "final" / "model.safetensors").is_file() for folder in folders)
    reports = (json.loads((folder / "report.json").read_text()) for folder in folders)
    one, two = (report["stages"]["training"] for report in reports)
    assert [step for step, _ in one["validation"]] == [2, 4, 6]
    for name in ("losses", "validation"):
        assert [value for _, value in two[name]] == pytest.approx([value for _, value in one[name]], rel=1e-4)


@pytest.mark.slow
def test_an_encoder_by_one_process_and_by_two(by_one_and_by_two):
    stages = [Path("logs") / f"{name}.jsonl" for name in ("transfer", "mlm", "distillation")]
    one, two = ([loss for path in stages for loss in losses_of(out / path)] for out in by_one_and_by_two("encoder"))
    assert len(one) == 9 and two == pytest.approx(one, rel=1e-3)


@pytest.mark.slow
def test_glue_by_one_process_and_by_two(by_one_and_by_two):
    folders = by_one_and_by_two("glue")
    assert all(len(json.loads((out / "report.json").read_text())["results"]) == 2 for out in folders)
    one, two = (losses_of(next(out.rglob("lr0.001-seed1.jsonl"))) for out in folders)
    assert len(one) == 3 and two == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_every_recipe_is_a_page_and_importable(path, capsys):
    assert len(path.read_text().splitlines()) <= 150
    recipe = recipe_module(path)
    assert recipe.main(["--data.sequence_length", "many"]) == 2
    assert capsys.readouterr().err.count("data.sequence_length is 'many'") == 1
    assert find_preset(recipe.DEFAULT_CONFIG).command == COMMANDS[path]


def test_the_defaults_of_the_recipe_are_the_issue_s():
    config = resolve_run("llama3_8b_linear")
    assert config.model_name_or_path == "meta-llama/Meta-Llama-3-8B"
    assert config.data.dataset == "yahma/alpaca-cleaned" and config.data.sequence_length == 1024
    assert config.stages["transfer"].tokens == config.stages["finetune"].tokens == 20_000_000


def test_every_yaml_is_valid():
    configs = sorted((ROOT / "recipes" / "configs").rglob("*.yaml"))
    assert len(configs) >= 3
    assert sorted(preset.name for preset in all_presets()) == [path.stem for path in configs]
    for preset in all_presets():
        path = preset.path
        config = resolve_run(path) if preset.command == "run" else yaml_io.resolve(path, settings=GlueRunConfig)
        assert config.output_dir and path.read_text().startswith("#")
    launchers = sorted((ROOT / "recipes" / "accelerate").rglob("*.yaml"))
    assert launchers
    for path in launchers:
        assert yaml.safe_load(path.read_text())["mixed_precision"] == "no"
    assert (ROOT / "linearize" / "configs").resolve() == ROOT / "recipes" / "configs"


def flags_of(recipe, preset):
    """Names of the settings that are flags of a recipe over a preset."""
    return yaml_io.flat_names(GlueRunConfig) if COMMANDS[recipe] == "glue" else flat_names(run_values(preset))


@pytest.mark.parametrize("recipe", COMMANDS, ids=lambda path: path.stem)
def test_commands_in_the_docstring_name_files_and_flags_that_exist(recipe):
    text = recipe.read_text().partition('"""')[2].partition('"""')[0]
    for path in re.findall(r"recipes/\S+\.(?:py|yaml)", text):
        assert (ROOT / path).is_file(), path
    known = {"config", "dry_run", "help", "config_file", "num_processes", "passkey"}
    known |= flags_of(recipe, recipe_module(recipe).DEFAULT_CONFIG).keys()
    flags = {re.sub(r"^attention\.\w+", "attention", flag) for flag in re.findall(r"--([\w.]+)", text)}
    assert flags <= known
    for name in set(re.findall(r"--config (\w+)(?!\.)\b", text)) - {"my"}:
        assert find_preset(name).command == COMMANDS[recipe]
