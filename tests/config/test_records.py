"""What a repository says of itself: the record of any source is found, goes on over stages, and labels rows."""

import json
import sys

import pytest
from fakehub import FakeHub
from test_hub import ROOT, result_of
from tiny_runs import make_teacher_directory, tiny_config, write_text

import linearize
from linearize import UserError
from linearize.cli import main
from linearize.config.record import base_is_teacher, make_record, read_record
from linearize.evaluation import Report
from linearize.hub.repository import save_final

SMALL = ["--sequence_length", "32", "--max_tokens", "64", "--device", "cpu"]
OWN, TEACHER, CONTROL = "its weights with softmax attention", "teacher", "no training"

ON_THE_HUB = """
import contextlib, io, json, sys
import linearize
from linearize import UserError
from linearize.cli import main
from linearize.config.record import read_record
first, text, settings, out = sys.argv[1:]
output = {}
for name in ("tester/tuned", "tester/converted"):
    assert main(["evaluate", name, "--text", text, "--output", f"{out}/{name}", *SMALL]) == 0
    with open(f"{out}/{name}/evaluation.json") as file:
        report = json.load(file)
    output[name] = [report["reference"], report["control"]]
output["main"] = read_record("tester/tuned")["tokens"]
output["first"] = read_record("tester/tuned", revision=first)["tokens"]
output["stock"] = read_record("tester/stock")
try:
    read_record("tester/missing")
except UserError as error:
    output["missing"] = str(error)
for name, revision in (("of main", None), ("of the first", first)):
    run = {**json.loads(settings), "output_dir": f"{out}/{name}", "revision": revision}
    output[name] = linearize.run(run).record
training = {"kind": "train", "weights": "all", "max_steps": 1, "batch_size": 1, "tokens_per_step": 32}
output["more"] = linearize.run({
    "model_name_or_path": "tester/tuned", "output_dir": f"{out}/more", "device": "cpu", "data": run["data"],
    "stages": {"training": training}, "evaluation": None,
}).final.joinpath("linearize.json").read_text()
print("RESULT", json.dumps(output))
""".replace("SMALL", repr(SMALL))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("records")
    make_teacher_directory(root / "teacher")
    write_text(root / "text.jsonl")
    write_text(root / "other.jsonl", seed=1)
    return root


def converted(inputs, path, **values):
    """A converted repository with the record of `values`."""
    settings = {"type": "linear", "window": 4, "sinks": 1}
    student = linearize.convert(str(inputs / "teacher"), settings)
    record = make_record("someone/teacher", revision="abc", recipe={"attention": settings}, **values)
    return save_final(student, linearize.load_tokenizer(inputs / "teacher"), path, record)


def reference(source, inputs, tmp_path):
    """The names of the reference and the control that `evaluate` measures."""
    words = ["evaluate", str(source), "--text", str(inputs / "other.jsonl"), "--output", str(tmp_path), *SMALL]
    assert main(words) == 0
    report = json.loads((tmp_path / "evaluation.json").read_text())
    return report["reference"], report["control"]


@pytest.mark.slow
def test_the_record_of_a_hub_id(inputs, tmp_path):
    final = converted(inputs, tmp_path / "tuned", tokens={"transfer": 100, "finetune": 50})
    plain = converted(inputs, tmp_path / "plain")
    settings = tiny_config("tester/tuned", inputs / "text.jsonl", "", inputs / "cache")
    settings["attention"], settings["stages"]["finetune"] = {}, None
    with FakeHub() as hub:
        hub.add_directory("tester/stock", inputs / "teacher")
        hub.add_directory("tester/converted", plain)
        repository = hub.add_directory("tester/tuned", plain)
        first = repository.commits[-1][0]
        files = {path.name: path.read_bytes() for path in final.iterdir() if path.is_file()}
        repository.commit(files, "finetuned")
        environment = hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
        arguments = [first, str(inputs / "other.jsonl"), json.dumps(settings), str(tmp_path / "out")]
        found = result_of([sys.executable, "-c", ON_THE_HUB, *arguments], environment, tmp_path, timeout=400)
    assert found["tester/tuned"] == [OWN, None]
    assert found["tester/converted"][0] == TEACHER and CONTROL in found["tester/converted"][1]
    assert found["main"] == {"transfer": 100, "finetune": 50} and found["first"] == {} and found["stock"] == {}
    assert "tester/missing" in found["missing"]
    for name, tokens in (("of main", {"transfer": 292, "finetune": 50}), ("of the first", {"transfer": 192})):
        record = found[name]
        assert record["teacher"] == "someone/teacher" and record["teacher_revision"] == "abc", name
        assert record["teacher_on_hub"] and record["tokens"] == tokens, name
        assert (
            record["recipe"]["attention"]["window"] == 4 and record["recipe"]["stages"]["transfer"]["max_steps"] == 3
        ), name
        assert record["evaluation"]["reference"] == (OWN if "finetune" in tokens else TEACHER)
    more = json.loads(found["more"])
    assert more["teacher"] == "someone/teacher"
    assert more["tokens"] == {"transfer": 100, "finetune": 50, "training": 32}
    assert more["trained"] == {"training": "all"} and not base_is_teacher(more)


def test_the_record_of_directories_and_runs(inputs, tmp_path):
    final = converted(inputs, tmp_path / "run" / "final", tokens={"finetune": 50})
    assert read_record(final) == read_record(tmp_path / "run") == read_record(str(final))
    assert read_record(inputs / "teacher") == {} == read_record(inputs / "text.jsonl")
    (final / "linearize.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        read_record(final)


@pytest.mark.parametrize(
    ("values", "teacher"),
    [
        ({"tokens": {"transfer": 9, "scalers": 3}}, True),
        ({"tokens": {"transfer": 9, "all weights": 3}}, False),
        ({"tokens": {"one": 9, "two": 3}, "trained": {"one": "mechanism", "two": "mechanism"}}, True),
        ({"tokens": {"one": 9, "two": 3}, "trained": {"one": "mechanism", "two": "lora"}}, False),
        ({"tokens": {"transfer": 9}, "trained": {"transfer": "all"}}, False),
        ({"recipe": {"imported": {"block_size": 4}}}, False),
        ({"earlier": {}}, False),
        ({"earlier": {}, "tokens": {"transfer": 9}}, False),
    ],
)
def test_whose_weights_they_are(values, teacher):
    assert base_is_teacher(make_record("someone/teacher", **values)) == teacher
    assert not base_is_teacher({})


def test_a_model_without_a_record_claims_no_teacher(inputs, tmp_path):
    final = converted(inputs, tmp_path / "final")
    assert reference(final, inputs, tmp_path / "known")[0] == TEACHER
    (final / "linearize.json").unlink()
    assert reference(final, inputs, tmp_path / "unknown") == (OWN, None)


def test_a_record_goes_on_and_leaves_out_what_was_measured_before():
    measured = {"rows": []}
    first = make_record(
        "someone/teacher", revision="abc", tokens={"transfer": 5}, seconds={"transfer": 1.5},
        peak_memory_bytes={"transfer": 7}, evaluation=measured, tasks={"scores": []}, calibration={"sequences": 3},
    )  # fmt: skip
    first |= {"validation": {"perplexity": 2.0}, "parameters": 5}
    second = make_record(
        "converted", earlier=first, tokens={"transfer": 5, "finetune": 2}, seconds={"transfer": 2.0, "finetune": 1.0},
        peak_memory_bytes={"transfer": None, "finetune": None},
    )  # fmt: skip
    assert (second["teacher"], second["teacher_revision"]) == ("someone/teacher", "abc")
    assert second["tokens"] == {"transfer": 10, "finetune": 2}
    assert second["seconds"] == {"transfer": 3.5, "finetune": 1.0}
    assert second["peak_memory_bytes"] == {"transfer": 7, "finetune": None}
    assert second["calibration"] == {"sequences": 3} and second["parameters"] == 5
    assert second["evaluation"] is None and second["tasks"] is None and "validation" not in second


def test_a_record_keeps_the_most_that_a_stage_of_a_name_has_trained():
    first = make_record("someone/teacher", tokens={"training": 5}, trained={"fit": "nothing", "training": "all"})
    second = make_record(
        "converted", earlier=first, tokens={"training": 2}, trained={"training": "mechanism", "more": "lora"}
    )
    assert second["trained"] == {"fit": "nothing", "training": "all", "more": "lora"}
    assert not base_is_teacher(second)


def test_a_run_goes_on_from_a_record_of_before_stages(inputs, tmp_path):
    """Its recipe had the settings of each stage at the top."""
    final = converted(inputs, tmp_path / "final", tokens={"transfer": 5})
    record = read_record(final)
    record["recipe"] |= {"transfer": {"loss": "mse"}, "finetune": None, "data": {"sequence_length": 32}}
    del record["trained"]
    (final / "linearize.json").write_text(json.dumps(record))
    settings = tiny_config(final, inputs / "text.jsonl", tmp_path / "out", inputs / "cache") | {"evaluation": None}
    settings["stages"] = {"finetune": {**settings["stages"]["finetune"], "max_steps": 1}}
    found = read_record(linearize.run(settings).final)
    assert found["recipe"]["stages"]["transfer"] == {"loss": "mse"}
    assert found["recipe"]["stages"]["finetune"]["max_steps"] == 1 and found["recipe"]["attention"]["window"] == 4
    assert found["tokens"] == {"transfer": 5, "finetune": 64} and not base_is_teacher(found)
    card = (tmp_path / "out" / "final" / "README.md").read_text()
    assert "- transfer: 5 tokens" in card and "loss: mse" in card


@pytest.mark.slow
def test_the_stages_onto_gain_cells_count_all_tokens(inputs, tmp_path):
    training = {"kind": "train", "weights": "all", "max_steps": 2, "batch_size": 1, "tokens_per_step": 32}
    refined = {**training, "weights": "mechanism", "teacher": "linear", "labels_weight": 0}
    out = linearize.run(
        {
            "model_name_or_path": str(inputs / "teacher"),
            "output_dir": str(tmp_path / "out"),
            "device": "cpu",
            "attention": {"type": "gain_cell", "window": 64, "cell_kind": "linear"},
            "data": {
                "dataset": str(inputs / "text.jsonl"),
                "sequence_length": 32,
                "cache_dir": str(tmp_path / "cache"),
            },
            "stages": {
                "calibrate": {"kind": "calibrate", "sequences": 2},
                "transfer": {"kind": "transfer", "max_steps": 3, "tokens_per_step": 32, "branch": "mixed"},
                "linear": training,
                "adapted": {"kind": "adapt", "sequences": 2},
                "refined": refined,
                "nonlinear": training,
            },
            "evaluation": None,
        }
    ).output_dir
    expected = {
        "transfer": {"transfer": 96},
        "linear": {"transfer": 96, "linear": 64},
        "adapted": {"transfer": 96, "linear": 64},
        "refined": {"transfer": 96, "linear": 64, "refined": 64},
        "final": {"transfer": 96, "linear": 64, "refined": 64, "nonlinear": 64},
    }
    trained = {"calibrate": "nothing", "transfer": "mechanism", "linear": "all", "adapted": "nothing"}
    trained |= {"refined": "mechanism", "nonlinear": "all"}
    for name, tokens in expected.items():
        record = read_record(out / name)
        assert record["tokens"] == tokens, name
        assert record["teacher"] == "teacher" and record["recipe"]["attention"]["window"] == 64, name
        assert record["trained"].items() <= trained.items() and record["trained"].keys() >= tokens.keys(), name
        assert base_is_teacher(record) == (name == "transfer"), name
    assert reference(out / "adapted", inputs, tmp_path / "report")[0] == OWN


def test_training_from_a_converted_model_measures_anew(inputs, tmp_path):
    final = converted(inputs, tmp_path / "final", tokens={"transfer": 5}, evaluation=Report().to_dict())
    settings = {
        "model_name_or_path": str(final), "output_dir": str(tmp_path / "out"), "device": "cpu",
        "data": {"dataset": str(inputs / "text.jsonl"), "sequence_length": 32, "cache_dir": str(tmp_path / "cache")},
        "stages": {
            "training": {"kind": "train", "weights": "all", "max_steps": 1, "batch_size": 1, "tokens_per_step": 32}
        }, "evaluation": None,
    }  # fmt: skip
    record = read_record(linearize.run(settings).final)
    assert record["tokens"] == {"transfer": 5, "training": 32} and not record["evaluation"]
    assert record["validation"]["perplexity"] and record["recipe"]["attention"]["window"] == 4
    assert record["recipe"]["stages"]["training"]["max_steps"] == 1
