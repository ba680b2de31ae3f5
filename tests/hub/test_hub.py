"""A Hub on the loopback interface: push, pull in fresh processes with and without the package, and what goes wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fakehub import FakeHub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from tiny_runs import make_teacher_directory, without_package
from transformers import AutoModelForCausalLM, AutoTokenizer

import linearize
from linearize.config.record import make_record
from linearize.hub.repository import _operations, save_final

ROOT = Path(__file__).parents[2]
PROMPT = "the river ran past a small red house"

GREEDY = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
results = []
for source, trust in zip(sys.argv[1::2], map(json.loads, sys.argv[2::2])):
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=trust)
    inputs = AutoTokenizer.from_pretrained(source, trust_remote_code=trust)("PROMPT", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=24, max_length=None, do_sample=False)[0].tolist()
    results.append({"tokens": tokens, "module": type(model).__module__})
print("RESULT", json.dumps(results))
""".replace("PROMPT", PROMPT)

COMMANDS = """
import contextlib, io, json, os, sys, time
time.sleep = lambda seconds: None  # the client waits half a minute between its attempts to connect
from linearize.cli import main
results = []
for token, words in json.loads(sys.argv[1]):
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        code = main(words)
    results.append([code, stderr.getvalue()])
print("RESULT", json.dumps(results))
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    make_teacher_directory(root / "teacher")
    student = linearize.convert(str(root / "teacher"), {"type": "linear", "window": 4, "sinks": 1})
    torch.manual_seed(0)
    for attention in student.mixer_attentions():
        for parameter in attention.mixer.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    tokenizer = linearize.load_tokenizer(str(root / "teacher"))
    save_final(student, tokenizer, root / "final", make_record("someone/teacher", revision="abc"))
    return root


@pytest.fixture(scope="module")
def expected(inputs):
    model = AutoModelForCausalLM.from_pretrained(inputs / "final")
    tokens = AutoTokenizer.from_pretrained(inputs / "final")(PROMPT, return_tensors="pt")
    return model.generate(**tokens, max_new_tokens=24, max_length=None, do_sample=False)[0].tolist()


@pytest.fixture(scope="module")
def hub():
    with FakeHub() as hub:
        yield hub


def result_of(command, environment, cwd, timeout=120):
    """What a fresh process prints after RESULT."""
    run = subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert run.returncode == 0 and lines, run.stderr[-3000:]
    return json.loads(lines[-1].removeprefix("RESULT "))


def commands(words, environment, cwd):
    """Exit code and stderr of several [token, command line] in one fresh process, which has the package."""
    path = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    return result_of([sys.executable, "-c", COMMANDS, json.dumps(words)], {**environment, "PYTHONPATH": path}, cwd)


@pytest.mark.slow
def test_push_pull_and_every_way_to_load(inputs, hub, expected, tmp_path):
    final = str(inputs / "final")
    environment = hub.environment(tmp_path / "home")
    pushes = [["push", final, "tester/linear", "--private"], ["push", final, "tester/linear"]]
    outcome = commands([["hf_valid", words] for words in pushes], environment, tmp_path)
    assert [code for code, _ in outcome] == [0, 0], outcome
    files = hub.files("tester/linear")
    assert hub.repositories["tester/linear"].private
    assert {"config.json", "model.safetensors", "modeling_llama.py", "README.md", "linearize.json"} <= set(files)
    assert b'"tester/linear"' in files["README.md"] and b"base_model: someone/teacher" in files["README.md"]
    assert json.loads(files["config.json"])["auto_map"]

    alone = result_of([*without_package(GREEDY), final, "true", "tester/linear", "true"], environment, tmp_path)
    assert [loaded["tokens"] for loaded in alone] == [expected] * 2
    assert all(loaded["module"].startswith("transformers_modules") for loaded in alone)
    with_package = {**environment, "PYTHONPATH": str(ROOT)}
    code = "import linearize\n" + GREEDY
    beside = result_of([sys.executable, "-c", code, "tester/linear", "true", final, "false"], with_package, tmp_path)
    assert [loaded["tokens"] for loaded in beside] == [expected] * 2
    assert all(loaded["module"].startswith("linearize.modeling") for loaded in beside)


def test_a_push_deletes_what_would_be_loaded_in_place_and_nothing_else(inputs):
    theirs = [
        "model-00001-of-00002.safetensors", "model.safetensors.index.json", "adapter_config.json",
        "adapter_model.safetensors", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack", "consolidated.00.pth", "tokenizer.model",
        "vocab.json", "merges.txt", "special_tokens_map.json", "modules.json", "sentence_bert_config.json",
        "quantize_config.json", "preprocessor_config.json", "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
    ]  # fmt: skip
    apart = [
        ".gitattributes", "LICENSE", "notes.md", "handler.py", "plots/loss.png", "onnx/model.onnx",
        "small/model.safetensors", "small/adapter_config.json", "model.Q4_K_M.gguf",
    ]  # fmt: skip
    ours = ["README.md", "config.json", "tokenizer.json", "model.safetensors", "modeling_llama.py"]
    earlier = {"files": ["old_code.py", "config.json"]}
    operations = _operations(inputs / "final", "me/model", [*theirs, *apart, *ours, "old_code.py"], earlier)
    deleted = {each.path_in_repo for each in operations if isinstance(each, CommitOperationDelete)}
    assert deleted == {*theirs, "old_code.py"}
    assert set(ours) <= {each.path_in_repo for each in operations if isinstance(each, CommitOperationAdd)}


def card_of(directory):
    operations = _operations(directory, "me/model", [])
    (card,) = (each.path_or_fileobj for each in operations if each.path_in_repo == "README.md")
    return card.decode()


def test_the_card_is_rendered_with_the_name_of_the_repository(inputs, tmp_path):
    for name in ("final", "model"):  # as saved, and moved since
        shutil.copytree(inputs / "final", tmp_path / name)
        card = card_of(tmp_path / name)
        assert 'pipeline("text-generation", "me/model", trust_remote_code=True)' in card and '"final"' not in card
    path = tmp_path / "model" / "README.md"
    path.write_text(path.read_text().replace("## Quick start", "By hand.\n\n## Quick start"))
    edited = card_of(tmp_path / "model")
    assert "By hand." in edited and '"me/model", trust_remote_code=True' in edited and '"final"' not in edited
    path.unlink()
    assert '"me/model", trust_remote_code=True' in card_of(tmp_path / "model")


@pytest.mark.slow
def test_a_push_over_an_adapter_loads_as_the_pushed_model(inputs, hub, expected, tmp_path):
    base = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "someone/else"}).encode()
    theirs = {"adapter_config.json": base, "notes.md": b"mine", "old_code.py": b"", "vocab.json": b"{}"}
    hub.add("tester/over", theirs)
    environment = hub.environment(tmp_path / "home")
    push = ["hf_valid", ["push", str(inputs / "final"), "tester/over"]]
    assert [code for code, _ in commands([push], environment, tmp_path)] == [0]
    record = json.loads(hub.files("tester/over")["linearize.json"])
    assert record["teacher"] == "someone/teacher" and "modeling_llama.py" in record["files"]
    changed = {**hub.files("tester/over"), "attention_of_old.py": b""}
    record["files"].append("attention_of_old.py")
    changed["linearize.json"] = json.dumps(record).encode()
    hub.repositories["tester/over"].commit(changed, "as an older version left it")
    assert [code for code, _ in commands([push], environment, tmp_path)] == [0]
    files = hub.files("tester/over")
    assert {"notes.md", "old_code.py"} <= set(files) and files["notes.md"] == b"mine"
    assert not {"adapter_config.json", "vocab.json", "attention_of_old.py"} & set(files)
    (loaded,) = result_of([*without_package(GREEDY), "tester/over", "true"], environment, tmp_path)
    assert loaded["tokens"] == expected


@pytest.mark.slow
def test_what_goes_wrong_on_the_hub(inputs, hub, tmp_path):
    hub.add_directory("someone/gated", inputs / "teacher", gated=True)
    public = hub.add_directory("someone/public", inputs / "teacher")
    final, out = str(inputs / "final"), str(tmp_path / "out")
    run = ["run", "--output_dir", out, "--device", "cpu", "--data.dataset", "x.txt", "--transfer.max_steps", "1"]
    run += ["--finetune.max_steps", "1", "--model_name_or_path"]
    cases = [
        ("hf_valid", ["convert", "someone/missing", out], "someone/missing"),
        ("hf_valid", ["convert", "someone/gated", out], "gated"),
        (None, ["convert", "someone/gated", out], "gated"),
        (None, ["convert", "someone/missing", out], "someone/missing"),
        ("hf_wrong", ["convert", "someone/public", out], "refused the token"),
        ("hf_valid", ["convert", "no such name", out], "no such name"),
        ("hf_valid", ["convert", "someone/public", out, "--revision", "v7"], "revision"),
        ("hf_valid", [*run, "someone/gated"], "gated"),
        ("hf_wrong", [*run, "someone/public", "--push_to_hub", "a/b"], "refuses the token"),
        (None, [*run, "someone/public", "--push_to_hub", "a/b"], "without a token"),
        ("hf_valid", ["push", final, "other/linear"], "may not write"),
        ("hf_valid", ["push", final, "a/b/c"], "not a repository name"),
        ("hf_wrong", ["push", final, "tester/linear"], "refuses the token"),
        (None, ["push", final, "tester/linear"], "without a token"),
    ]
    words = [[token, command] for token, command, _ in cases]
    converted = [None, ["convert", "someone/public", str(tmp_path / "converted")]]
    *outcome, last = commands([*words, converted], hub.environment(tmp_path / "home"), tmp_path)
    check_sentences(outcome, [sign for *_, sign in cases], out)
    assert last[0] == 0, last
    record = json.loads((tmp_path / "converted" / "linearize.json").read_text())
    assert record["teacher"] == "someone/public" and record["teacher_on_hub"]
    assert record["teacher_revision"] == public.commits[-1][0]
    assert "base_model: someone/public" in (tmp_path / "converted" / "README.md").read_text()


@pytest.mark.slow
def test_no_network(inputs, tmp_path, hub):
    environment = {**hub.environment(tmp_path / "home"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    final, out = str(inputs / "final"), str(tmp_path / "out")
    words = [["hf_valid", words] for words in (["convert", "someone/new", out], ["push", final, "tester/linear"])]
    check_sentences(commands(words, environment, tmp_path), ["cannot be reached", "no connection"], out)


def check_sentences(outcome, signs, out):
    """Exit code 2 and one sentence each, nothing written."""
    assert len(outcome) == len(signs)
    for (code, stderr), sign in zip(outcome, signs, strict=True):
        sentences = [line for line in stderr.splitlines() if line.startswith("linearize: ")]
        assert code == 2 and len(sentences) == 1, stderr
        assert sign in sentences[0]
        assert "Traceback" not in stderr
    assert not Path(out).exists()
