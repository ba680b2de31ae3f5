"""The command line's language: help without models, presets by name, another dataset, sizes, `-` and `_`."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from tiny_models import make_gpt2
from tiny_runs import WORDS, make_bert_directory, make_teacher_directory, tiny_config, write_text

import linearize
from linearize.cli import main
from linearize.config.presets import all_presets
from linearize.config.sizes import parse_tokens
from linearize.config.values import field_types, section_type
from linearize.config.yaml_io import OF_ITS_DATASET, left_behind, read_mapping, resolve
from linearize.errors import UserError
from linearize.evaluation.glue.settings import GlueRunConfig
from linearize.runs import engine
from linearize.runs.directory import StagesDirectory
from linearize.runs.settings import RunConfig, resolve_run

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "numpy", "huggingface_hub", "datasets", "peft", "matplotlib", "lm_eval")
START = f"""
import atexit, runpy, sys, time
def report():
    print("HEAVY", [name for name in {HEAVY} if name in sys.modules], "CPU", time.process_time())
atexit.register(report)
"""
AS_SCRIPT = START + "sys.argv[0] = '/a/bin/linearize'; from linearize.cli import main; sys.exit(main())"


def started(code, *words, **variables):
    """A fresh process, what it printed and its exit code."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-c", code, *words]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return run.returncode, run.stdout


@pytest.mark.parametrize(
    ("words", "shows"),
    [
        (("--help",), "finetune"),
        (("--version",), "linearize "),
        (("presets",), "lolcats"),
        (("run", "--help"), "--finetune.tokens"),
        (("run", "gpt2_mini_gain_cell", "-h"), "--refined.tokens"),
        (("evaluate", "--help"), "--data"),
    ],
)
def test_help_version_and_presets_need_no_models(words, shows):
    code, printed = started(AS_SCRIPT, *words)
    assert code == 0 and shows in printed
    assert "HEAVY []" in printed
    assert float(printed.rpartition("CPU ")[2]) < 1.5


def test_a_shell_completes_the_flags_of_a_presets_stages():
    words = {"COMP_WORDS": "linearize run smollm2_135m --finetune.l", "COMP_CWORD": "3"}
    code, printed = started(AS_SCRIPT, _LINEARIZE_COMPLETE="complete_bash", **words)
    assert code == 0 and "--finetune.learning_rate" in printed.split() and "--finetune.lora_rank" in printed.split()
    assert all(word.startswith("--finetune.l") for word in printed.partition("HEAVY")[0].split())


COMMANDS = [
    *(["run"], ["presets"], ["convert"], ["select"], ["transfer"], ["finetune"], ["evaluate"], ["chat"], ["info"]),
    *(["push"], ["glue"], ["export-vectors"], ["import", "gain-cell"], ["import", "landmark"], ["import", "cosine"]),
    *(["diff", "make"], ["diff", "recover"]),
]
NAMES = [" ".join(command) for command in COMMANDS]
SCREEN = 55
"""Lines."""


def helped(capsys, *words):
    assert main(list(words)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", [[], ["import"], ["diff"], *COMMANDS], ids=" ".join)
def test_help_fits_a_terminal_of_80_columns(command, capsys, monkeypatch):
    """No name and no sentence of a command is cut, and the short help has one screen."""
    monkeypatch.setenv("COLUMNS", "80")
    short, whole = helped(capsys, *command, "--help"), helped(capsys, *command, "--help-all")
    assert len(short.splitlines()) <= SCREEN
    for shown in (short, whole):
        assert max(map(len, shown.splitlines())) <= 80
        assert not re.search(r"\w\.\.\.", shown.partition("\n")[2])
        assert "<" not in shown and "{" not in shown.partition("Options:")[0]
    assert ("--help-all" in short) == (short != whole) and "--help-all" not in whole
    assert helped(capsys, *command, "--help_all") == whole


def test_every_command_is_in_the_list(capsys):
    listed = [line.split()[0] for line in helped(capsys, "--help").partition("Commands:")[2].splitlines() if line]
    assert listed == list(dict.fromkeys(command[0] for command in COMMANDS if command[0] != "diff")) + ["diff"]


ONE_STAGE = ("transfer", "finetune")
OF_A_MODEL = ("evaluate", "chat", "export-vectors")
IMPORTED = ("import landmark", "import cosine")
DIFF = ("diff make", "diff recover")
SHARED = {
    "--data": ("run", "select", *ONE_STAGE, "evaluate", "export-vectors"),
    "--device": ("run", "select", *ONE_STAGE, *OF_A_MODEL, "glue"),
    "--revision": ("run", "convert", "select", *ONE_STAGE, *OF_A_MODEL, "info", "push", *IMPORTED, *DIFF),
    "--dry_run": ("run", *ONE_STAGE),
    "--overwrite": (
        *("run", "convert", "select", *ONE_STAGE, "glue", "export-vectors"),
        *("import gain-cell", *IMPORTED, *DIFF),
    ),
    "--push_to_hub": ("run", *ONE_STAGE),
}
"""Flag -> the commands that have the thing."""
SWITCHES = ("--dry_run", "--overwrite")


@pytest.mark.parametrize("flag", SHARED)
def test_a_flag_is_spelt_alike_in_all_commands(flag, capsys):
    """With `_` and with `-`, with its value behind `=` too; a command without the thing knows no such flag."""
    for name, command in zip(NAMES, COMMANDS, strict=True):
        has = name in SHARED[flag]
        given = [[spelt] for spelt in (flag, flag.replace("_", "-"))]
        if flag not in SWITCHES:
            given = [words for (spelt,) in given for words in ([spelt, "x"], [f"{spelt}=x"])]
        elif flag == "--overwrite":
            given += [["--no-overwrite"], ["--overwrite", "true"], ["--overwrite=false"]]
        for words in given:
            assert main([*command, *words, "--help"]) == (0 if has else 2), (name, words)
        capsys.readouterr()
        shown = helped(capsys, *command, "--help-all")
        assert bool(re.search(rf"^  {flag}[, ]", shown, re.MULTILINE)) == has, name


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A teacher, a run's directory with a conversion of it, and text."""
    root = tmp_path_factory.mktemp("models")
    make_teacher_directory(root / "teacher")
    write_text(root / "text.jsonl")
    assert main(["convert", str(root / "teacher"), str(root / "run" / "final")]) == 0
    return root


def words_on(command, model, models, out):
    """A command on a model."""
    text = str(models / "text.jsonl")
    rest = {
        "evaluate": ["--data", text],
        "push": ["me/model"],
        "select": ["--data", text, "--state_budget", "7MB", "--output_dir", str(out)],
        "transfer": [str(out), "--data", text, "--transfer.max_steps", "1"],
        "finetune": [str(out), "--data", text, "--finetune.max_steps", "1"],
        "export-vectors": [f"{out}.npz"],
    }
    return [command, str(model), *rest.get(command, [])]


ON_ANY = ("evaluate", "chat", "info", "push", "select", "transfer", "finetune", "export-vectors")


@pytest.mark.parametrize("command", ON_ANY)
def test_a_command_says_what_it_looked_for(command, models, tmp_path, capsys):
    for name, says in (
        ("nothing", "looked for a directory of a model or of a run"),
        ("empty", f"looked for config.json in it and in {tmp_path / 'empty' / 'final'}"),
        ("text.txt", "is a file: give the directory"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        (tmp_path / "text.txt").write_text("no model")
        assert main(words_on(command, tmp_path / name, models, tmp_path / "out")) == 2
        said = capsys.readouterr().err
        assert says in said and str(tmp_path / name) in said and said.count("\n") == 1
    here = [*words_on(command, models / "run", models, tmp_path / "out"), "--revision", "v1"]
    assert main(here) == 2 and "is a local one" in capsys.readouterr().err
    twice = [*words_on(command, "me/model@v1", models, tmp_path / "out"), "--revision", "v2"]
    assert main(twice) == 2 and "both name a revision" in capsys.readouterr().err


@pytest.mark.parametrize("command", ON_ANY)
def test_a_model_of_the_hub_may_have_a_revision(command, models, tmp_path, monkeypatch, capsys):
    def asked(source, *, revision=None, token=None):
        raise UserError(f"asked for {source} at {revision}")

    monkeypatch.setattr("linearize.conversion.students.load_config", asked)
    for name, flags, says in (
        ("me/model@v1", [], "me/model at v1"),
        ("me/model", ["--revision", "v1"], "me/model at v1"),
        ("me/model", [], "me/model at None"),
        (models / "run", [], f"{models / 'run' / 'final'} at None"),
        (models / "run" / "final", [], f"{models / 'run' / 'final'} at None"),
    ):
        if command in ("info", "push") and not flags and isinstance(name, Path):
            continue  # read from the files
        assert main([*words_on(command, name, models, tmp_path / "out"), *flags]) == 2
        assert f"asked for {says}\n" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "glue", *ONE_STAGE, *OF_A_MODEL])
def test_a_device_is_auto_cpu_or_cuda(command, models, tmp_path, capsys):
    words = [command] if command in ("run", "glue") else words_on(command, models / "run", models, tmp_path / "out")
    assert main([*words, "--device", "tpu"]) == 2
    said = capsys.readouterr().err
    assert "device" in said and "'tpu', but it must be one of auto, cpu, cuda" in said


def test_a_pushed_run_is_its_final_model(models, monkeypatch, capsys):
    pushed = []
    monkeypatch.setattr("linearize.hub.repository.push", lambda directory, *others, **more: pushed.append(directory))
    assert main(["push", str(models / "run"), "me/model"]) == 0 and pushed == [models / "run" / "final"]
    assert main(["info", str(models / "run")]) == 0
    assert main(["push", str(models / "teacher"), "me/model"]) == 2
    assert "linearize convert" in capsys.readouterr().err


def test_a_model_of_the_hub_is_fetched_to_be_shown_or_pushed(models, monkeypatch, capsys):
    """Without its weights, where they say nothing."""
    fetched, pushed = [], []

    def fetch(name, *, revision, allow_patterns):
        fetched.append((name, revision, allow_patterns))
        return str(models / "run" / "final")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.setattr("linearize.cli.loading.read_config", lambda found: None)
    monkeypatch.setattr("linearize.hub.repository.push", lambda directory, *others, **more: pushed.append(directory))
    assert main(["info", "me/model@v1"]) == 0
    assert "me/model@v1" in capsys.readouterr().out
    assert main(["push", "me/model", "you/model", "--revision", "v2"]) == 0
    assert fetched == [("me/model", "v1", ["*.json", "README.md"]), ("me/model", "v2", None)]
    assert pushed == [models / "run" / "final"]


def test_the_package_runs_as_a_module_and_a_name_of_it_loads_late():
    run = [sys.executable, "-m", "linearize", "--version"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert re.fullmatch(r"linearize \d+\.\d+\.\d+\n", subprocess.check_output(run, env=environment, text=True))
    late = START + "sys.argv[0] = 'linearize'; import linearize; linearize.LinearAttentionConfig(window=3)"
    assert "HEAVY ['torch', 'transformers'" in started(late)[1]


def test_a_script_that_imports_the_package_has_the_models_registered():
    code = "import sys; sys.argv[1:] = ['-m', 'linearize']; import linearize; from transformers import AutoConfig; "
    code += "print(AutoConfig.for_model('linearized_llama').model_type)"
    assert "linearized_llama" in started(code)[1]


SETTINGS = {"run": RunConfig, "glue": GlueRunConfig}


def settings_of(preset, overrides):
    """What a preset's command makes of it."""
    if preset.command == "run":
        return resolve_run(preset.path, overrides)
    return resolve(preset.path, overrides, settings=GlueRunConfig)


def test_every_preset_has_its_command():
    assert {preset.command for preset in all_presets()} == SETTINGS.keys()
    names = [preset.name for preset in all_presets()]
    assert len(names) == len(set(names)) == len(list((ROOT / "recipes" / "configs").rglob("*.yaml")))


def test_the_list_of_presets_has_all_and_says_what_for(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["presets"]) == 0
    shown = capsys.readouterr().out
    for preset in all_presets():
        assert f"  {preset.name}\n" in shown
        assert preset.remark("Hardware") and preset.remark("Measured")
    assert "HuggingFaceTB/SmolLM2-135M-Instruct, salient\n    hardware: one H100 that other runs shared, 6" in shown
    assert "gpt2 from random weights, softmax" in shown and "out_cosine_bert_base/final, as converted" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_one_preset_is_printed_as_it_stands(capsys):
    for preset in all_presets():
        assert main(["presets", preset.name]) == 0
        assert capsys.readouterr().out == preset.text()


@pytest.mark.parametrize("words", [["presets"], ["run"], ["run", "--config"], ["glue", "--config"]])
def test_an_unknown_preset_is_answered_with_the_nearest(words, capsys):
    assert main([*words, "smollm2_constant"]) == 2
    said = capsys.readouterr().err
    assert "did you mean smollm2_135m_constant" in said and "`linearize presets`" in said


@pytest.fixture
def seen(monkeypatch):
    """The settings of every run that is started; it ends there, and well."""
    settings = []

    def start(given):
        settings.append(given)
        raise typer.Exit

    monkeypatch.setattr(engine, "run", start)
    monkeypatch.setattr(linearize, "run_glue", start)
    return settings


@pytest.mark.parametrize("preset", all_presets(), ids=lambda preset: preset.name)
def test_a_preset_is_found_by_its_name(preset, seen):
    words = [[preset.command, "--config", preset.name], [preset.command, f"--config={preset.name}"]]
    words += [["run", preset.name]] if preset.command == "run" else []
    for command in words:
        assert main([*command, "--output_dir", "here"]) == 0
    assert seen == [settings_of(preset, {"output_dir": "here"})] * len(words)


def test_a_preset_of_another_command_is_named_with_it(capsys):
    assert main(["run", "--config", "bert_base_glue"]) == 2
    assert "linearize glue --config bert_base_glue" in capsys.readouterr().err
    assert main(["glue", "--config", "smollm2_landmark"]) == 2
    assert "linearize run smollm2_landmark" in capsys.readouterr().err


def test_a_stage_has_flags_of_what_it_does(seen, capsys):
    """The flags are those of the preset's or the file's own stages; what its class leaves open is one of them."""
    words = ["run", "gpt2_mini_pretrain", "--architecture.type", "bert", "--training.objective", "masked"]
    assert main([*words, "--training.max_steps", "5"]) == 0
    training = seen[0].stages["training"]
    assert (training.objective, training.max_steps, seen[0].architecture.type) == ("masked", 5, "bert")
    for preset, stage in (("gpt2_mini_pretrain", "training"), ("llama3_8b_linear", "transfer"), (None, "finetune")):
        assert main(["run", *([preset] if preset else []), "--help"]) == 0
        assert f"--{stage}.tokens" in capsys.readouterr().out
    assert main(["run", "gpt2_mini_pretrain", "--transfer.tokens", "1k"]) == 2
    assert "--transfer.tokens" in capsys.readouterr().err
    assert main(["run", "llama3_8b_linear", "--transfer", "none", "--finetune.learning_rate", "3e-4"]) == 0
    assert list(seen[1].stages) == ["finetune"] and seen[1].stages["finetune"].learning_rate == 3e-4


def test_a_model_may_follow_the_preset(seen):
    assert main(["run", "gpt2_mini_gain_cell", "my/model", "--data", "a.txt", "--data", "b.txt"]) == 0
    assert (seen[0].model_name_or_path, seen[0].data.dataset) == ("my/model", ["a.txt", "b.txt"])
    assert main(["run", "gpt2_mini_gain_cell", "--data", "a.txt", "--data.dataset", "b.txt"]) == 2
    assert main(["run", "gpt2_mini_gain_cell", "my/model@v1"]) == 0
    assert (seen[1].model_name_or_path, seen[1].revision, seen[0].revision) == ("my/model", "v1", None)


OWN = {"dataset_config": "other", "split": "test", "revision": "abc", "validation": "dev"}


@pytest.mark.parametrize("preset", all_presets(), ids=lambda preset: preset.name)
def test_another_dataset_drops_what_a_preset_says_of_its_own(preset):
    settings = SETTINGS[preset.command]
    section = section_type(field_types(settings)["data"])
    values = read_mapping(preset.path)
    has = [name for name in OF_ITS_DATASET if values["data"].get(name) is not None]
    assert left_behind(values, {"data.dataset": "text.jsonl"}, settings) == has
    found = settings_of(preset, {"data.dataset": "text.jsonl"}).data
    plain = section(
        **{**{key: value for key, value in values["data"].items() if key not in has}, "dataset": "text.jsonl"}
    )
    assert found == plain
    given = {f"data.{name}": value for name, value in OWN.items() if name in vars(plain)}
    found = settings_of(preset, {"data.dataset": "a/b", **given}).data
    assert {f"data.{name}": getattr(found, name) for name in OWN if name in vars(plain)} == given


@pytest.mark.parametrize("name", ["smollm2_135m_constant", "smollm2_landmark", "minilm_linear", "cosine_bert_base"])
def test_what_another_dataset_drops_is_said(name, seen, monkeypatch, capsys):
    assert main(["run", name]) == 0
    assert capsys.readouterr().out == ""
    assert main(["run", name, "--data.dataset", "text.jsonl"]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith(f"{name} has data.") and "left out" in said
    monkeypatch.setenv("RANK", "1")
    assert main(["run", name, "--data.dataset", "text.jsonl"]) == 0
    assert capsys.readouterr().out == ""


def test_dashes_and_underscores_are_the_same(seen):
    flags = [
        "--output_dir",
        "a-b",
        "--load_in_4bit",
        "true",
        "--finetune.no_train_mixers",
        "--attention.feature_dim=8",
    ]
    flags += ["--transfer.tokens_per_step", "64k", "--data.isolate_documents=false"]
    dashed = [
        "--output-dir",
        "a-b",
        "--load-in-4bit",
        "true",
        "--finetune.no-train-mixers",
        "--attention.feature-dim=8",
    ]
    dashed += ["--transfer.tokens-per-step", "64k", "--data.isolate-documents=false"]
    words = ["run", "llama3_8b_linear"]
    assert main([*words, *flags]) == main([*words, *dashed]) == 0
    assert seen[0] == seen[1] and seen[0].load_in_4bit and seen[0].output_dir == "a-b"
    assert main(["export_vectors", "--help"]) == main(["export-vectors", "--help"]) == 0


def test_tokens_may_be_written_as_sizes(tmp_path):
    stages = "stages: {transfer: {kind: transfer, tokens: 1.5M}, finetune: {kind: train}}\n"
    (tmp_path / "my.yaml").write_text(
        "model_name_or_path: a/b\ndata: {sequence_length: 2k, max_tokens: 66b}\n" + stages
    )
    flags = {"finetune.tokens": "20M", "finetune.tokens_per_step": "8k", "finetune.sequence_length": "1k,4k"}
    settings = resolve_run(tmp_path / "my.yaml", flags)
    transfer, finetune = settings.stages.values()
    assert (settings.data.sequence_length, transfer.tokens) == (2048, 1_500_000)
    assert (finetune.tokens, finetune.tokens_per_step) == (20_000_000, 8192)
    assert finetune.sequence_length == [1024, 4096]
    assert settings.data.max_tokens == 66_000_000_000
    for wrong in ("1.5", "1.5k", "k", "20 MB", "-1k", "1e3k", ""):
        assert parse_tokens(wrong) is None


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("transfer.tokens", "such as 20M or 1k"),
        ("transfer.max_steps", "must be an integer"),
        ("seed", "must be an int"),
    ],
)
def test_what_is_no_size_is_refused(flag, says):
    with pytest.raises(UserError, match=says):
        resolve_run("llama3_8b_linear", {flag: "20MB" if "tokens" in flag else "1k"})


def test_flags_of_tokens_take_sizes(monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(
        "linearize.cli.evaluate.evaluate_model", lambda found, asked, contexts: seen.update(vars(asked))
    )
    words = ["evaluate", "model", "--data", "a.txt", "--sequence-length", "2k", "--max_tokens", "1M"]
    assert main(words) == 0
    assert (seen["sequence_length"], seen["max_tokens"]) == (2048, 1_000_000)
    assert main(["evaluate", "model", "--text", "a.txt", "--max_tokens", "many"]) == 2
    assert "no number of tokens" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["llama", "bert", "stock gpt2", "stock bert"])
def test_what_a_run_says_to_do_next_can_be_done(kind, tmp_path, monkeypatch, seen, capsys):
    """The commands as they are printed, with a file where they have FILE; none goes on to train or push."""
    teacher, text = tmp_path / "teacher", tmp_path / "text.txt"
    out = tmp_path / ("out" if kind == "stock bert" else "the out")  # GLUE's report takes no spaces
    text.write_text(" ".join(f"The {word} ran past a house. Two old cats slept in {word}." for word in WORDS))
    if kind.endswith("bert"):
        make_bert_directory(teacher)
    else:
        make_teacher_directory(teacher, **({"make": make_gpt2} if "gpt2" in kind else {}))
    if kind.startswith("stock"):
        shutil.copytree(teacher, out / "final")
    else:
        assert main(["convert", str(teacher), str(out / "final")]) == 0
    (out / "plots").mkdir()
    directory = StagesDirectory(RunConfig(model_name_or_path=str(teacher), output_dir=str(out)))
    shown = directory.ending().splitlines()
    assert shown[:2] == [f"repository  {out}/final", f"plots       {out}/plots"] and len(shown) == 5
    (out / "report.json").write_text("{}")
    assert f"report      {out}/report.json" in directory.ending().splitlines()

    monkeypatch.setattr("linearize.hub.repository.push", lambda *arguments, **options: "there")
    monkeypatch.setattr("builtins.input", lambda prompt: "")
    for line in shown[2:]:
        words = shlex.split(
            line.removeprefix("next")
            .replace("FILE", str(text))
            .replace("DIR", str(tmp_path / "new"))
            .replace("PRESET", "gpt2_mini_gain_cell")
        )
        small = ["--sequence_length", "32", "--max_tokens", "64", "--device", "cpu"] if words[1] == "evaluate" else []
        assert words[0] == "linearize" and main([*words[1:], *small]) == 0
    assert len(seen) == {"llama": 0, "bert": 0, "stock gpt2": 1, "stock bert": 2}[kind]


# ---- the plan


def test_without_a_length_a_run_asks_for_one(models, tmp_path, capsys):
    words = ["run", "--model_name_or_path", str(models / "teacher"), "--data", str(models / "text.jsonl")]
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "give transfer.tokens" in said and "or take a preset (`linearize presets`)" in said
    assert not (tmp_path / "out").exists()


def planned(models, out, capsys, *flags):
    """What `--dry_run` prints, by line."""
    settings = tiny_config(models / "teacher", models / "text.jsonl", out, out.parent / "cache")
    (out.parent / "my.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    capsys.readouterr()
    assert main(["run", str(out.parent / "my.yaml"), "--dry-run", *flags]) == 0
    assert not out.exists()
    return capsys.readouterr().out.splitlines()


def test_a_plan_has_time_epochs_memory_and_disk(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    lines = planned(models, tmp_path / "out", capsys)
    assert re.fullmatch(r"About \d+ (s|min) of training on this machine, .*", lines[0])
    shown = {line.split()[0]: line for line in lines if line.strip()}
    tokens = int(re.search(r"training text +([\d,]+) tokens", "\n".join(lines))[1].replace(",", ""))
    stages = [line for line in lines if re.match(r" (transfer|finetune) +(LoRA|mechanism)", line)]
    assert [line.split()[0] for line in stages] == ["transfer", "finetune"]
    for line in stages:
        assert re.search(rf" 192 +{192 / tokens:.2g} +3 ", line) and re.search(r" \d+ (s|min) *$", line)
    assert re.search(r"disk +\d+ MiB, .* are free", shown["disk"])
    held = [line for line in lines if "weights " in line and "activations " in line]
    assert len(held) == 2 and "adapters " in held[1]
    assert not any("reads the text" in line for line in lines)


def test_a_plan_says_first_that_it_takes_long_and_where_a_text_is_read_often(models, tmp_path, capsys):
    lines = planned(models, tmp_path / "out", capsys, "--finetune.max_steps", "none", "--finetune.tokens", "400M")
    assert re.match(r"More than an hour: about \d+ (h|days) ", lines[0])
    said = " ".join(" ".join(lines).split())
    assert "Stage finetune reads the text" in said and "fewer tokens (finetune.tokens)" in said
    assert "Stage transfer reads" not in said
