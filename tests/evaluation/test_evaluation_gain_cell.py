"""Gain-cell models in the evaluation: a report without branches, noise, sweeps of the cells, test vectors."""

import json

import numpy as np
import pytest
import torch
from tiny_models import make_student, make_teacher
from tiny_runs import make_teacher_directory, write_text

from linearize.cli import main
from linearize.config.evaluation import EvaluationConfig
from linearize.data.sequences import TokenBlocks
from linearize.errors import UserError
from linearize.evaluation import (
    Report,
    evaluate,
    exchanged_cells,
    export_vectors,
    head_vectors,
    linear_share,
    measure_noise,
    noisy,
    parse_noise,
    perplexity,
    save_vectors,
    sweep_cells,
)
from linearize.evaluation.labels import describe
from linearize.evaluation.report import OWN_WEIGHTS, STUDENT, TEACHER
from linearize.modeling import GainCell, GainCellNoise, gain_cell_attention
from linearize.runs.report import CONVERTED, RunReport, after

CELL = {"tile": 4, "score_saturation": 4.0, "output_saturation": 4.0, "leak": 0.01}
GAIN_CELL = {"gain_cell": {"type": "gain_cell", "window": 16, "cell": CELL}}


def make_model(mixer_types=None, mixers=None):
    return make_student(make_teacher(), mixers or GAIN_CELL, mixer_types)


@pytest.fixture(scope="module")
def student():
    return make_model()


@pytest.fixture(scope="module")
def blocks():
    return TokenBlocks(torch.randint(3, 97, (3, 40), generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A converted checkpoint with its tokenizer, beside some text and its teacher."""
    root = tmp_path_factory.mktemp("gain_cell")
    make_teacher_directory(root / "teacher")
    write_text(root / "text.jsonl", documents=10)
    cell = json.dumps(CELL)
    flags = ["--attention.type", "gain_cell", "--attention.window", "16", "--attention.cell", cell]
    assert main(["convert", str(root / "teacher"), str(root / "model"), *flags]) == 0
    return root


# --- report


def test_report_has_no_rows_of_branches(student, blocks, tmp_path):
    report = evaluate(student, blocks)
    assert [row.name for row in report.rows] == [TEACHER, STUDENT]
    assert report.row(TEACHER).nll == perplexity(student, blocks, arm="teacher").nll
    absent = (report.control, report.reach, report.share, report.linear_index)
    assert absent == (None, None, None, None) and not report.notes
    text = report.markdown()
    assert not any(word in text for word in ("control", "softmax arm", "linear", "window", "sinks"))
    report.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"evaluation.json", "evaluation.md", "evaluation_arms.png"}
    assert Report.from_json(report.to_json()) == report


def test_report_of_a_merged_gain_cell_model(student, blocks):
    alone = evaluate(student, blocks, merged=True)
    assert [row.name for row in alone.rows] == [OWN_WEIGHTS, STUDENT]
    assert "merged" in alone.notes[0] and "control" not in alone.notes[0]
    compared = evaluate(student, blocks, merged=True, original=make_model())
    assert [row.name for row in compared.rows] == [TEACHER, STUDENT] and not compared.notes


def test_report_of_gain_cells_beside_linear_layers(blocks):
    mixers = GAIN_CELL | {"linear": {"type": "linear", "window": 8, "sinks": 2}}
    mixed = make_model(["gain_cell", "linear", "softmax"], mixers)
    report = evaluate(mixed, blocks)
    assert [row.name for row in report.rows] == [TEACHER, STUDENT] and report.share is None


def test_arms_that_are_not_there_are_one_sentence(student, blocks):
    with pytest.raises(UserError, match="no arm 'softmax': measure one of mixed, teacher"):
        perplexity(student, blocks, arm="softmax")
    with pytest.raises(UserError, match="no"):
        linear_share(student, blocks)


def test_a_run_measures_what_there_is(student, blocks, tmp_path):
    report = RunReport(EvaluationConfig(max_tokens=80), blocks, tmp_path / "evaluation.json", keep=False)
    report.before_training(student, base_is_teacher=True, yardstick=False)
    report.after_stage("attention transfer", student)
    found = report.finish(student)
    assert [row.name for row in found.rows] == [TEACHER, CONVERTED, after("attention transfer"), STUDENT]
    assert found.control is None and found.share is None and found.state


# --- noise


def test_parse_noise():
    assert parse_noise("read=0.01, mismatch=5e-2") == GainCellNoise(read=0.01, mismatch=0.05)
    assert describe({"read": 0.01, "write": 0.0}) == "read=0.01" and describe({"read": 0.0}) == "0"


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("reed=0.1", "no kind 'reed': .*read, mismatch, write, leak_spread"),
        ("seed=1", "no kind 'seed'"),
        ("", "no kind ''"),
        ("read", "read is ''"),
        ("read=much", "read is 'much'"),
        ("read=-0.1", "at least 0"),
        ("write=nan", "write is 'nan'"),
        ("write=inf", "write is 'inf'"),
        ("read=0.1,read=0.2", "read twice"),
    ],
)
def test_bad_noise_is_one_sentence(text, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        parse_noise(text)
    assert "\n" not in str(caught.value)


def test_without_deviations_nothing_changes(student, blocks):
    report = measure_noise(student, blocks, GainCellNoise(), trials=2)
    assert {trial.nll for trial in report.trials} == {perplexity(student, blocks).nll} == {report.noiseless_nll}
    assert report.perplexity().deviation == 0.0


@pytest.mark.parametrize("kind", ["read", "mismatch", "write", "leak_spread"])
def test_every_kind_spreads_the_trials(student, blocks, kind):
    noise = GainCellNoise().replace(**{kind: 0.3})
    report = measure_noise(student, blocks, noise, trials=3, batch_size=3)
    values = [trial.nll for trial in report.trials]
    assert len(set(values)) == 3 and report.noiseless_nll not in values
    spread = report.nll()
    assert spread.least == min(values) and spread.most == max(values)
    assert spread.deviation == pytest.approx(np.std(values, ddof=1)) and spread.mean == pytest.approx(np.mean(values))


def test_spread_grows_with_noise_and_trials_come_again(student, blocks):
    small, large = (
        measure_noise(student, blocks, GainCellNoise(mismatch=size), trials=6, batch_size=3) for size in (0.02, 0.4)
    )
    assert 0 < small.nll().deviation < large.nll().deviation
    later = measure_noise(student, blocks, GainCellNoise(mismatch=0.4, seed=4), trials=2, batch_size=1)
    for trial, again in zip(large.trials[4:], later.trials, strict=True):
        assert trial.seed == again.seed and trial.nll == pytest.approx(again.nll, abs=1e-6)


def test_layers_and_trials_have_seeds_of_their_own(student):
    seeds = []
    before = [attention.mixer.noise for attention in student.mixer_attentions()]
    for trial in range(3):
        with noisy(student, GainCellNoise(read=0.1, seed=trial)):
            seeds += [attention.mixer.noise.seed for attention in student.mixer_attentions()]
    assert len(set(seeds)) == 9
    with pytest.raises(RuntimeError), noisy(student, GainCellNoise(read=0.1)):
        raise RuntimeError
    assert [attention.mixer.noise for attention in student.mixer_attentions()] == before == [None] * 3


def test_noise_report_reads_well_and_is_saved(student, blocks, tmp_path):
    report = measure_noise(student, blocks, GainCellNoise(read=0.02, mismatch=0.1), trials=4, batch_size=3)
    table = report.table()
    assert "read=0.02, mismatch=0.1: 4 trials" in table.title
    assert [row[0] for row in table.rows] == ["perplexity", "log-perplexity, nats per token"]
    report.show()
    paths = report.save(tmp_path)
    assert [path.name for path in paths] == ["noise.json", "noise.png"] and paths[1].stat().st_size > 1000
    saved = json.loads(paths[0].read_text())
    assert saved["perplexity"]["mean"] == report.perplexity().mean and len(saved["trials"]) == 4
    assert measure_noise(student, blocks, GainCellNoise(read=0.1), trials=1).table().rows[0][3] == "-"


# --- sweeps


def test_sweeps_are_models_with_those_cells(student, blocks, tmp_path):
    own = [attention.mixer.cell for attention in student.mixer_attentions()]
    report = sweep_cells(student, blocks, batch_size=3)
    assert [attention.mixer.cell for attention in student.mixer_attentions()] == own
    assert [point.label for point in report.leak] == ["0", "1x", "4x", "16x"]
    assert [point.label for point in report.weight_levels] == ["4", "8", "16", "off"]
    assert [point.label for point in (*report.leak, *report.weight_levels) if point.own] == ["1x", "8"]
    assert report.leak_unit == "0.01 per token"
    for point, changes in ((report.leak[3], {"leak": 0.16}), (report.weight_levels[3], {"weight_levels": None})):
        changed = {"gain_cell": {"type": "gain_cell", "window": 16, "cell": CELL | changes}}
        assert point.nll == perplexity(make_model(mixers=changed), blocks, batch_size=3).nll
    assert report.own_nll == perplexity(student, blocks, batch_size=3).nll == report.leak[1].nll
    assert len({point.nll for point in report.leak}) == len({point.nll for point in report.weight_levels}) == 4
    report.show()
    paths = report.save(tmp_path)
    assert [path.name for path in paths] == ["cell_sweeps.json", "cell_sweeps.png"] and paths[1].stat().st_size > 1000
    assert len(json.loads(paths[0].read_text())["leak"]) == 4


def test_sweeps_of_other_checkpoints_mark_their_own(blocks):
    cell = CELL | {"leak": 0.0, "weight_levels": 12}
    model = make_model(["gain_cell", "softmax", "softmax"], {"gain_cell": GAIN_CELL["gain_cell"] | {"cell": cell}})
    report = sweep_cells(model, blocks, batch_size=3)
    assert [point.label for point in report.weight_levels] == ["4", "8", "12", "16", "off"]
    assert [point.label for point in (*report.leak, *report.weight_levels) if point.own] == ["0", "12"]
    assert report.leak_unit == f"{GainCell().leak:g} per token"


def test_cells_come_back_after_an_error(student):
    own = [attention.mixer.cell for attention in student.mixer_attentions()]
    with pytest.raises(RuntimeError), exchanged_cells(student, lambda cell: cell.replace(leak=1.0)):
        assert all(attention.mixer.cell.leak == 1.0 for attention in student.mixer_attentions())
        raise RuntimeError
    assert [attention.mixer.cell for attention in student.mixer_attentions()] == own


def test_other_models_are_one_sentence(blocks):
    linear = make_model(mixers={"linear": {"type": "linear", "window": 8}})
    for model in (linear, make_teacher()):
        for work in (
            lambda m: measure_noise(m, blocks, GainCellNoise(read=0.1)),
            lambda m: sweep_cells(m, blocks),
            lambda m: export_vectors(m, blocks[0]["input_ids"], layer=0, head=0),
        ):
            with pytest.raises(UserError, match="gain-cell layers, and this one has none"):
                work(model)


# --- test vectors


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"output_grid": "published"},
        {"leak": 0.0, "input_levels": None, "weight_levels": None, "output_levels": None},
    ],
    ids=["symmetric", "published", "continuous"],
)
@pytest.mark.parametrize("length", [3, 16, 37])
def test_head_vectors_are_the_op(changes, length):
    cell = GainCell.from_dict(CELL | changes)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, length, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    query, key, value = 0.5 + 0.4 * query, 0.45 + 0.3 * key, 0.45 + 0.3 * value
    expected, state = gain_cell_attention(
        query, key, value, cell=cell, window=16, return_state=True, backend="reference"
    )
    found = head_vectors(*(x[0, 0].numpy() for x in (query, key, value)), cell=cell, window=16)
    np.testing.assert_allclose(found["output"], expected[0, 0].numpy(), rtol=0, atol=1e-10)
    slots = found["slot_token"].shape[1]
    assert slots == min(16, -(-length // 4) * 4)
    assert found["slot_token"][-1].tolist() == state.written[0, :slots].tolist()
    held = found["slot_token"][-1][found["slot_token"][-1] >= 0]
    for name, stored in (("key", state.key), ("value", state.value)):
        np.testing.assert_allclose(found[f"{name}_deviation"][held], stored[0, 0, held % 16].numpy(), atol=1e-12)
    assert (found["age"] >= 0).sum(1).tolist() == [min(n + 1, 16) for n in range(length)]
    assert ("key_code" in found) == (cell.weight_levels is not None)
    if cell.output_levels is not None:
        assert found["key_code"].min() >= 0 and found["key_code"].max() < cell.weight_levels
        step = 2 / 31 if changes else 1 / 15
        np.testing.assert_allclose(found["tile_code"] * step, found["tile_output"], atol=1e-12)
    np.testing.assert_allclose(found["tile_output"].sum(1), found["output"], atol=1e-12)


@pytest.mark.parametrize("head", range(4))
def test_exported_vectors_are_the_models_head(blocks, head):
    model = make_model().double()
    with torch.no_grad():
        for number, parameter in enumerate(p for name, p in model.named_parameters() if ".mixer." in name):
            parameter.mul_(1 + 0.1 * torch.arange(len(parameter)) + 0.01 * number)
    outputs = []
    hook = model.mixer_attentions()[1].mixer.register_forward_hook(lambda module, inputs, out: outputs.append(out))
    vectors = export_vectors(model, blocks[0]["input_ids"], layer=1, head=head)
    hook.remove()
    np.testing.assert_allclose(vectors["output_scaled"], outputs[0][0, head].numpy(), rtol=0, atol=1e-10)
    constants = json.loads(str(vectors["constants"]))
    assert (constants["head"], constants["key_value_head"]) == (head, head // 2)
    assert GainCell.from_dict(constants["cell"]) == GainCell.from_dict(CELL)
    for name in ("query", "key", "value"):
        scale, offset = vectors[f"{name}_scaler"]
        np.testing.assert_allclose(vectors[f"{name}_in"] * scale + offset, vectors[name], atol=1e-12)


def test_vectors_come_back_and_never_replace_a_file(student, blocks, tmp_path):
    vectors = export_vectors(student, blocks[0]["input_ids"], layer=2, head=3)
    save_vectors(tmp_path / "head.npz", vectors)
    with np.load(tmp_path / "head.npz", allow_pickle=False) as loaded:
        assert set(loaded) == set(vectors)
        assert all(np.array_equal(loaded[name], vectors[name]) for name in vectors)
        described = str(loaded["README"])
        assert all(f"{name} " in described or f"{name}," in described for name in loaded if name != "README")
        assert all(loaded[name].dtype.kind in "ifU" for name in loaded)
    with pytest.raises(UserError, match="exists already"):
        save_vectors(tmp_path / "head.npz", vectors)
    save_vectors(tmp_path / "head.npz", vectors, overwrite=True)
    with pytest.raises(UserError, match="end in .npz"):
        save_vectors(tmp_path / "head.txt", vectors)
    assert [path.name for path in tmp_path.iterdir()] == ["head.npz"]


# --- command line


def test_evaluate_with_noise_and_sweeps(directory, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    measure = ["evaluate", str(directory / "model"), "--text", str(directory / "text.jsonl")]
    measure += ["--sequence_length", "32", "--max_tokens", "64", "--device", "cpu"]
    flags = ["--noise", "read=0.01,mismatch=0.05", "--trials", "2", "--cell_sweeps"]
    assert main([*measure, *flags]) == 0
    shown = capsys.readouterr().out
    assert "2 trials" in shown and "weight levels off" in shown and "sinks" not in shown
    names = {path.name for path in (tmp_path / "evaluation").iterdir()}
    assert names >= {"evaluation.json", "noise.json", "noise.png", "cell_sweeps.json", "cell_sweeps.png"}
    for bad in (["--noise", "reed=1"], ["--noise", "read=0.1", "--trials", "0"]):
        assert main([*measure, *bad]) == 2
    assert main(["evaluate", str(directory / "model"), "--tasks", "x", "--noise", "read=0.1"]) == 2
    stock = ["evaluate", str(directory / "teacher"), *measure[2:]]
    for flags in (["--noise", "read=0.1"], ["--cell_sweeps"]):
        capsys.readouterr()
        assert main([*stock, *flags]) == 2
        assert f"linearize: {flags[0]} needs a model" in capsys.readouterr().err.splitlines()[-1]


def test_export_vectors_command(directory, tmp_path, capsys):
    out = tmp_path / "head.npz"
    export = ["export-vectors", str(directory / "model"), str(out), "--device", "cpu"]
    for bad in (["--layer", "9"], ["--head", "4"], ["--head", "-1"], ["--tokens", "1"], ["--tokens", "9999"]):
        assert main([*export, *bad]) == 2
        assert not out.exists()
    assert main([*export, "--layer", "1", "--head", "2"]) == 0
    with np.load(out, allow_pickle=False) as vectors:
        assert vectors["query"].shape == (64, 16) and vectors["tile_output"].shape == (64, 4, 16)
    before = out.read_bytes()
    assert main(export) == 2 and out.read_bytes() == before
    assert main([*export, "--overwrite", "--text", str(directory / "text.jsonl"), "--tokens", "20"]) == 0
    with np.load(out, allow_pickle=False) as vectors:
        assert vectors["output"].shape == (20, 16)
    assert main(["export-vectors", str(directory / "teacher"), str(tmp_path / "no.npz")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["head.npz"]
    capsys.readouterr()


def test_info_of_a_gain_cell_model(directory, capsys):
    assert main(["info", str(directory / "model")]) == 0
    assert "gain_cell" in capsys.readouterr().out
