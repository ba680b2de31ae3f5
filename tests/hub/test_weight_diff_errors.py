"""Weight differences of a wrong base, a damaged diff, unreadable repositories: one sentence, nothing half-written."""

import errno
import json
import shutil

import pytest
import torch
from diff_toys import base_tensors, bits, contents, converted_tensors, made_diff, write
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from linearize.cli import main
from linearize.errors import UserError
from linearize.hub.diff import difference as weight_diff
from linearize.hub.diff.difference import make_diff, recover


@pytest.fixture
def made(tmp_path):
    """Paths of a base, a converted model and their difference."""
    return made_diff(tmp_path)


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
