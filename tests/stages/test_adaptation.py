"""Scalers fitted to statistics: from a teacher's moments, and from one cell to another."""

import math

import pytest
import torch
from tiny_models import make_student, make_teacher

from linearize.conversion.gain_cells import Moments
from linearize.errors import UserError
from linearize.evaluation import perplexity
from linearize.stages.adaptation import (
    AdaptationConfig,
    adapt_scalers,
    collect_statistics,
    load_statistics,
    plot_adaptation,
    save_statistics,
    scalers_of,
    start_from_moments,
)

CELL = {"tile": 8, "score_saturation": 20.0, "output_saturation": 10.0}


def make(kind, **cell):
    settings = {"type": "gain_cell", "window": 32, "cell": {**CELL, **cell}, "cell_kind": kind}
    return make_student(make_teacher(num_hidden_layers=4), {"gain_cell": settings})


@pytest.fixture
def blocks():
    ids = torch.randint(3, 97, (6, 48), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.fixture
def linear(blocks):
    model = make("linear")
    start_from_moments(model, blocks, batch_size=3)
    return model


def copy_scalers(source, target):
    target.load_mixer_state_dict(source.mixer_state_dict())


def test_moments_put_two_deviations_into_the_ranges(linear, blocks):
    """In the teacher's forward; layer 0 has the same inputs in the student's."""
    found = collect_statistics(linear, blocks, batch_size=2)
    for name, mean, std in (
        ("0.query_scaler", 0.5, 0.25),
        ("0.key_scaler", 0.45, 0.225),
        ("0.value_scaler", 0.45, 0.225),
    ):
        assert (found[name].mean - mean).abs().max() < 1e-5 and (found[name].std - std).abs().max() < 1e-5


@torch.no_grad()
def test_outputs_are_the_least_squares_fit(linear, blocks):
    """No other scale and offset of a head comes closer to the teacher's output in the first layer."""
    attention = linear.mixer_attentions()[0]
    seen = {}
    attention.observer = lambda _, q, k, v, output, mask: seen.update(inputs=(q, k, v), teacher=output)
    ids = torch.stack([block["input_ids"] for block in blocks])
    with linear.use_arm("teacher"):
        linear(ids)
    attention.observer = None

    def distance():
        return (attention.mixer(*seen["inputs"]) - seen["teacher"]).square().sum((0, 2, 3))

    least, scaler = distance(), attention.mixer.output_scaler
    for parameter in (scaler.scale, scaler.offset):
        for step in (-0.02, 0.02):
            parameter.add_(step)
            assert (distance() > least).all()
            parameter.sub_(step)


def test_statistics_do_not_depend_on_the_batches(linear, blocks):
    one, all_ = (collect_statistics(linear, blocks, batch_size=size) for size in (1, 6))
    assert all(torch.allclose(a, b, atol=1e-6) for name in one for a, b in zip(one[name], all_[name], strict=True))


def test_adaptation_makes_the_nonlinear_cell_look_like_the_linear_one(linear, blocks, tmp_path):
    targets = collect_statistics(linear, blocks, batch_size=6)
    nonlinear = make("nonlinear")
    copy_scalers(linear, nonlinear)
    steps = []
    report = adapt_scalers(
        nonlinear, targets, blocks, AdaptationConfig(batch_size=6), on_step=lambda *step: steps.append(step)
    )
    assert report.converged and report.residuals[report.best] <= 1e-3 < report.residuals[0]
    assert len(steps) == len(report.residuals) <= 30
    found = collect_statistics(nonlinear, blocks, batch_size=6)
    for name, (mean, std) in targets.items():
        assert (found[name].mean - mean).abs().max() <= 2e-3 * std.max()
        assert (found[name].std - std).abs().max() <= 2e-3 * std.max()
    assert set(report.layers) == {0, 1, 2, 3} and set(report.layers[0]) == {
        "query_scaler", "key_scaler", "value_scaler", "output_scaler",
    }  # fmt: skip
    assert math.isclose(report.losses[0], report.losses[0]) and report.losses[-1] > 0
    plot_adaptation(report, tmp_path / "adaptation.png")
    assert (tmp_path / "adaptation.png").stat().st_size > 5000


def test_the_same_cell_needs_no_step(linear, blocks):
    report = adapt_scalers(linear, collect_statistics(linear, blocks), blocks)
    assert report.converged and report.residuals == [report.residuals[0]] and report.residuals[0] < 1e-6


def test_scalers_far_off_come_back(linear, blocks):
    targets, expected = collect_statistics(linear, blocks), perplexity(linear, blocks).perplexity
    with torch.no_grad():
        for scaler in scalers_of(linear).values():
            scaler.scale.mul_(0.2)
            scaler.offset.add_(0.3)
    report = adapt_scalers(linear, targets, blocks)
    assert report.converged
    assert perplexity(linear, blocks).perplexity == pytest.approx(expected, rel=0.02)


def test_impossible_targets_leave_the_best_scalers(linear, blocks):
    """No convergence: the report says so, and the model is no worse than before."""
    targets = collect_statistics(linear, blocks)
    targets["1.output_scaler"] = Moments(targets["1.output_scaler"].mean, 1e6 * targets["1.output_scaler"].std)
    report = adapt_scalers(linear, targets, blocks, AdaptationConfig(iterations=6, tolerance=1e-9, patience=3))
    assert not report.converged and len(report.residuals) <= 7
    assert report.residuals[report.best] == min(report.residuals)
    assert all(torch.isfinite(x).all() for x in linear.mixer_state_dict().values())


def test_saved_statistics_come_back(linear, blocks, tmp_path):
    statistics = collect_statistics(linear, blocks)
    save_statistics(statistics, tmp_path)
    again = load_statistics(tmp_path)
    assert set(again) == set(statistics)
    assert all(torch.equal(a, b) for name in again for a, b in zip(again[name], statistics[name], strict=True))


def test_bad_input_is_one_sentence(linear, blocks, tmp_path):
    targets = collect_statistics(linear, blocks)
    silent = {name: Moments(m.mean, torch.zeros_like(m.std)) for name, m in targets.items()}
    cases = [
        (lambda: load_statistics(tmp_path / "none"), "collect the statistics"),
        (lambda: adapt_scalers(linear, silent, blocks), "all 0"),
        (lambda: adapt_scalers(linear, {"0.key_scaler": targets["0.key_scaler"]}, blocks), "another model"),
        (lambda: scalers_of(make_student(make_teacher())), "no gain-cell layer"),
        (lambda: scalers_of(make_teacher()), "no gain-cell layer"),
        (lambda: AdaptationConfig(damping=0.0), "damping"),
        (lambda: AdaptationConfig(iterations=0), "iterations"),
    ]
    for call, sentence in cases:
        with pytest.raises(UserError, match=sentence) as caught:
            call()
        assert "\n" not in str(caught.value)
