"""From a teacher to a student: checkpoints, random weights, quantised bases. May import training, data and config.

students.py       convert; load a student, a stock model, a config, a tokenizer
random_models.py, own_tokenizers.py    models and tokenizers from nothing
quantization.py   4-bit and 8-bit bases
gguf_files.py     teachers in GGUF files
gain_cells.py     cells by name or file, and the statistics that scalers are fitted to
tensor_files.py   safetensors files, streamed
sources.py        a repository on this disk, and where it came from
importers/        one file for each published code
"""

from typing import TYPE_CHECKING

from linearize.lazy import on_first_use

if TYPE_CHECKING:
    from linearize.conversion.students import convert, load_student, load_tokenizer

__getattr__ = on_first_use(
    __name__,
    {
        ".students": ("convert", "load_student", "load_tokenizer"),
    },
)

__all__ = [
    "convert",
    "load_student",
    "load_tokenizer",
]
