"""Two processes give the losses of one process with the same micro-batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import distributed_worker
import pytest
import torch

WORKER = Path(distributed_worker.__file__)
STAGES = list(distributed_worker.STAGES)


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """The losses of two processes (one micro-batch each) and of one (accumulation 2), `{stage: {dtype: losses}}`."""
    output = tmp_path_factory.mktemp("distributed")
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(WORKER)]
    command += [str(output / "two"), *STAGES]
    finished = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr[-4000:]
    two = json.loads((output / "two" / "losses.json").read_text())
    checks = json.loads((output / "two" / "checks.json").read_text())
    return {"two": two, "one": distributed_worker.run(output / "one", STAGES), "checks": checks}


def test_statistics_are_those_of_one_process(losses, tmp_path):
    one, two = distributed_worker.statistics(tmp_path), losses["checks"]["statistics"]
    assert one.keys() == two.keys() and len(one) == 12
    for name, moments in one.items():
        torch.testing.assert_close(torch.tensor(two[name]), torch.tensor(moments), rtol=1e-5, atol=1e-7)


def test_layers_are_measured_as_by_one_process(losses, tmp_path):
    one, two = distributed_worker.selection(tmp_path), losses["checks"]["selection"]
    for name in ("error", "divergence"):
        torch.testing.assert_close(torch.tensor(two[name]), torch.tensor(one[name]), rtol=1e-9, atol=1e-12)
        assert min(map(min, one[name])) > 1e-6


def test_processes_resume_from_one_step_or_not_at_all(losses):
    found = losses["checks"]["disagreement"]
    assert found["step"] == 2
    assert len(found["said"]) == 2 and found["said"][0] == found["said"][1]
    assert "step-2, which another process cannot read" in found["said"][0]


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_equal_one(losses, stage, record_property, capsys):
    for dtype, tolerance in (("float64", 1e-6), ("float32", 1e-3)):
        two, one = (torch.tensor(losses[run][stage][dtype], dtype=torch.float64) for run in ("two", "one"))
        assert two.shape == one.shape and len(two) == distributed_worker.STEPS
        assert one.isfinite().all() and len(one.unique()) > distributed_worker.STEPS
        difference = (two - one).abs().max().item()
        record_property(f"{stage} {dtype} largest difference", difference)
        with capsys.disabled():
            print(f"\n{stage}, {dtype}: largest difference of a loss over {len(one)} steps {difference:.2e}")
        assert difference <= tolerance
