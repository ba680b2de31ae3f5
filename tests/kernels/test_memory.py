"""The chunked path's memory grows with the length, not with its square (2k, 8k and 32k: docs/results.md)."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "measure_op_memory.py"


def bytes_per_token(length: int) -> float:
    command = [sys.executable, str(SCRIPT), "--one", f"{length},train"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / length


def test_memory_is_linear_in_length():
    assert bytes_per_token(8192) <= 1.1 * bytes_per_token(2048)
