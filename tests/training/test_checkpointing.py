"""Checkpoints are whole or absent; logs survive a resume."""

import errno
import json
import os

import pytest
import torch
from safetensors import SafetensorError

from linearize.errors import UserError
from linearize.files import atomic_directory, readable_write_errors, write_file
from linearize.stages.identity import require_same_run
from linearize.training import checkpointing
from linearize.training.checkpointing import (
    checkpoint_to_resume,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    step_directories,
)
from linearize.training.log import TrainingDiverged, TrainingLog, check_finite, plot_transfer, read_log, tracker_names


def save(root, step, value=0.0, **options):
    tensors = {"mixers": {"a.weight": torch.full((3, 2), value), "b": torch.arange(4.0).view(2, 2).T}}
    optimizer = {"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return save_checkpoint(root, step, tensors=tensors, optimizer=optimizer, state={"run": {"seed": 1}}, **options)


def full_disk(monkeypatch, after_files):
    """Makes the write fail as a full disk does, after so many files."""
    written = []
    write = checkpointing.write_bytes

    def failing(path, data):
        if len(written) >= after_files:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        write(path, data)

    monkeypatch.setattr(checkpointing, "write_bytes", failing)


def test_round_trip(tmp_path):
    path = save(tmp_path, 7, value=2.0)
    assert sorted(file.name for file in path.iterdir()) == ["mixers.safetensors", "optimizer.pt", "state.json"]
    loaded = load_checkpoint(path)
    assert loaded.step == 7 and loaded.state["run"] == {"seed": 1}
    assert torch.equal(loaded.tensors["mixers"]["a.weight"], torch.full((3, 2), 2.0))
    assert torch.equal(loaded.tensors["mixers"]["b"], torch.arange(4.0).view(2, 2).T)
    assert loaded.optimizer["state"][0]["step"] == 2


def test_retention_counts_by_number(tmp_path):
    for step in (8, 9, 10, 11):
        save(tmp_path, step, limit=2)
    assert [path.name for path in step_directories(tmp_path)] == ["step-10", "step-11"]
    assert latest_checkpoint(tmp_path).name == "step-11"
    assert latest_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("after_files", [0, 1, 2])
def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch, after_files):
    save(tmp_path, 1, value=1.0, limit=1)
    full_disk(monkeypatch, after_files)
    with pytest.raises(UserError, match=r"no space left on the disk while writing .*step-2: nothing half-written"):
        save(tmp_path, 2, value=2.0, limit=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert torch.equal(load_checkpoint(tmp_path / "step-1").tensors["mixers"]["a.weight"], torch.full((3, 2), 1.0))


def test_full_disk_while_replacing_the_same_step(tmp_path, monkeypatch):
    save(tmp_path, 1, value=1.0)
    full_disk(monkeypatch, 1)
    with pytest.raises(UserError, match="no space left"):
        save(tmp_path, 1, value=2.0)
    assert torch.equal(load_checkpoint(tmp_path / "step-1").tensors["mixers"]["a.weight"], torch.full((3, 2), 1.0))


def test_same_step_is_replaced_and_leftovers_of_a_kill_go(tmp_path):
    save(tmp_path, 1, value=1.0)
    leftover = tmp_path / ".step-2.tmp-4711"
    leftover.mkdir()
    save(tmp_path, 1, value=3.0, limit=2)
    assert torch.equal(load_checkpoint(tmp_path / "step-1").tensors["mixers"]["a.weight"], torch.full((3, 2), 3.0))
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_atomic_directory_and_file_leave_the_old_on_any_error(tmp_path):
    target = tmp_path / "final"
    with atomic_directory(target) as directory:
        (directory / "a").write_text("old")
    with pytest.raises(RuntimeError), atomic_directory(target) as directory:
        (directory / "a").write_text("new")
        raise RuntimeError
    assert (target / "a").read_text() == "old"
    write_file(tmp_path / "deep" / "file", b"1")
    write_file(tmp_path / "deep" / "file", b"2")
    assert (tmp_path / "deep" / "file").read_bytes() == b"2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "final"]


def test_system_errors_become_sentences(tmp_path):
    with pytest.raises(UserError, match="no space left"), readable_write_errors("x"):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    with pytest.raises(UserError, match="cannot write .*file/below"):
        (tmp_path / "file").write_text("")
        write_file(tmp_path / "file" / "below" / "it", b"1")
    with pytest.raises(FileNotFoundError), readable_write_errors("x"):
        raise FileNotFoundError(errno.ENOENT, "not about writing")


def test_what_to_resume(tmp_path):
    assert checkpoint_to_resume(tmp_path, True) is None
    assert checkpoint_to_resume(tmp_path, False) is None
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert checkpoint_to_resume(tmp_path, True).step == 2
    assert checkpoint_to_resume(tmp_path, tmp_path / "step-1").step == 1
    assert checkpoint_to_resume("elsewhere", str(tmp_path)).step == 2
    with pytest.raises(UserError, match=r"already holds checkpoints \(up to step-2\): resume"):
        checkpoint_to_resume(tmp_path, False)
    with pytest.raises(UserError, match="is not a checkpoint"):
        checkpoint_to_resume(tmp_path, tmp_path / "step-3")


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": lambda path: (path / "mixers.safetensors").write_bytes(
        (path / "mixers.safetensors").read_bytes()[:-9]
    ),
    "a flipped bit of a tensor": lambda path: flip(path / "mixers.safetensors"),
    "a flipped bit of the optimizer": lambda path: flip(path / "optimizer.pt"),
    "no optimizer": lambda path: (path / "optimizer.pt").unlink(),
    "no tensors": lambda path: (path / "mixers.safetensors").unlink(),
    "no state": lambda path: (path / "state.json").unlink(),
    "empty state": lambda path: (path / "state.json").write_text(""),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, caplog, damage):
    save(tmp_path, 1, value=1.0)
    save(tmp_path, 2, value=2.0)
    damage(tmp_path / "step-2")
    with pytest.raises(UserError, match=r"step-2 is damaged .*delete it"):
        load_checkpoint(tmp_path / "step-2")
    checkpoint = checkpoint_to_resume(tmp_path, True)
    assert checkpoint.step == 1 and (checkpoint.tensors["mixers"]["a.weight"] == 1.0).all()
    assert len(caplog.messages) == 1 and "step-2 is damaged" in caplog.text and "going on from step-1" in caplog.text
    save(tmp_path, 3, limit=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


def test_no_whole_checkpoint_is_said(tmp_path):
    save(tmp_path, 1)
    DAMAGES["truncated"](tmp_path / "step-1")
    with pytest.raises(UserError, match="step-1 is damaged .* and there is no whole one before it: delete"):
        checkpoint_to_resume(tmp_path, True)


def test_what_another_future_left_goes(tmp_path):
    """Else the next resume would take it for the newest."""
    for step in (1, 2, 3):
        save(tmp_path, step, value=float(step))
    assert checkpoint_to_resume(tmp_path, tmp_path / "step-1").step == 1
    save(tmp_path, 2, value=7.0)
    checkpoint = checkpoint_to_resume(tmp_path, True)
    assert checkpoint.step == 2 and (checkpoint.tensors["mixers"]["a.weight"] == 7.0).all()


def test_what_is_renamed_is_on_the_disk(tmp_path, monkeypatch):
    events, flush, move = [], os.fsync, os.replace

    def flushed(handle):
        events.append(os.fstat(handle).st_ino)
        flush(handle)

    def moved(source, target):
        events.append("moved")
        move(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", moved)
    with atomic_directory(tmp_path / "final") as partial:
        (partial / "below").mkdir()
        (partial / "below" / "file").write_bytes(b"1")
    written = {(tmp_path / "final" / name).stat().st_ino for name in (".", "below", "below/file")}
    assert written <= set(events[: events.index("moved")])
    assert tmp_path.stat().st_ino in events[events.index("moved") :]
    events.clear()
    write_file(tmp_path / "file", b"1")
    assert events == [(tmp_path / "file").stat().st_ino, "moved", tmp_path.stat().st_ino]


def test_other_run_is_refused(tmp_path):
    checkpoint = load_checkpoint(save(tmp_path, 1))
    require_same_run(checkpoint, {"seed": 1}, steps=1)
    with pytest.raises(UserError, match="1 steps are done, and the settings ask for 0 in all"):
        require_same_run(checkpoint, {"seed": 1}, steps=0)
    with pytest.raises(UserError, match=r"cannot resume from .*trained with seed 1 \(now 2\)"):
        require_same_run(checkpoint, {"seed": 2})


def test_log_of_a_resumed_run_has_no_step_twice(tmp_path):
    path = tmp_path / "logs" / "x.jsonl"
    log = TrainingLog(path)
    for step in (1, 2, 3):
        log.write({"step": step})
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')
    assert [record["step"] for record in read_log(path)] == [1, 2, 3]
    TrainingLog(path, after_step=2).write({"step": 3, "loss": 1.0})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "loss": 1.0},
    ]
    TrainingLog(path)
    assert read_log(path) == []


def test_not_finite_is_named():
    check_finite("x", 1, {"a": 1.0}, "lower it")
    with pytest.raises(TrainingDiverged, match=r"finetuning stopped: b is nan at step 3 \(and 1 more\); lower it"):
        check_finite("finetuning", 3, {"a": 1.0, "b": float("nan"), "c": float("inf")}, "lower it")


def test_trackers_are_checked():
    assert tracker_names("none") == [] and tracker_names(["none"]) == []
    with pytest.raises(UserError, match="unknown tracker 'wand'; known are none"):
        tracker_names(["wand"])


def test_plots(tmp_path):
    records = [
        {
            "step": 1,
            "mixed_loss": 1.0,
            "linear_loss": 2.0,
            "mixed_layer_losses": [1.0, 1.0],
            "linear_layer_losses": [2.0, 2.0],
        },
        {"step": 2, "linear_loss": 1.0, "linear_layer_losses": [1.0, 1.0], "validation_linear_loss": 1.1},
    ]
    plot_transfer(records, [0, 3], tmp_path / "plots" / "a.png")
    plot_transfer(records[:1], [0, 3], tmp_path / "plots" / "b.png")
    plot_transfer([], [], tmp_path / "plots" / "c.png")
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["a.png", "b.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "plots").iterdir())
