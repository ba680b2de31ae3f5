"""Perplexity by length: right by a direct computation for every mechanism, and what is missing or bad is said."""

import json
import math
import re

import pytest
import torch
from tiny_models import make_gpt2, make_mistral, make_student, make_teacher, perturb
from tiny_runs import make_teacher_directory, tiny_config, write_text
from tiny_students import MAKERS, MIXERS, student_of
from torch.nn import functional

import linearize
from linearize.config.evaluation import EvaluationConfig
from linearize.data.sequences import TokenBlocks
from linearize.errors import UserError
from linearize.evaluation.arms import LINEAR_ARM, OWN_WEIGHTS, SOFTMAX_ARM, STUDENT, TEACHER
from linearize.evaluation.by_length import (
    HELD_OUT,
    MATCHED,
    LengthFigure,
    LengthReport,
    LengthText,
    measure_by_length,
    measure_row,
    start_report,
)
from linearize.evaluation.plain_window import NAME, matched_window, plain_window
from linearize.hardware.state_bytes import state_bytes
from linearize.runs.report import RunReport
from linearize.runs.settings import resolve_run

TRAINED = 8


def rows(number, length=TRAINED, seed=0):
    return torch.randint(3, 97, (number, length), generator=torch.Generator().manual_seed(seed))


def text(number=17, name=HELD_OUT, limit=1000, seed=0):
    return LengthText.of(name, TokenBlocks(rows(number, seed=seed)), limit)


@pytest.fixture(scope="module")
def student():
    student = student_of("llama", types=["student"] * 3)
    perturb(student)
    return student


def nats(model, ids, arm):
    """`(L - 1,)`, of one piece, in one plain call."""
    with torch.no_grad(), model.use_arm(arm):
        logits = model(ids[None]).logits[0, :-1].double()
    return functional.cross_entropy(logits, ids[1:], reduction="none")


@pytest.mark.parametrize("mechanism", MIXERS)
def test_figures_are_a_direct_computation(mechanism):
    student = student_of("llama", mechanism)
    perturb(student)
    one, two = text(17), text(9, "other.txt", seed=1)
    report = measure_by_length(student, [one, two], TRAINED)
    both = [SOFTMAX_ARM, LINEAR_ARM]
    branches = {"linear": both, "cosine": both, "salient": [SOFTMAX_ARM]}.get(mechanism, [])
    assert report.names() == [TEACHER, f"{TEACHER}, {MATCHED}", STUDENT, *branches]
    assert report.texts() == [HELD_OUT, "other.txt"] and not report.notes
    arms = {TEACHER: "teacher", STUDENT: "mixed", SOFTMAX_ARM: "softmax", LINEAR_ARM: "linear"}
    for name in {*report.names()} & {*arms}:
        for times in (1, 4, 8):
            pieces = [nats(student, piece, arms[name]) for piece in one.ids[: 2 * 64].reshape(-1, times * TRAINED)]
            found = report.figure(HELD_OUT, name, times)
            assert found.nll == pytest.approx(torch.cat(pieces).mean().item(), abs=1e-5)
            assert found.perplexity == pytest.approx(math.exp(found.nll))
            assert found.tokens == 128 - len(pieces), "all lengths score the same tokens but the first of a piece"
            bounds = [0, 8, 16, 32, 64][: {1: 2, 4: 4, 8: 5}[times]]
            spans = [torch.stack(pieces)[:, a:b].mean() for a, b in zip(bounds, bounds[1:], strict=False)]
            assert found.parts == pytest.approx([span.exp().item() for span in spans], rel=1e-5)
    assert LengthReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


@pytest.mark.parametrize("backbone", MAKERS)
def test_a_plain_window_is_the_masked_teacher(backbone):
    """In converted layers and in those that stay softmax."""
    student = student_of(backbone)
    ids = rows(2, 24)
    n, j = torch.arange(24)[:, None], torch.arange(24)[None]
    seen = (j <= n) & ((n - j < 5) | (j < 2))
    mask = torch.zeros(1, 1, 24, 24).masked_fill(~seen, torch.finfo(torch.float32).min)
    stock = MAKERS[backbone]()
    if backbone == "mistral":
        stock = MAKERS[backbone](sliding_window=None)
    before = student.config._attn_implementation
    with torch.no_grad(), student.use_arm("teacher"):
        expected = stock(ids, attention_mask=mask).logits
        with plain_window(student, 5, 2):
            found = student(ids).logits
        free = student(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (free - found).abs().max() > 0.01, "the window is gone, and it mattered"
    assert student.config._attn_implementation == before != NAME


def test_the_plain_window_holds_as_many_bytes():
    student = student_of("llama", types=["student"] * 3)
    window, sinks = matched_window(student.config, 4096)
    [state] = state_bytes(student.config, [4096], torch.bfloat16)
    of_a_token = 3 * 2 * 2 * 16 * 2  # layers, key and value, heads, dimensions, bytes
    assert sinks == 4 and 0 <= state.student - (window + sinks) * of_a_token < of_a_token
    assert matched_window(student.config, 16) == (12, 4), "never more than the text"
    assert matched_window(student.config, 65_536) == (window, sinks), "a state of constant size"


@pytest.mark.parametrize("mechanism, types", [("linear", None), ("landmark", None)])
def test_growing_states_are_matched_at_each_length(mechanism, types):
    config = student_of("llama", mechanism, types).config
    held = [sum(matched_window(config, length)) for length in (512, 2048, 4096)]
    assert held[0] < held[1] < held[2]
    if mechanism == "linear":  # one layer of three keeps all tokens, the others a constant
        assert held[2] - held[1] == pytest.approx(2048 / 3, abs=1)
        student = student_of("llama")
        report = measure_by_length(student, [text(65 * 8)], 64)
        windows = [report.figure(HELD_OUT, f"{TEACHER}, {MATCHED}", times).window for times in (1, 4)]
        assert windows == [matched_window(config, 64)[0], matched_window(config, 256)[0]]
        assert any(re.search(r"\d+ tokens and 4 sinks at 1x, \d+ tokens", line) for line in report.sentences())


def test_a_window_no_longer_than_the_teachers_own():
    config = make_student(make_mistral(), {"student": MIXERS["linear"]}, ["student"] * 3).config
    assert matched_window(config, 4096)[0] == 7


def test_the_teacher_ends_where_its_positions_end():
    student = make_student(make_teacher(max_position_embeddings=32), {"student": MIXERS["linear"]}, ["student"] * 3)
    report = measure_by_length(student, [text()], TRAINED)
    assert report.figure(HELD_OUT, TEACHER, 8) is None and report.figure(HELD_OUT, TEACHER, 4) is not None
    assert report.figure(HELD_OUT, STUDENT, 8) and report.figure(HELD_OUT, f"{TEACHER}, {MATCHED}", 8)
    assert report.notes == ["teacher is not scored at 64 tokens: its positions end at 32."]
    assert "| teacher | " in report.markdown() and "| - |" in report.markdown()


def test_no_arm_goes_past_learned_positions():
    student = make_student(make_gpt2(n_positions=32), {"student": MIXERS["linear"]}, ["student"] * 3)
    report = measure_by_length(student, [text()], TRAINED)
    assert {figure.times for figure in report.figures} == {1, 4}
    assert len(report.notes) == 5 and all("positions end at 32" in note for note in report.notes)


def test_a_short_text_is_said_to_be_short(student):
    report = measure_by_length(student, [text(5, "short.txt"), text(17, limit=48), text(3, "tiny.txt")], TRAINED)
    assert {(figure.text, figure.times) for figure in report.figures} == {
        *(("short.txt", times) for times in (1, 4)),
        *((HELD_OUT, times) for times in (1, 4)),
        ("tiny.txt", 1),
    }
    assert report.notes == [
        "short.txt is not scored at 8x (64 tokens): its whole sequences hold 40.",
        f"{HELD_OUT} is not scored at 8x (64 tokens): 48 tokens of it are read at most.",
        "tiny.txt is not scored at 4x (32 tokens) and 8x (64 tokens): its whole sequences hold 24.",
    ]
    assert all(note in report.markdown() for note in report.notes)


def test_rows_are_joined_without_their_padding():
    ids = rows(3)
    labels = ids.clone()
    labels[1, :2] = -100
    blocks = TokenBlocks(ids, labels, lengths=torch.tensor([8, 5, 8]).numpy())
    joined = LengthText.of("x", blocks, 100)
    assert joined.ids.tolist() == [*ids[0].tolist(), *ids[1, :5].tolist(), *ids[2].tolist()]
    assert (joined.labels == -100).sum() == 2 and joined.held == 21


def test_a_student_worse_than_its_window_is_said_so(student):
    """Made one: nothing but the memory, and its values are wrong."""
    good = measure_by_length(student, [text()], TRAINED)
    never_forgets = {"type": "linear", "window": 4, "map_input": "rotated", "gate": "none"}
    bad = make_student(MAKERS["llama"](), {"student": never_forgets}, ["student"] * 3)
    with torch.no_grad():
        for attention in bad.mixer_attentions():
            attention.mixer.window_mix.weight.fill_(-30.0)  # the memory outweighs the window
            attention.mixer.feature_map_k.magnitude.normal_(std=3.0)
    report = measure_by_length(bad, [text()], TRAINED)
    warning = report.warning()
    worst = report.figure(HELD_OUT, STUDENT, 8), report.figure(HELD_OUT, SOFTMAX_ARM, 8)
    assert worst[0].perplexity > worst[1].perplexity
    assert warning.startswith("The student is worse than its own window") and warning.count(". ") == 0
    assert f"on {HELD_OUT} at positions" in warning and warning in report.markdown()
    assert warning == report.sentences()[0] != good.warning()


def figure(name, parts, text=HELD_OUT, times=8):
    return LengthFigure(text, name, times, parts[0], math.log(parts[0]), 1, 0.0, parts)


def test_one_bad_bucket_is_enough():
    report = LengthReport(
        8, figures=[figure(STUDENT, [9.0, 9.0, 9.4, 9.0]), figure(SOFTMAX_ARM, [9.0, 9.1, 9.2, 9.3])]
    )
    assert report.worse() == [(HELD_OUT, "2x-4x", 9.4, 9.2)]
    assert report.warning().endswith("on held-out text at positions 2x-4x (9.400 against 9.200).")
    report.figures[0] = figure(STUDENT, [9.0, 9.0, 9.1, 9.0])
    assert report.warning() is None and report.sentences() == []


def test_controls_of_a_merged_model_are_its_own_weights_or_the_original(student):
    own = measure_by_length(student, [text()], TRAINED, merged=True)
    assert own.reference == OWN_WEIGHTS and own.has(OWN_WEIGHTS)
    other = student_of("llama", types=["student"] * 3)
    given = measure_by_length(student, [text()], TRAINED, merged=True, original=other)
    assert given.reference == TEACHER and given.has(TEACHER)
    alone = measure_by_length(student, [text()], TRAINED, controls=False)
    assert alone.names() == [STUDENT]
    stock = measure_by_length(make_teacher(), [text()], TRAINED)
    assert stock.names() == [TEACHER] and len(stock.figures) == 3


def test_rows_that_are_there_are_not_measured_again(student, monkeypatch):
    report = start_report([text()], TRAINED)
    measure_row(report, STUDENT, student, "mixed", [text()])
    monkeypatch.setattr("linearize.evaluation.by_length.perplexity", None)
    measure_row(report, STUDENT, student, "mixed", [text()])
    assert len(report.figures) == 3


def test_a_resumed_report_keeps_figures_of_the_same_text(student, tmp_path):
    def report(texts):
        path = tmp_path / "evaluation.json"
        return RunReport(EvaluationConfig(), TokenBlocks(rows(4)), path, keep=True, texts=texts, trained=TRAINED)

    report([text()]).before_training(student, base_is_teacher=True, yardstick=False)
    assert report([text()]).report.by_length.names() == [TEACHER, f"{TEACHER}, {MATCHED}"]
    assert report([text(), text(9, "other.txt")]).report.by_length.figures == []
    assert report([text(limit=64)]).report.by_length.figures == []
    assert report([]).report.by_length is None


def test_files(student, tmp_path):
    report = measure_by_length(student, [text(), text(5, "short.txt")], TRAINED)
    paths = report.save(tmp_path)
    assert [path.name for path in paths] == ["by_length.json", "by_length.md", "by_length.png"]
    assert LengthReport.from_dict(json.loads(paths[0].read_text())) == report
    assert paths[2].stat().st_size > 10_000


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("by_length")
    make_teacher_directory(root / "teacher")
    write_text(root / "text.jsonl")
    (root / "news.txt").write_text("nobody spoke in the winter light. " * 60)
    return root


def run_settings(inputs, tmp_path, *, without=(), **evaluation):
    """Settings of a run of all stages but those in `without`."""
    config = tiny_config(inputs / "teacher", inputs / "text.jsonl", tmp_path / "out", inputs / "cache")
    config["stages"] = {name: stage for name, stage in config["stages"].items() if name not in without}
    config["evaluation"] |= {"foreign_texts": str(inputs / "news.txt"), **evaluation}
    return config


def test_a_run_gives_the_figures_everywhere(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(LengthReport, "worse", lambda report: [(HELD_OUT, "1x-2x", 2.0, 1.0)])
    with pytest.warns(UserWarning, match="worse than its own window and sinks with the memory left out"):
        result = linearize.run(run_settings(inputs, tmp_path))
    found = result.report.by_length
    assert found.trained == 32 and found.texts() == [HELD_OUT, "news.txt"]
    assert found.names() == [TEACHER, f"{TEACHER}, {MATCHED}", STUDENT, SOFTMAX_ARM, LINEAR_ARM]
    assert {x.times for x in found.figures if x.text == HELD_OUT} == {1, 4, 8}
    assert LengthReport.from_dict(result.record["evaluation"]["by_length"]) == found
    card, shown = (result.final / "README.md").read_text(), capsys.readouterr().out
    for where in (card, shown):
        assert "Perplexity by length, trained at 32: news.txt" in where and "The student is worse than" in where
    assert str(inputs) not in (result.final / "linearize.json").read_text()
    assert (tmp_path / "out" / "plots" / "evaluation_by_length.png").is_file()
    page = (tmp_path / "out" / "report.md").read_text()
    assert page.startswith("# teacher with linear attention\n\n- model: ") and "- again: `linearize run " in page
    headings = [page.index(f"### {name}") for name in ("Stages", "Held-out perplexity", "Plots")]
    assert headings == sorted(headings) and "](plots/evaluation_by_length.png)" in page


def test_it_can_be_switched_off_and_bounded(inputs, tmp_path):
    off = linearize.run(run_settings(inputs, tmp_path, without=["transfer"], length_tokens=0, foreign_texts=None))
    assert off.report.by_length is None
    few = linearize.run(
        run_settings(inputs, tmp_path / "few", without=["calibrate", "transfer", "finetune"], length_tokens=160)
    )
    assert {(x.text, x.times) for x in few.report.by_length.figures} == {
        (name, times) for name in (HELD_OUT, "news.txt") for times in (1, 4)
    }
    assert all("160 tokens of it are read at most" in note for note in few.report.by_length.notes)
    with pytest.raises(UserError, match="foreign_texts are scored by length alone"):
        EvaluationConfig(length_tokens=0, foreign_texts="a.txt")


def test_training_text_is_no_foreign_text(inputs, tmp_path):
    with pytest.raises(UserError, match="evaluation.foreign_texts: .*is part of the training data"):
        linearize.run(run_settings(inputs, tmp_path, foreign_texts=str(inputs / "text.jsonl")))


def test_the_command(inputs, tmp_path, capsys):
    from linearize.cli import main

    config = run_settings(inputs, tmp_path, without=["transfer"]) | {"evaluation": None}
    linearize.run(config)
    text, out = str(inputs / "news.txt"), tmp_path / "report"
    call = ["evaluate", str(tmp_path / "out"), "--by_length", "auto", "--text", text, "--device", "cpu"]
    call += ["--sequence_length", "32", "--output", str(out)]
    assert main([*call, "--teacher", str(inputs / "teacher")]) == 0
    found = LengthReport.from_dict(json.loads((out / "by_length.json").read_text()))
    assert found.trained == 32 and found.texts() == ["news.txt"] and found.reference == TEACHER
    assert found.names() == [TEACHER, f"{TEACHER}, {MATCHED}", STUDENT, SOFTMAX_ARM, LINEAR_ARM]
    assert found.figure("news.txt", STUDENT, 8) and (out / "by_length.png").is_file()
    assert "Perplexity by length, trained at 32: news.txt" in capsys.readouterr().out
    assert main([*call, "--max_tokens", "80"]) == 0, "the weights were trained: without the teacher, its own"
    found = LengthReport.from_dict(json.loads((out / "by_length.json").read_text()))
    assert found.reference == OWN_WEIGHTS and {figure.times for figure in found.figures} == {1}
    for wrong in ("1k,2k", "1", "long"):
        assert main(["evaluate", str(tmp_path / "out"), "--by_length", wrong]) == 2
    capsys.readouterr()
    assert main(["evaluate", str(inputs / "teacher"), "--by_length", "auto"]) == 2
    assert "no record of a trained length" in capsys.readouterr().err


def test_a_yardstick_of_the_same_steps(inputs, tmp_path, monkeypatch):
    """Trained on the way, measured, and gone again: the student is what it is without one."""
    settings = run_settings(inputs, tmp_path, without=["transfer"], length_tokens=128, foreign_texts=None)
    settings |= {"yardstick": "same_tokens"}
    name = f"{TEACHER} + the same LoRA steps"
    result = linearize.run(settings)
    found = result.report.by_length
    assert found.reference == name and found.names()[:3] == [name, f"{name}, {MATCHED}", STUDENT]
    assert result.report.row(name).nll < result.report.row(TEACHER).nll
    assert (tmp_path / "out" / "yardstick" / "adapter_config.json").is_file()
    assert not (tmp_path / "out" / "final" / "yardstick").exists()
    plain = linearize.run(run_settings(inputs, tmp_path / "plain", without=["transfer"], foreign_texts=None))
    assert result.report.row(STUDENT).nll == pytest.approx(plain.report.row(STUDENT).nll, abs=1e-6)
    with pytest.raises(UserError, match="yardstick trains the teacher as .* and no stage trains weights"):
        resolve_run(settings | {"stages": {"transfer": {"kind": "transfer", "max_steps": 1}}})
    # Resumed after its end, nothing is trained or measured again.
    monkeypatch.setattr("linearize.stages.finetuning.finetune", None)
    linearize.run(settings | {"resume_from_checkpoint": True})
