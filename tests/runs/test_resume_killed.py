"""Runs that are killed (kill -9) in every kind of stage and between them, again and again, end as if they had not."""

import json
import random

import kill_toys
import pytest
from safetensors.torch import load_file

from linearize.runs.directory import PARTIAL

MOMENTS = {
    kill_toys.lora: [
        "log yardstick 3",
        "after checkpoints/yardstick/step-4",
        "after logs/evaluation.json",
        "after logs/calibrate.json",
        "log transfer 3",
        "before transfer",
        "after transfer",
        "before checkpoints/finetune/step-2",
        "after adapter",
        "before final",
        "after final",
        "before report.json",
    ],
    kill_toys.chain: [
        "log yardstick 3",
        "before yardstick",
        "after yardstick",
        "log scalers 3",
        "after scalers",
        "log linear 1",
        "after linear",
        "before logs/adapted.json",
        "after logs/adapted.json",
        "after adapted",
        "log refined 3",
        "before refined",
        "after checkpoints/nonlinear/step-2",
        "after final",
    ],
    kill_toys.fitted: [
        "before logs/calibrate.json",
        "log landmark 3",
        "after landmark",
        "after logs/again.json",
        "before final",
        "after report.json",
    ],
    kill_toys.embeddings: [
        "log transfer 3",
        "after transfer",
        "log distillation 3",
        "after final",
        "before report.json",
    ],
    kill_toys.random_weights: ["before checkpoints/training/step-2", "log training 3", "before final", "after final"],
}
"""Run -> where it is killed, in this order: each time it is resumed from the time before."""
LENGTHS = ("seconds", "tokens_per_second", "peak_memory_bytes")
"""Figures of time, which a run that was killed may have others of."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("killed")
    kill_toys.make_inputs(root)
    return root


@pytest.fixture(scope="module")
def whole(inputs):
    """Output directory of a run that is not killed, made when it is asked for."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = inputs / f"{kind.__name__}-whole"
            assert kill_toys.run(kind, inputs, made[kind]) == 0
        return made[kind]

    return make


def without_times(value):
    if isinstance(value, dict):
        return {name: without_times(x) for name, x in value.items() if name not in LENGTHS}
    return [without_times(x) for x in value] if isinstance(value, list) else value


def lines(path):
    """The lines of a log, without times; one a step, as a run that is resumed at the end of a stage measures again."""
    records = [without_times(json.loads(line)) for line in path.read_text().splitlines()]
    return list({record["step"]: record for record in records}.values())


def same(found, expected):
    """The same weights, figures and logs, and nothing half-written beside them."""
    for path in expected.rglob("*.safetensors"):
        if "checkpoints" in path.parts:
            continue
        mine, theirs = load_file(found / path.relative_to(expected)), load_file(path)
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert mine[name].equal(tensor), (path, name)
    reports = [without_times(json.loads((root / "report.json").read_text())) for root in (found, expected)]
    assert reports[0] == reports[1]
    for path in (expected / "logs").glob("*.jsonl"):
        logs = [lines(root / "logs" / path.name) for root in (found, expected)]
        assert logs[0] == logs[1], path.name
    assert sorted(x.name for x in found.iterdir()) == sorted(x.name for x in expected.iterdir())
    assert not [x for x in found.rglob(".*") if PARTIAL.fullmatch(x.name)]


@pytest.mark.parametrize("kind", MOMENTS, ids=lambda kind: kind.__name__)
def test_a_run_that_is_killed_ends_as_if_it_had_not(kind, inputs, whole):
    output = inputs / f"{kind.__name__}-killed"
    for moment in MOMENTS[kind]:
        assert kill_toys.run(kind, inputs, output, moment, resume=True) == -9, moment
    assert kill_toys.run(kind, inputs, output, resume=True) == 0
    same(output, whole(kind))


@pytest.mark.parametrize("kind", MOMENTS, ids=lambda kind: kind.__name__)
def test_so_does_one_that_is_killed_at_random_moments(kind, inputs, whole):
    expected = whole(kind)
    moments = expected.with_suffix(".moments").read_text().splitlines()
    chosen = sorted(random.Random(kind.__name__).sample(range(len(moments)), 3))  # the same in every run
    print(chosen := [moments[number] for number in chosen])
    output = inputs / f"{kind.__name__}-random"
    codes = [kill_toys.run(kind, inputs, output, moment, resume=True) for moment in chosen]
    # Of a line that is there already a resumed run has no moment.
    assert codes[0] == -9 and set(codes) <= {-9, 0}, (chosen, codes)
    assert kill_toys.run(kind, inputs, output, resume=True) == 0
    same(output, expected)
