"""Calibration of cosine attention: every head comes closer to the teacher, and what is cosine attention is found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import calibration_worker
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_bert, make_gpt2, make_gptj, make_mistral, make_student, make_teacher, perturb
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from linearize.errors import UserError
from linearize.stages.calibration import calibrate, calibrates, save_calibration

VARIANTS = {
    "window": {"window": 4, "sinks": 1},
    "pure": {"window": 0, "sinks": 0},
    "pure-no-gain": {"window": 0, "sinks": 0, "gain": False},
    "window-no-gain": {"window": 4, "sinks": 1, "gain": False},
    "key": {"window": 0, "sinks": 0, "scale_side": "key"},
    "key-window": {"window": 4, "sinks": 1, "scale_side": "key"},
    "map": {"window": 4, "sinks": 1, "feature_map": "softmax"},
}


def make(teacher, name, mixer_types=None, **changes):
    return make_student(teacher, {"cosine": {"type": "cosine", **VARIANTS[name], **changes}}, mixer_types)


def rows(count=6, length=40, padded=False):
    ids = torch.randint(3, 97, (count, length), generator=torch.Generator().manual_seed(3))
    masks = [(torch.arange(length) < length - 5 * i * padded).long() for i in range(count)]
    return [{"input_ids": row, "labels": row, "attention_mask": mask} for row, mask in zip(ids, masks, strict=True)]


@torch.no_grad()
def squared_errors(student, blocks):
    """Of every head, and of the teacher's outputs themselves: `(layers, 2, H)`."""
    found = {}

    def meter(attention, query, key, value, output, mask):
        student = attention.mix(query, key, value, mask)
        real = torch.ones_like(output[:, 0, :, 0], dtype=torch.bool) if mask is None else mask.bool()
        sums = [(x.double().square().sum(-1) * real[:, None]).sum((0, 2)) for x in (student - output, output)]
        found[attention.layer_idx] = found.get(attention.layer_idx, 0) + torch.stack(sums)

    for attention in student.mixer_attentions():
        attention.observer = meter
    with student.use_arm("teacher"):
        for row in blocks:
            student(input_ids=row["input_ids"][None], attention_mask=row["attention_mask"][None])
    for attention in student.mixer_attentions():
        attention.observer = None
    return torch.stack(list(found.values()))


MAKERS = (make_teacher, make_gpt2, make_gptj, make_mistral, make_bert)
PAIRS = [(make, name) for make in MAKERS for name in VARIANTS]
PAIRS.remove((make_bert, "key-window"))  # an encoder has no such form


@pytest.mark.parametrize("make_model, name", PAIRS)
def test_the_error_of_every_head_falls(make_model, name):
    student, blocks = make(make_model(), name), rows(padded=make_model is make_bert)
    before = squared_errors(student, blocks)
    report = calibrate(student, blocks, len(blocks), batch_size=4)
    after = squared_errors(student, blocks)
    assert (after[:, 0] < before[:, 0] * (1 + 1e-6)).all() and after[:, 0].sum() < 0.999 * before[:, 0].sum()
    for layer, (old, new) in enumerate(zip(before, after, strict=True)):
        assert report.before[layer] == pytest.approx(float(old[0].sum() / old[1].sum()), rel=1e-3)
        assert report.after[layer] == pytest.approx(float(new[0].sum() / new[1].sum()), rel=1e-3)
    assert report.sequences == 6 and len(report.values["exponents"][0]) == 4
    assert bool(report.values["gains"][0]) is VARIANTS[name].get("gain", True)
    assert bool(report.values["window_weights"][0]) is bool(VARIANTS[name]["window"])


@torch.no_grad()
@pytest.mark.parametrize("name", ["window", "pure", "key", "key-window", "pure-no-gain"])
def test_nothing_near_the_fit_is_better(name):
    """No other gain, window weight or exponent of a head comes closer to the teacher in the first layer."""
    student, blocks = make(make_teacher(num_hidden_layers=1), name), rows()
    calibrate(student, blocks, len(blocks))
    least = squared_errors(student, blocks)[0, 0]
    for parameter in student.mixer_attentions()[0].mixer.scales.parameters():
        for step in (-0.05, 0.05):
            before = parameter.clone()
            parameter.add_(step)
            assert (squared_errors(student, blocks)[0, 0] > least * (1 - 1e-6)).all()
            parameter.copy_(before)


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("name", ["window", "pure", "key", "map"])
def test_a_teacher_that_is_cosine_attention_is_recovered(name, causal, monkeypatch):
    make_model = make_teacher if causal else make_bert
    truth, student = make(make_model(), name), make(make_model(), name)
    generator = torch.Generator().manual_seed(5)
    for attention in truth.mixer_attentions():
        scales = attention.mixer.scales
        shape = scales.exponent_logit.shape
        weight = 0.5 + torch.rand(shape, generator=generator)
        gain = 1 + 3 * torch.rand(shape, generator=generator)
        scales.assign(0.1 + 0.8 * torch.rand(shape, generator=generator), gain, weight)
    truths = {attention.layer_idx: attention for attention in truth.mixer_attentions()}

    def attend(module, query, key, value, attention_mask, **kwargs):
        return truths[module.layer_idx].mix(query, key, value).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "cosine_truth", attend)
    student.config._attn_implementation = "cosine_truth"
    report = calibrate(student, rows(count=4, length=60), 4)
    assert all(error < 1e-6 for error in report.after.values()) and max(report.before.values()) > 0.01
    for attention in student.mixer_attentions():
        mine, theirs = attention.mixer.scales, truths[attention.layer_idx].mixer.scales
        at = 10 if causal else 55 if VARIANTS[name]["window"] else 60  # keys that a token sees
        scaled = [scales.gain * at ** -scales.exponent() for scales in (mine, theirs)]
        assert (scaled[0] / scaled[1] - 1).abs().max() < 2e-3
        if name in ("pure", "key") and not causal:  # every token sees 60 keys: the exponent has no meaning, and stays
            assert (mine.exponent() - 0.6225).abs().max() < 1e-6
        else:
            assert (mine.exponent() - theirs.exponent()).abs().max() < (1e-3 if causal else 5e-3)
        if mine.window_weight is not None:
            assert (mine.window_weight - theirs.window_weight).abs().max() < 2e-3


def test_batches_and_padding_do_not_matter():
    found = []
    for batch_size, padding in ((1, False), (3, False), (6, True)):
        blocks = rows()
        if padding:
            gap = torch.zeros(9, dtype=torch.long)
            blocks = [{name: torch.cat([x, gap]) for name, x in row.items()} for row in blocks]
        student = make(make_teacher(), "window")
        calibrate(student, blocks, len(blocks), batch_size=batch_size)
        found.append(torch.cat([x.flatten() for x in student.mixer_state_dict().values()]))
    assert torch.allclose(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert torch.allclose(found[2], found[0], rtol=1e-4, atol=1e-5)


def test_only_layers_with_a_calibration_change():
    mixers = {"cosine": {"type": "cosine", **VARIANTS["window"]}, "linear": {"type": "linear", "window": 4}}
    student = make_student(make_teacher(), mixers, ["linear", "cosine", "softmax"])
    assert calibrates(student.config) and calibrates(mixers["cosine"]) and not calibrates(mixers["linear"])
    before = {name: x.clone() for name, x in student.state_dict().items()}
    report = calibrate(student, rows(), 4)
    changed = {name for name, x in student.state_dict().items() if not torch.equal(x, before[name])}
    assert changed and all(name.startswith("model.layers.1.self_attn.mixer.scales.") for name in changed)
    assert list(report.before) == [1] and report.sequences == 4
    assert {attention.arm for attention in student.mixer_attentions()} == {"mixed"}


def test_texts_within_the_window_leave_the_cosine_branch_out():
    student = make(make_teacher(), "window", window=64)
    report = calibrate(student, rows(), 6)
    assert max(report.after.values()) < 1e-9
    for attention in student.mixer_attentions():
        assert not attention.mixer.scales.gain.any()
        assert (attention.mixer.scales.window_weight - 1).abs().max() < 1e-4


def test_the_report_is_written(tmp_path):
    report = calibrate(make(make_teacher(), "pure"), rows(), 6)
    save_calibration(report, tmp_path, "calibrate")
    written = json.loads((tmp_path / "logs" / "calibrate.json").read_text())
    assert written["sequences"] == 6 and len(written["values"]["exponents"]) == 3
    assert report.summary()["after"] < report.summary()["before"]
    assert report.sentence().startswith("calibration: 6 sequences, squared error")


def test_bad_input_is_one_sentence():
    student = make(make_teacher(), "window")
    perturb(student)
    with torch.no_grad():
        student.model.layers[1].self_attn.v_proj.weight.fill_(float("nan"))
    cases = [
        (lambda: calibrate(make_student(make_teacher()), rows(), 4), "no layer to calibrate"),
        (lambda: calibrate(make_teacher(), rows(), 4), "no layer to calibrate"),
        (lambda: calibrate(student, [], 4), "no sequence to look at"),
        (lambda: calibrate(student, rows(), 4), "layer 1 are not finite"),
    ]
    for call, sentence in cases:
        with pytest.raises(UserError, match=sentence) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sequences", [5, 1], ids=["unequal parts", "one has nothing"])
def test_two_processes_equal_one(sequences, tmp_path):
    worker = Path(calibration_worker.__file__)
    paths = [str(worker.parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(worker)]
    command += [str(tmp_path / "found.safetensors"), str(sequences)]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    one = calibration_worker.run(sequences)
    for rank in range(2):
        two = load_file(tmp_path / f"found-{rank}.safetensors")
        assert two.keys() == one.keys()
        assert all(torch.allclose(two[name], one[name], rtol=1e-6, atol=1e-9) for name in one)
