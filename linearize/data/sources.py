"""Where the text comes from: local files and Hub datasets, read record by record.

A `.txt` file is one document (blank lines separate paragraphs, not documents); a `.jsonl`, `.json` or `.parquet` file
holds a document in each record. Every kind may be compressed with gzip. `datasets` is needed for Hub datasets only.
"""

import codecs
import contextlib
import glob
import gzip
import hashlib
import io
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearize.errors import UserError
from linearize.paths import user_path

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
FILE_KINDS = (".txt", ".jsonl", ".json", ".parquet")
_HUB_ID = re.compile(r"^[\w.\-]+(/[\w.\-]+)?$")

Record = tuple[str, dict[str, Any]]
"""A record's place, for error messages, and its fields."""


@dataclass(frozen=True)
class TextFile:
    """The text of a `.txt` file, read from the start on each call; it stands in its record's text field."""

    path: Path

    def pieces(self) -> Iterator[str]:
        """Its parts in order, so that a long file needs little memory.

        Raises:
            UserError: It cannot be read, or is not UTF-8.
        """
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        seen, carried = 0, ""
        with _opened(self.path) as stream:
            while True:
                chunk = stream.read(_CHUNK_BYTES)
                try:
                    text = carried + decoder.decode(chunk, final=not chunk)
                except UnicodeDecodeError as error:
                    place = seen + len(chunk) - len(error.object) + error.start
                    raise UserError(f"{self.path} is not UTF-8 text (byte {place}): convert it to UTF-8.") from error
                seen += len(chunk)
                carried = "\r" if chunk and text.endswith("\r") else ""  # its line feed may come next
                yield text.removesuffix(carried).replace("\r\n", "\n")
                if not chunk:
                    return


@dataclass(frozen=True)
class Source:
    """Records to be made into documents."""

    name: str
    """How messages call it."""
    identity: str
    """Changes whenever the content does; part of the cache's key."""
    records: Callable[[], Iterator[Record]]
    """Reads from the start on each call."""

    def fields(self) -> list[str]:
        """Names of the first record's fields."""
        for _, record in self.records():
            return list(record)
        raise UserError(f"{self.name} is empty: give data that holds text.")


def require_field(record: dict[str, Any], field: str, where: str) -> Any:
    """What a field of a record holds."""
    if field not in record:
        raise UserError(f"There is no field {field!r} in {where}; its fields are {', '.join(sorted(record))}.")
    return record[field]


def string_field(record: dict[str, Any], field: str, where: str) -> str:
    """The text in a field of a record; none counts as empty."""
    return "".join(text_pieces(record, field, where))


def text_pieces(record: dict[str, Any], field: str, where: str) -> Iterable[str]:
    """The text in a field of a record, in the pieces that it is read in; none counts as empty."""
    value = require_field(record, field, where)
    if isinstance(value, TextFile):
        return value.pieces()
    if value is not None and not isinstance(value, str):
        raise UserError(f"The field {field!r} in {where} is a {type(value).__name__}, but it must be text.")
    return [value or ""]


def open_source(
    dataset: str | Path | Sequence[str | Path],
    *,
    dataset_config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    text_field: str = "text",
) -> Source:
    """Open local files (paths, patterns, folders, or a list of them) or one Hub dataset."""
    names = [dataset] if isinstance(dataset, str | Path) else list(dataset)
    if not names:
        raise UserError("No data were given: set data.dataset to a file or to a dataset on the Hub.")
    if len(names) == 1 and isinstance(names[0], str) and not is_local(names[0]):
        return _open_hub(names[0], dataset_config, split, revision)
    return open_files(names, text_field)


def is_local(name: str | Path) -> bool:
    """Whether a name means files rather than a dataset on the Hub or a split of one."""
    text = user_path(name)
    return (
        isinstance(name, Path)
        or text.startswith(("/", "./", "../", "~"))
        or "*" in text
        or "?" in text
        or _kind(Path(text)) in FILE_KINDS
        or Path(text).exists()
    )


def open_files(paths: Sequence[str | Path], text_field: str = "text") -> Source:
    """Open local files; the text of a `.txt` file appears in the field `text_field`."""
    files = [file for path in paths for file in expand(path)]
    for file in files:
        if file.stat().st_size == 0:
            if len(files) == 1:
                raise UserError(f"The data file {file} is empty: give a file that holds text.")
            logger.warning("The data file %s is empty and is left out.", file)
    files = [file for file in files if file.stat().st_size]
    if not files:
        raise UserError(f"The data files {_join(paths)} are empty: give files that hold text.")

    def records() -> Iterator[Record]:
        for file in files:
            yield from _read_file(file, text_field)

    name = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    identity = json.dumps([[_kind(file), _file_hash(file)] for file in files])
    return Source(name, hashlib.sha256(identity.encode()).hexdigest(), records)


def expand(path: str | Path) -> list[Path]:
    """The data files that a path, a folder or a pattern names."""
    expanded = Path(user_path(path))
    if expanded.is_dir():
        files = sorted(file for file in expanded.iterdir() if file.is_file() and _kind(file) in FILE_KINDS)
        if not files:
            raise UserError(f"The folder {path} holds no {', '.join(FILE_KINDS)} files: give one that does.")
        return files
    if expanded.exists():
        files = [expanded]
    elif glob.has_magic(str(path)):
        files = [Path(file) for file in sorted(glob.glob(str(expanded), recursive=True)) if Path(file).is_file()]
        if not files:
            raise UserError(f"No data file matches {path}: check the pattern.")
    else:
        raise UserError(f"The data file {path} does not exist: check the path.")
    for file in files:
        if _kind(file) not in FILE_KINDS:
            raise UserError(
                f"{file} is not of a kind that can be read: give {', '.join(FILE_KINDS)}, or one with .gz."
            )
    return files


def _kind(path: Path) -> str:
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def _join(paths: Sequence[str | Path]) -> str:
    return ", ".join(str(path) for path in paths)


def _file_hash(file: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(file, "rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise UserError(f"The data file {file} cannot be read: {error.strerror}.") from error
    return digest.hexdigest()


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The bytes of a file, compressed or not; errors in what it holds become sentences."""
    try:
        with gzip.open(file, "rb") if file.name.lower().endswith(".gz") else open(file, "rb") as stream:
            yield stream
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file} is not a complete gzip file: compress or copy it again.") from error


def _read_file(file: Path, text_field: str) -> Iterator[Record]:
    kind = _kind(file)
    if kind == ".txt":
        yield str(file), {text_field: TextFile(file)}
        return
    try:
        with _opened(file) as stream:
            if kind == ".jsonl":
                yield from _json_lines(stream, file)
            elif kind == ".json":
                yield from _json_document(stream.read(), file)
            else:
                yield from _parquet_rows(stream, file)
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start}): convert it to UTF-8.") from error


def _json_lines(lines: Any, file: Path) -> Iterator[Record]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"Line {number} of {file} is not valid JSON ({error}): mend or remove it.") from error
        if not isinstance(record, dict):
            raise UserError(f"Line {number} of {file} is not a JSON object: each line must be one, with named fields.")
        if _ESCAPED_SURROGATE.search(line):
            record = _whole(record, f"line {number} of {file}", file)
        yield f"line {number} of {file}", record


def _mended(value: Any) -> Any:
    """The value with U+FFFD for each half of a surrogate pair, which JSON can write and no tokenizer takes."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, dict):
        return {name: _mended(part) for name, part in value.items()}
    return [_mended(part) for part in value] if isinstance(value, list) else value


def _whole(record: dict[str, Any], place: str, file: Path) -> dict[str, Any]:
    """The record, mended where it holds halves of surrogate pairs."""
    mended = _mended(record)
    if mended != record:
        _warn_once(str(file), place)
    return mended


_told: set[str] = set()


def _warn_once(file: str, place: str) -> None:
    if file not in _told:
        _told.add(file)
        logger.warning(
            "There is half a surrogate pair in %s: it is read as U+FFFD, as are all later ones of the file.", place
        )


def _json_document(content: bytes, file: Path) -> Iterator[Record]:
    """Read a list of objects, or one object whose field "data" is such a list, or one object a line."""
    try:
        records = json.loads(content)
    except ValueError as error:
        # Several published datasets give the name .json to files with an object in each line.
        if content.lstrip()[:1] == b"{":
            yield from _json_lines(io.BytesIO(content), file)
            return
        raise UserError(f"{file} is not valid JSON ({error}): mend it, or give another file.") from error
    if isinstance(records, dict):
        records = records["data"] if isinstance(records.get("data"), list) else [records]
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{file} does not hold a list of JSON objects: give one object for each document.")
    halves = _ESCAPED_SURROGATE.search(content) is not None
    for number, record in enumerate(records, start=1):
        if halves:
            record = _whole(record, f"record {number} of {file}", file)
        yield f"record {number} of {file}", record


def _parquet_rows(stream: Any, file: Path) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise UserError(f"Reading {file} needs pyarrow: install it, or give the data as .jsonl.") from error
    seekable = io.BytesIO(stream.read()) if isinstance(stream, gzip.GzipFile) else stream
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(seekable).iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                number += 1
                yield f"row {number} of {file}", record
    except pyarrow.ArrowException as error:
        raise UserError(f"{file} is not a valid Parquet file ({_first_line(error)}): write it again.") from error


def _open_hub(name: str, dataset_config: str | None, split: str, revision: str | None) -> Source:
    if not _HUB_ID.match(name):
        raise UserError(
            f"{name!r} is neither a file nor the id of a dataset on the Hub (owner/name): check data.dataset."
        )
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UserError(
            f"The Hub dataset {name} needs the package datasets: install it, or give local .txt or .jsonl files."
        ) from error
    try:
        rows = datasets.load_dataset(name, dataset_config, split=split, revision=revision)
    except Exception as error:
        raise _hub_error(name, revision, error) from error
    # The checksums' addresses carry the commit, so they name the content wherever it was downloaded to.
    content = sorted((rows.info.download_checksums or {}).items()) or rows._fingerprint
    identity = json.dumps([name, dataset_config, split, len(rows), content], default=str)

    def records() -> Iterator[Record]:
        for number, row in enumerate(rows):
            yield f"row {number} of {name}", row

    return Source(f"{name} ({split})", hashlib.sha256(identity.encode()).hexdigest(), records)


def _hub_error(name: str, revision: str | None, error: Exception) -> UserError:
    """One sentence for what `datasets.load_dataset` raised; errors of other kinds keep their own words."""
    from datasets.exceptions import DatasetNotFoundError

    message = _first_line(error)
    if isinstance(error, DatasetNotFoundError):
        if "gated" in str(error):
            return UserError(
                f"The dataset {name} is gated: accept its terms on the Hub, and log in with `hf auth login`."
            )
        place = f" at revision {revision}" if revision else ""
        return UserError(
            f"No dataset {name}{place} was found on the Hub, and no such file exists here: check the name, or log in "
            "with `hf auth login` if it is private."
        )
    if isinstance(error, ConnectionError | TimeoutError):
        return UserError(
            f"The Hub could not be reached for the dataset {name}, and it is not in the local cache: check the "
            "network, or set data.dataset to local .txt, .jsonl or .parquet files."
        )
    return UserError(
        f"The dataset {name} could not be loaded ({message}): check its name, configuration, split and revision."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
