"""Differences between a base and a model made from it: bit for bit back, and one sentence for everything else."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from fakehub import FakeHub
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import make_gpt2, make_teacher
from tiny_runs import make_teacher_directory
from transformers import AutoModelForCausalLM, AutoTokenizer

import linearize
from linearize import weight_diff
from linearize.cli import main
from linearize.errors import UserError
from linearize.hub import make_record, save_final
from linearize.tensor_files import CHUNK_BYTES, read_weights
from linearize.weight_diff import make_diff, recover

BYTES = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "int8": 1,
    "uint8": 1,
    "int64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "complex64": 8,
}


def bits(*shape, dtype="float32", seed=0):
    """Random bit patterns: NaN, infinities and subnormal numbers among them."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * BYTES[dtype]
    return (
        torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(getattr(torch, dtype)).view(shape)
    )


def base_tensors(dtype="float32"):
    return {
        "embed.weight": bits(11, 6, dtype=dtype),
        "layer.weight": bits(6, 7, dtype=dtype, seed=1),
        "layer.bias": bits(5, dtype=dtype, seed=2),
        "layer.frozen": bits(4, 3, dtype=dtype, seed=3),
        "scale": bits(dtype=dtype, seed=4),
        "nothing": bits(0, 3, dtype=dtype),
        "rotary.inv_freq": bits(4, seed=5),
    }


def converted_tensors(dtype="float32"):
    """Three tensors differ, two are equal, one has more rows, one another dtype, two are new, one is gone."""
    tensors = base_tensors(dtype)
    del tensors["rotary.inv_freq"]
    other = "float16" if dtype != "float16" else "float32"
    return tensors | {
        "embed.weight": bits(12, 6, dtype=dtype, seed=6),
        "layer.weight": bits(6, 7, dtype=dtype, seed=7),
        "layer.bias": bits(5, dtype=dtype, seed=8),
        "layer.mask": torch.tensor([True, False, True]),
        "layer.mixer.map": bits(3, 5, seed=9),
        "layer.frozen": bits(4, 3, dtype=other, seed=10),
        "scale": bits(dtype=dtype, seed=11),
    }


def write(path, tensors, shards=1, **files):
    """A repository of tensors, in one file or in several."""
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "toy"}')
    for name, text in files.items():
        (path / name).write_text(text)
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path
    places = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        save_file(part, path / name, metadata={"format": "pt", "shard": str(i)})
        places |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def contents(path):
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture
def made(tmp_path):
    """Paths of a base, a converted model and their difference."""
    write(tmp_path / "base", base_tensors())
    write(tmp_path / "converted", converted_tensors(), **{"vocab.txt": "words"})
    make_diff(tmp_path / "base", tmp_path / "converted", tmp_path / "diff")
    return tmp_path


def change_record(root, change):
    path = root / "diff" / "diff.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def refused(root, sentence, base="base", diff="diff"):
    """Recovering fails with a sentence, and leaves nothing."""
    before = sorted(path.name for path in root.iterdir())
    with pytest.raises(UserError, match=sentence) as caught:
        recover(root / base, root / diff, root / "out")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in root.iterdir()) == before


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
    summary = make_diff(tmp_path / "base", converted, tmp_path / "diff")
    assert summary.notes()[-1].endswith("pytorch_model.bin")
    recover(tmp_path / "base", tmp_path / "diff", tmp_path / "out")
    expected = contents(converted)
    del expected[".git/HEAD"], expected["pytorch_model.bin"]
    assert contents(tmp_path / "out") == expected


# --- a base that is not the one, a diff that is not whole


@pytest.mark.parametrize(
    "name, tensor",
    [
        ("layer.weight", bits(6, 7, seed=30)),
        ("layer.weight", bits(7, 6, seed=1)),
        ("nothing", bits(0, 3, dtype="float16")),
        ("scale", None),
    ],
)
def test_a_wrong_base_is_named_with_the_tensor(made, name, tensor):
    tensors = base_tensors() | {name: tensor}
    write(made / "other", {name: tensor for name, tensor in tensors.items() if tensor is not None})
    refused(made, f"other is not the base of this diff .{name} is missing or differs.: give base", base="other")


def test_an_equal_tensor_of_a_wrong_base_is_noticed(tmp_path):
    write(tmp_path / "base", base_tensors())
    write(tmp_path / "converted", base_tensors())
    make_diff(tmp_path / "base", tmp_path / "converted", tmp_path / "diff")
    write(tmp_path / "other", base_tensors() | {"scale": bits(seed=31)})
    refused(tmp_path, "scale is missing or differs", base="other")


def test_a_base_with_one_tensor_more_serves(made):
    write(made / "more", base_tensors() | {"head": bits(3)}, 2)
    recover(made / "more", made / "diff", made / "out")
    assert contents(made / "out") == contents(made / "converted")


@pytest.mark.parametrize("name", ["layer.weight", "layer.mixer.map", "embed.weight"])
def test_a_damaged_tensor_is_named(made, name):
    path = made / "diff" / "diff.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    tensors[name].view(torch.uint8).view(-1)[0] ^= 1
    save_file(tensors, path)
    refused(made, f"{name} of .*diff is damaged .its checksum differs.")


def test_a_diff_that_lacks_something(made):
    shutil.copytree(made / "diff", made / "whole")

    def fresh():
        shutil.rmtree(made / "diff")
        shutil.copytree(made / "whole", made / "diff")
        return made / "diff"

    (fresh() / "diff.safetensors").unlink()
    refused(made, "has no diff.safetensors")
    data = (fresh() / "diff.safetensors").read_bytes()
    (made / "diff" / "diff.safetensors").write_bytes(data[:-3])
    refused(made, "a weight file of .*diff is damaged")
    tensors = load_file(fresh() / "diff.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name != "scale"}, made / "diff/diff.safetensors")
    refused(made, "scale is missing")
    (fresh() / "files" / "vocab.txt").unlink()
    refused(made, "lacks files/vocab.txt")
    (fresh() / "files" / "vocab.txt").write_text("w0rds")
    refused(made, "files/vocab.txt of .* is damaged")
    (fresh() / "diff.json").unlink()
    refused(made, "has no diff.json")


def set_at(*keys, value):
    def change(record):
        for key in keys[:-1]:
            record = record[key]
        record[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "change, sentence",
    [
        (set_at("format", value="other"), "its format is 'other'"),
        (set_at("format_version", value=2), "format 2, and this linearize reads 1: update"),
        (set_at("format_version", value="one"), "unknown"),
        (set_at("encoding", value="sub"), "unknown"),
        (lambda record: record.pop("files"), "'files' is missing"),
        (lambda record: record["tensors"].pop("scale"), "other tensors"),
        (set_at("tensors", "scale", "kind", value="guess"), "the entry of scale"),
        (set_at("tensors", "scale", value={"kind": "equal", "sha256": "00"}), "the entry of scale"),
        (set_at("tensors", "nothing", "sha256", value="00"), "the entry of nothing"),
        (set_at("tensors", value=[]), "damaged"),
        (set_at("weights", 0, "file", value="../model.safetensors"), "'../model.safetensors'"),
        (set_at("files", "/etc/passwd", value={"size": 1, "sha256": "00"}), "'/etc/passwd'"),
        (set_at("files", "a/../../b", value={"size": 1, "sha256": "00"}), "names the file"),
        (set_at("files", "model.safetensors", value={"size": 1, "sha256": "00"}), "a file twice"),
        (set_at("weights", 0, "header", value="{}"), "the header of model.safetensors"),
        (set_at("base", value="base"), "damaged"),
    ],
)
def test_a_malformed_record_is_one_sentence(made, change, sentence):
    change_record(made, change)
    refused(made, sentence)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', "\x00"])
def test_a_record_that_is_no_record(made, text):
    (made / "diff" / "diff.json").write_text(text)
    refused(made, "diff.json of .*diff is damaged")


# --- what cannot be read, and what must not be replaced


def test_repositories_without_safetensors(made):
    pickled = made / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    for pair in (("pickled", "converted"), ("base", "pickled")):
        with pytest.raises(UserError, match="pickled has no model.safetensors .*save_pretrained"):
            make_diff(*(made / name for name in pair), made / "out")
    with pytest.raises(UserError, match="neither a directory here nor a Hub id"):
        make_diff(made / "nowhere", made / "converted", made / "out")
    with pytest.raises(UserError, match="is a file"):
        make_diff(made / "base" / "model.safetensors", made / "converted", made / "out")
    with pytest.raises(UserError, match="no diff.json: give what `linearize diff make` wrote"):
        recover(made / "base", made / "converted", made / "out")
    assert not (made / "out").exists()


def test_incomplete_and_damaged_weights(tmp_path):
    base, converted = write(tmp_path / "base", base_tensors(), 3), write(tmp_path / "converted", converted_tensors())
    (base / "model-00002-of-00003.safetensors").rename(tmp_path / "kept")
    with pytest.raises(UserError, match="lacks model-00002-of-00003.safetensors, which its model.safetensors.index"):
        make_diff(base, converted, tmp_path / "out")
    (base / "model-00002-of-00003.safetensors").write_bytes((tmp_path / "kept").read_bytes()[:40])
    with pytest.raises(UserError, match="a weight file of .*base is damaged"):
        make_diff(base, converted, tmp_path / "out")
    shutil.copy(base / "model-00001-of-00003.safetensors", base / "model-00002-of-00003.safetensors")
    with pytest.raises(UserError, match="in two files"):
        make_diff(base, converted, tmp_path / "out")
    (base / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="no index of safetensors files"):
        make_diff(base, converted, tmp_path / "out")
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a.safetensors"}}')
    with pytest.raises(UserError, match="restore the index"):
        make_diff(base, converted, tmp_path / "out")


def test_outputs_that_exist_or_overlap(made):
    (made / "out").mkdir()
    (made / "out" / "mine").write_text("mine")
    for call in (
        lambda **options: make_diff(made / "base", made / "converted", made / "out", **options),
        lambda **options: recover(made / "base", made / "diff", made / "out", **options),
    ):
        with pytest.raises(UserError, match="exists already: replace it with --overwrite"):
            call()
        call(overwrite=True)
        assert not (made / "out" / "mine").exists()
    for out in (made / "converted", made / "converted" / "diff", made):
        with pytest.raises(UserError, match="overlaps with"):
            make_diff(made / "base", made / "converted", out, overwrite=True)
    with pytest.raises(UserError, match="overlaps with"):
        recover(made / "base", made / "diff", made / "diff", overwrite=True)


@pytest.mark.parametrize("size", ["5 elephants", "0", 0, "-1GB", ""])
def test_sizes_that_are_none(made, size):
    with pytest.raises(UserError, match="max_shard_size is"):
        make_diff(made / "base", made / "converted", made / "out", max_shard_size=size)


def test_a_full_disk_leaves_what_was_there(made, monkeypatch):
    recover(made / "base", made / "diff", made / "out")
    before = contents(made)

    def full(path, header, pieces):
        path.write_bytes(header.encode())
        next(iter(pieces))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weight_diff, "write_weights", full)
    with pytest.raises(UserError, match="no space left on the disk"):
        recover(made / "base", made / "diff", made / "out", overwrite=True)
    with pytest.raises(UserError, match="no space left on the disk"):
        make_diff(made / "base", made / "converted", made / "new")
    assert contents(made) == before


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


def test_a_failing_command_says_one_sentence_and_leaves_nothing(made, capsys):
    write(made / "other", base_tensors() | {"layer.weight": bits(6, 7, seed=40)})
    before = sorted(path.name for path in made.iterdir())
    capsys.readouterr()
    for words in (
        ["recover", str(made / "other"), str(made / "diff"), str(made / "out")],
        ["recover", str(made / "base"), str(made / "base"), str(made / "out")],
        ["make", str(made / "base"), str(made / "nowhere"), str(made / "out")],
        ["make", str(made / "base"), str(made / "converted"), str(made / "diff")],
        ["make", str(made / "base"), str(made / "converted"), str(made / "out"), "--max_shard_size", "much"],
    ):
        assert main(["diff", *words]) == 2
        shown = capsys.readouterr().err.strip().splitlines()
        assert [line for line in shown if line.startswith("linearize: ")] == shown[-1:] and "Traceback" not in shown
        assert sorted(path.name for path in made.iterdir()) == before


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
        assert 'base_model: "someone/base"' in (tmp_path / "diff" / "README.md").read_text()

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
