"""The demo's script from end to end, on a tiny model: every row, the files, and the load in a fresh process."""

import importlib.util
import json
from pathlib import Path

import pytest
from tiny_runs import make_teacher_directory, write_text

from linearize.evaluation.by_length import HELD_OUT, MATCHED
from linearize.evaluation.report import Report

DEMO = Path(__file__).parents[2] / "scripts" / "demo.py"


@pytest.mark.slow
def test_demo_runs_through_and_again(tmp_path, capsys):
    specification = importlib.util.spec_from_file_location("demo", DEMO)
    demo = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(demo)
    teacher = make_teacher_directory(tmp_path / "teacher", max_position_embeddings=2048)
    train, held_out = (write_text(tmp_path / f"{seed}.jsonl", 40 * (seed + 1), seed) for seed in (0, 1))
    arguments = ["--model_name_or_path", str(teacher), "--train_text", str(train), "--validation_text", str(held_out)]
    arguments += [
        "--output_dir",
        str(tmp_path / "out"),
        "--json",
        str(tmp_path / "demo.json"),
        "--prompt",
        "the river",
    ]
    arguments += ["--transfer_steps", "2", "--finetune_steps", "2", "--evaluation_blocks", "2"]
    report = demo.main(arguments)
    assert [row.name for row in report.rows] == [
        "teacher",
        "control: softmax window 64 + 4 sinks, no training",
        "student after conversion",
        "linear arm after conversion",
        "student after stage 1",
        "linear arm after stage 1",
        "teacher + the same LoRA steps",
        "student after stage 2",
        "linear arm after stage 2",
        "softmax arm after stage 2",
    ]
    assert {row.tokens for row in report.rows} == {2 * 511}
    assert report.share is not None and len(report.state) == 3 and report.seconds["everything"] > 0
    found = report.by_length
    yardstick = "teacher + the same LoRA steps"
    branches = ["student, softmax arm alone", "student, linear arm alone"]
    assert found.trained == 512 and found.names() == [yardstick, f"{yardstick}, {MATCHED}", "student", *branches]
    assert found.figure(HELD_OUT, "student", 4) and found.figure(HELD_OUT, yardstick, 4)
    assert any(note.startswith("at 4 times the trained length, 2048 tokens, it stands at") for note in report.notes)
    assert Report.from_json((tmp_path / "demo.json").read_text()) == report
    assert any("the same tokens" in note for note in report.notes)
    shown = capsys.readouterr().out
    assert "AutoModelForCausalLM.from_pretrained(" in shown and "smaller by" in shown
    record = json.loads((tmp_path / "out" / "final" / "linearize.json").read_text())
    assert record["tokens"] == {"attention transfer": 1024, "finetuning": 1024}
    again = demo.main(arguments)
    assert [row.nll for row in again.rows] == pytest.approx([row.nll for row in report.rows], abs=1e-5)
