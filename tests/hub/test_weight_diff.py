"""Differences between a base and a model made from it: bit for bit back, in constant memory, also over the Hub."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from diff_toys import BYTES, base_tensors, bits, contents, converted_tensors, made_diff, write
from fakehub import FakeHub
from safetensors.torch import load_file, save_file
from tiny_models import make_gpt2, make_teacher
from tiny_runs import make_teacher_directory
from transformers import AutoModelForCausalLM, AutoTokenizer

import linearize
from linearize.cli import main
from linearize.config.record import make_record
from linearize.conversion.tensor_files import CHUNK_BYTES, read_weights
from linearize.hub.diff.difference import make_diff, recover
from linearize.hub.repository import save_final


@pytest.fixture
def made(tmp_path):
    """Paths of a base, a converted model and their difference."""
    return made_diff(tmp_path)


# --- round trips


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("shards", [(1, 1), (3, 1), (1, 3), (2, 4)])
def test_every_dtype_and_layout_comes_back_byte_for_byte(tmp_path, dtype, shards):
    write(tmp_path / "base", base_tensors(dtype), shards[0])
    write(tmp_path / "converted", converted_tensors(dtype), shards[1], **{"vocab.txt": "words"})
    made = make_diff(tmp_path / "base", tmp_path / "converted", tmp_path / "diff")
    found = recover(tmp_path / "base", tmp_path / "diff", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "converted")
    assert made.sentence() == found.sentence() and "8 tensors: 1 equal, 3 differ, 2 new, 2 of" in made.sentence()


def test_what_is_stored(made):
    record = json.loads((made / "diff" / "diff.json").read_text())
    assert {name: entry["kind"] for name, entry in record["tensors"].items()} == {
        "embed.weight": "other_form",
        "layer.frozen": "other_form",
        "layer.weight": "differs",
        "layer.bias": "differs",
        "scale": "differs",
        "layer.mask": "new",
        "layer.mixer.map": "new",
        "nothing": "equal",
    }
    assert record["base_only"] == ["rotary.inv_freq"]
    assert (record["format_version"], record["linearize_version"]) == (1, linearize.__version__)
    assert record["base"] == {"name": "base", "on_hub": False, "revision": None}
    stored = load_file(made / "diff" / "diff.safetensors")
    assert "nothing" not in stored and stored["layer.weight"].dtype == torch.uint32
    old, new = base_tensors()["layer.weight"], converted_tensors()["layer.weight"]
    assert torch.equal(stored["layer.weight"].view(torch.int32), old.view(torch.int32) ^ new.view(torch.int32))
    assert str(made) not in (made / "diff" / "diff.json").read_text() + (made / "diff" / "README.md").read_text()


def test_equal_models_store_no_tensor(tmp_path):
    for name in ("base", "converted"):
        write(tmp_path / name, base_tensors(), 1 if name == "base" else 2)
    summary = make_diff(tmp_path / "base", tmp_path / "converted", tmp_path / "diff")
    assert summary.stored_bytes == 0 and load_file(tmp_path / "diff" / "diff.safetensors") == {}
    recover(tmp_path / "base", tmp_path / "diff", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "converted")


def test_the_files_of_a_diff_have_a_bounded_size(tmp_path):
    write(tmp_path / "base", {f"t{i}": bits(10, 10, seed=i) for i in range(9)} | {"half": bits(3, dtype="float16")})
    new = {f"t{i}": bits(10, 10, seed=100 + i) for i in range(9)} | {"half": bits(3, dtype="float16", seed=1)}
    write(tmp_path / "converted", new | {"large": bits(50, 50)})
    make_diff(tmp_path / "base", tmp_path / "converted", tmp_path / "diff", max_shard_size="1KB")
    index = json.loads((tmp_path / "diff" / "diff.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {*new, "large"} and index["metadata"]["total_size"] == 9 * 400 + 6 + 10_000
    sizes = []
    for name in set(index["weight_map"].values()):
        tensors = load_file(tmp_path / "diff" / name)
        assert all(index["weight_map"][tensor] == name for tensor in tensors)
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        assert sizes[-1] <= 1000 or list(tensors) == ["large"]
    assert 5 <= len(sizes) <= 7
    recover(tmp_path / "base", tmp_path / "diff", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "converted")


def test_tensors_lie_at_multiples_of_their_width(tmp_path):
    write(tmp_path / "base", {"odd": bits(3, dtype="int8"), "wide": bits(2, dtype="float64")}, 2)
    write(tmp_path / "converted", {"odd": bits(3, dtype="int8", seed=1), "wide": bits(2, dtype="float64", seed=1)}, 2)
    make_diff(tmp_path / "base", tmp_path / "converted", tmp_path / "diff")
    places = {
        tensor.name: tensor.offset for tensor in read_weights(tmp_path / "diff", "diff", "diff").files[0].tensors
    }
    assert places["wide"] % 8 == 0 and places["odd"] == places["wide"] + 16


def test_memory_does_not_grow_with_the_model(tmp_path, made):
    mebibyte = 2**18  # elements
    old = {f"t{i}": bits(mebibyte, seed=i) for i in range(20)} | {"large": bits(32 * mebibyte, seed=50)}
    new = {name: tensor.clone() for name, tensor in old.items()}
    for tensor in new.values():
        tensor[::1000] = 1.5
    write(tmp_path / "large_base", old, 2)
    write(tmp_path / "large", new | {"more": bits(8 * mebibyte)})
    del old, new, tensor
    for call in (
        lambda: make_diff(tmp_path / "large_base", tmp_path / "large", tmp_path / "large_diff"),
        lambda: recover(tmp_path / "large_base", tmp_path / "large_diff", tmp_path / "out"),
    ):
        tracemalloc.start()
        call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert 2 * CHUNK_BYTES <= peak < 3 * CHUNK_BYTES  # of 60 MiB of weights and a tensor of 32 MiB
    assert contents(tmp_path / "out") == contents(tmp_path / "large")


@pytest.mark.parametrize("make, tied", [(make_teacher, False), (make_teacher, True), (make_gpt2, True)])
def test_a_recovered_model_gives_the_same_logits(tmp_path, make, tied):
    sizes = {"n_embd": 32} if make is make_gpt2 else {}
    teacher = make_teacher_directory(tmp_path / "teacher", make=make, chat=True, tie_word_embeddings=tied, **sizes)
    student = linearize.convert(teacher, {"type": "linear", "window": 4} if not sizes else {"type": "gain_cell"})
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".mixer." in name or "down_proj" in name or "c_proj" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    (tmp_path / "run").mkdir()
    save_final(student, linearize.load_tokenizer(teacher), tmp_path / "run" / "final", make_record("someone/teacher"))
    summary = make_diff(teacher, tmp_path / "run", tmp_path / "diff")
    assert all(".mixer." in name for name in summary.record.of_kind("new")) and summary.record.of_kind("equal")
    assert summary.stored_bytes < summary.converted_bytes
    recover(teacher, tmp_path / "diff", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "run" / "final")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"README.md", "linearize.json", "tokenizer.json", "chat_template.jinja", "configuration.py"} <= names
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("the river ran past a house", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(loaded(**ids).logits, student(**ids).logits)


def test_tying_may_change(tmp_path):
    tied = make_teacher(tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    make_teacher(tie_word_embeddings=False).save_pretrained(tmp_path / "untied")
    for base, converted, kind in (("tied", "untied", "new"), ("untied", "tied", None)):
        summary = make_diff(tmp_path / base, tmp_path / converted, tmp_path / f"diff_{base}")
        assert ("lm_head.weight" in summary.record.base_only) == (kind is None)
        assert ("lm_head.weight" in summary.record.of_kind("new")) == (kind == "new")
        recover(tmp_path / base, tmp_path / f"diff_{base}", tmp_path / f"out_{base}")
        assert contents(tmp_path / f"out_{base}") == contents(tmp_path / converted)


def test_folders_come_along_and_other_weights_do_not(tmp_path):
    write(tmp_path / "base", base_tensors())
    converted = write(tmp_path / "converted", converted_tensors())
    (converted / "extra" / "deep").mkdir(parents=True)
    (converted / ".git").mkdir()
    (converted / "extra" / "deep" / "notes.txt").write_bytes(bytes(range(256)))
    save_file({"x": bits(3)}, converted / "statistics.safetensors")
    (converted / ".git" / "HEAD").write_text("main")
    (converted / "pytorch_model.bin").write_text("weights again")
    (converted / "nowhere.txt").symlink_to("gone.txt")
    summary = make_diff(tmp_path / "base", converted, tmp_path / "diff")
    assert summary.notes()[-1].endswith("pytorch_model.bin")
    recover(tmp_path / "base", tmp_path / "diff", tmp_path / "out")
    expected = contents(converted)
    del expected[".git/HEAD"], expected["pytorch_model.bin"]
    assert contents(tmp_path / "out") == expected


# --- the command line


def test_the_commands(tmp_path, capsys):
    for words in (["diff", "--help"], ["diff", "make", "--help"], ["diff", "recover", "--help"]):
        assert main(words) == 0
    write(tmp_path / "base", base_tensors(), 2)
    write(tmp_path / "converted", converted_tensors())
    base, converted, diff, out = (str(tmp_path / name) for name in ("base", "converted", "diff", "out"))
    assert main(["diff", "make", base, converted, diff, "--max_shard_size", "200"]) == 0
    shown = capsys.readouterr().out
    assert "8 tensors: 1 equal, 3 differ, 2 new, 2 of another shape or dtype; 1 other files; base" in shown
    assert "Only in the base: rotary.inv_freq" in shown
    assert "Stored whole, for the base has another shape or dtype: " in shown and "embed.weight" in shown
    assert main(["diff", "recover", base, diff, out]) == 0
    assert "1 equal, 3 differ" in capsys.readouterr().out
    assert contents(tmp_path / "out") == contents(tmp_path / "converted")
    assert main(["diff", "recover", base, diff, out]) == 2
    assert main(["diff", "recover", base, diff, out, "--overwrite"]) == 0


# --- the Hub

COMMANDS = """
import json, sys
from linearize.cli import main
for words in json.loads(sys.argv[1]):
    print("CODE", main(["diff", *words]), flush=True)
"""


def commands(hub, home, *lines, token="hf_valid"):
    """Exit codes and stderr of `linearize diff ...` lines in a fresh process that talks to this Hub."""
    environment = hub.environment(home, token) | {"PYTHONPATH": str(Path(__file__).parents[2])}
    words = [[str(word) for word in line] for line in lines]
    command = [sys.executable, "-c", COMMANDS, json.dumps(words)]
    done = subprocess.run(command, env=environment, cwd=home.parent, capture_output=True, text=True, timeout=120)
    return [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("CODE ")], done.stderr


def uploaded(path):
    """The files of a directory as a repository's."""
    return {name.replace(os.sep, "/"): data for name, data in contents(path).items()}


@pytest.mark.slow
def test_all_three_on_the_hub(tmp_path):
    write(tmp_path / "base", base_tensors(), 2)
    write(tmp_path / "converted", converted_tensors(), 3, **{"vocab.txt": "words"})
    home = tmp_path / "home"
    with FakeHub() as hub:
        copies = {"model.bin": b"again", "consolidated.safetensors": b"again", "pytorch_model.bin": b"again"}
        base = hub.add("someone/base", uploaded(tmp_path / "base") | copies)
        hub.add("tester/converted", uploaded(tmp_path / "converted") | {"training_args.bin": b"pickle"})
        made = ("make", "someone/base", "tester/converted", tmp_path / "diff")
        assert commands(hub, home, made)[0] == [0]
        assert not [request for request in hub.requests if "consolidated" in request or ".bin" in request]
        origin = json.loads((tmp_path / "diff" / "diff.json").read_text())["base"]
        assert origin == {"name": "someone/base", "on_hub": True, "revision": base.commits[0][0]}
        assert "base_model: someone/base" in (tmp_path / "diff" / "README.md").read_text()

        hub.add("tester/diff", uploaded(tmp_path / "diff"))
        base.commit(uploaded(write(tmp_path / "later", base_tensors("float16"))), "another type")
        codes, stderr = commands(
            hub,
            home,
            ("recover", "someone/base", "tester/diff", tmp_path / "out"),
            ("recover", "someone/base", "tester/diff", tmp_path / "wrong", "--revision", "main"),
            ("recover", "someone/base", "tester/none", tmp_path / "wrong"),
            ("make", "someone/base", "tester/converted", tmp_path / "wrong", "--revision", "0" * 40),
        )
        hub.add("tester/gated", {"config.json": b"{}"}, gated=True)
        new = [("make", "someone/base", f"tester/{name}", tmp_path / "wrong") for name in ("none", "gated")]
        anonymous = commands(hub, home, *new, token=None)
        refused = commands(hub, home, *new[:1], token="hf_wrong")
    assert codes == [0, 2, 2, 2], stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "converted") and not (tmp_path / "wrong").exists()
    said = [line for line in stderr.splitlines() if line.startswith("linearize: ")]
    assert f"give someone/base at commit {base.commits[0][0]}" in said[0]
    assert "no Hub repository tester/none" in said[1] and "no such revision" in said[2]
    assert anonymous[0] == [2, 2] and refused[0] == [2] and "refused the token" in refused[1], refused
    assert "no Hub repository tester/none" in anonymous[1] and "tester/gated is a gated" in anonymous[1], anonymous
