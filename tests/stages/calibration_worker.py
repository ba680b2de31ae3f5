"""Calibrates a tiny model and writes its mechanism: what test_calibration.py starts as two processes.

torchrun --nproc_per_node 2 tests/stages/calibration_worker.py OUT.safetensors SEQUENCES
"""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import make_student, make_teacher

from linearize.stages.calibration import calibrate


def run(sequences: int):
    """The mechanism's tensors after a calibration on the first `sequences` of 5 random ones, in float64."""
    ids = torch.randint(3, 97, (5, 40), generator=torch.Generator().manual_seed(5))
    student = make_student(make_teacher(), {"cosine": {"type": "cosine", "window": 4, "sinks": 1}}).double()
    calibrate(student, [{"input_ids": row} for row in ids], sequences)
    return student.mixer_state_dict()


if __name__ == "__main__":
    state = PartialState(cpu=True)
    tensors = run(int(sys.argv[2]))
    path = Path(sys.argv[1])
    save_file(tensors, path.with_stem(f"{path.stem}-{state.process_index}"))
