"""What the attention of a model would cost on analog gain cells, beside a GPU measured on the spot."""

from linearize.hardware.estimate import Figure, HardwareEstimate, LayerEstimate, estimate_hardware
from linearize.hardware.gpu import GpuDecode, measure_decode
from linearize.hardware.report import HardwareReport, hardware_report

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
