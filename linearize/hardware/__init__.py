"""What a model costs, from its shape. May import conversion and below.

state_bytes.py    bytes kept while generating
shape.py          the sizes of a decoder that its memory follows from
memory.py         peak memory of the stages of a run (memory_cosine.py); memory_full.py, of training all weights
estimate.py       the attention on analog gain cells; gpu.py, a GPU measured on the spot; report.py, both side by side
"""

from typing import TYPE_CHECKING

from linearize.lazy import on_first_use

if TYPE_CHECKING:
    from linearize.hardware.estimate import Figure, HardwareEstimate, LayerEstimate, estimate_hardware
    from linearize.hardware.gpu import GpuDecode, measure_decode
    from linearize.hardware.report import HardwareReport, hardware_report

__getattr__ = on_first_use(
    __name__,
    {
        ".estimate": ("Figure", "HardwareEstimate", "LayerEstimate", "estimate_hardware"),
        ".gpu": ("GpuDecode", "measure_decode"),
        ".report": ("HardwareReport", "hardware_report"),
    },
)

__all__ = [
    "Figure",
    "GpuDecode",
    "HardwareEstimate",
    "HardwareReport",
    "LayerEstimate",
    "estimate_hardware",
    "hardware_report",
    "measure_decode",
]
