"""`diff.json`: what a weight difference was made of, tensor by tensor and file by file, with checksums.

`docs/weight_diff.md` describes the fields.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from linearize.conversion.sources import Origin
from linearize.conversion.tensor_files import SAFETENSORS, Tensor, WeightFile, is_plain_path, parse_header
from linearize.errors import UserError

DIFF_FILE = "diff.json"
FORMAT = "linearize weight difference"
FORMAT_VERSION = 1
ENCODING = "xor"
EQUAL, DIFFERS, NEW, OTHER_FORM = KINDS = ("equal", "differs", "new", "other_form")
"""As in the base; stored as XOR with it; only in the converted model; of another shape or dtype than in the base."""
STORED = (DIFFERS, NEW, OTHER_FORM)
FROM_BASE = (EQUAL, DIFFERS)


@dataclass(frozen=True)
class TensorRecord:
    """How one tensor of the converted model comes back."""

    kind: str
    sha256: str
    """Of the tensor's bytes in the converted model."""
    base_sha256: str | None = None
    """Of the base's bytes, where they are used."""


@dataclass(frozen=True)
class FileRecord:
    """A file that is carried as it is."""

    size: int
    sha256: str


@dataclass
class DiffRecord:
    """The contents of `diff.json`."""

    base: Origin
    converted: Origin
    tensors: dict[str, TensorRecord]
    weights: list[WeightFile]
    """The converted model's weight files, whose headers are kept to the byte."""
    files: dict[str, FileRecord]
    base_only: list[str] = field(default_factory=list)
    not_carried: list[str] = field(default_factory=list)
    """Files of the converted repository that hold weights in another format."""

    def of_kind(self, *kinds: str) -> list[str]:
        """Names of the tensors of these kinds."""
        return [name for name, tensor in self.tensors.items() if tensor.kind in kinds]

    def to_json(self) -> bytes:
        """The file's bytes."""
        import linearize

        weights = [
            {"file": file.name, "header_sha256": sha256(file.header.encode()), "header": file.header}
            for file in self.weights
        ]
        values = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "linearize_version": linearize.__version__,
            "encoding": ENCODING,
            "base": asdict(self.base),
            "converted": asdict(self.converted),
            "weights": weights,
            "tensors": {name: _without_none(asdict(tensor)) for name, tensor in self.tensors.items()},
            "base_only": self.base_only,
            "files": {name: asdict(file) for name, file in self.files.items()},
            "not_carried": self.not_carried,
        }
        return json.dumps(values, indent=1, ensure_ascii=False).encode("utf-8")


def read_record(directory: Path, source: str) -> DiffRecord:
    """Read and check `diff.json`.

    Args:
        directory: of the diff.
        source: what the user called it, for the sentences.

    Raises:
        UserError: it is missing, damaged, or of another format or version.
    """
    path = directory / DIFF_FILE
    if not path.is_file():
        raise UserError(f"{source} has no {DIFF_FILE}: give what `linearize diff make` wrote")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError(f"its format is {values['format']!r}")
        version, encoding = values["format_version"], values["encoding"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise UserError(
                f"{source} is a diff of format {version}, and this linearize reads {FORMAT_VERSION}: update linearize"
            )
        if (version, encoding) != (FORMAT_VERSION, ENCODING):
            raise ValueError(f"format {version!r} with encoding {encoding!r} is unknown")
        return _record(values)
    except UserError:
        raise
    except KeyError as error:
        raise UserError(_damaged(source, f"{error.args[0]!r} is missing")) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(_damaged(source, str(error))) from error


def _damaged(source: str, reason: str) -> str:
    return f"{DIFF_FILE} of {source} is damaged ({' '.join(reason.split())}): download or make the diff again"


def _record(values: Mapping[str, Any]) -> DiffRecord:
    record = DiffRecord(
        base=Origin(**values["base"]),
        converted=Origin(**values["converted"]),
        tensors={name: TensorRecord(**tensor) for name, tensor in values["tensors"].items()},
        weights=[_weight_file(entry) for entry in values["weights"]],
        files={name: FileRecord(**file) for name, file in values["files"].items()},
        base_only=list(values["base_only"]),
        not_carried=list(values["not_carried"]),
    )
    names = [tensor.name for file in record.weights for tensor in file.tensors]
    if sorted(names) != sorted(record.tensors):
        raise ValueError("its headers name other tensors than its list")
    for name, tensor in record.tensors.items():
        if (
            tensor.kind not in KINDS
            or (tensor.kind in FROM_BASE and tensor.base_sha256 is None)
            or (tensor.kind == EQUAL and tensor.sha256 != tensor.base_sha256)
        ):
            raise ValueError(f"the entry of {name} makes no sense")
    paths: Sequence[Any] = [*record.files, *(file.name for file in record.weights)]
    if strange := [path for path in paths if not is_plain_path(path)]:
        raise ValueError(f"it names the file {strange[0]!r}")
    if len(set(paths)) != len(paths):
        raise ValueError("it names a file twice")
    return record


def _weight_file(entry: Mapping[str, Any]) -> WeightFile:
    name, header = entry["file"], entry["header"]
    if not name.endswith(SAFETENSORS) or sha256(header.encode("utf-8")) != entry["header_sha256"]:
        raise ValueError(f"the header of {name} is not the one that was written")
    return WeightFile(name, header, parse_header(header))


def stored_tensor(tensor: Tensor, kind: str) -> Tensor:
    """What the diff's files hold for a tensor.

    An XOR is bits and no numbers, so it is stored in unsigned integers of the tensor's width and shape; dtypes below
    a byte in plain bytes.
    """
    if kind != DIFFERS:
        return Tensor(tensor.name, tensor.dtype, tensor.shape, tensor.size)
    count = 1
    for extent in tensor.shape:
        count *= extent
    width = {count * bytes_each: bytes_each for bytes_each in (1, 2, 4, 8)}.get(tensor.size)
    dtype, shape = (f"U{8 * width}", tensor.shape) if width else ("U8", (tensor.size,))
    return Tensor(tensor.name, dtype, shape, tensor.size)


def sha256(data: bytes) -> str:
    """Hexadecimal digest."""
    return hashlib.sha256(data).hexdigest()


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
