"""CONTRIBUTING.md, word for word: each guide's blocks go where their headings say, in a copy, and what they add is
used there (`contributing_worker.py`), the commands of the guide among it."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FOLDERS = ("linearize", "modeling", "kernels", "recipes", "scripts", "tests")
FILES = ("README.md", "pyproject.toml")
SECTIONS = {"stage": "Add a stage", "attention": "Add an attention", "backbone": "Add a backbone"}
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"\*\*`([^`\n]+)`\*\*(?:, (after|before|in place of) `([^\n]+)`)?:\n$")
COMMANDS = "bash"


@dataclass(frozen=True)
class Block:
    """A fenced block: into a file of its own, or beside or in place of a line that is there."""

    path: str
    how: str | None
    line: str | None
    code: str


def section(title):
    """The text of a guide."""
    return re.split(r"^## ", GUIDE.partition(f"\n## {title}\n")[2], flags=re.MULTILINE)[0]


def parse(text):
    """The blocks of a guide and its commands."""
    blocks, commands = [], []
    for found in FENCE.finditer(text):
        language, code = found.groups()
        if language == COMMANDS:
            commands += code.splitlines()
            continue
        heading = HEADING.search(text[: found.start()])
        assert heading, f"no heading says where this goes:\n{code}"
        blocks.append(Block(*heading.groups(), code))
    return blocks, commands


def apply(block, root):
    """Do what the heading of a block says."""
    path = root / block.path
    if block.how is None:
        assert not path.exists(), f"{block.path} is there already"
        path.write_text(block.code, encoding="utf-8")
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    places = [number for number, line in enumerate(lines) if line.strip() == block.line.strip()]
    assert len(places) == 1, f"{block.path} has the line {block.line} {len(places)} times"
    start = places[0] + (block.how == "after")
    lines[start : places[0] + (block.how != "before")] = [block.code]
    path.write_text("".join(lines), encoding="utf-8")


def follow(title, root):
    """A copy of the sources with what a guide adds; gives the commands that it ends with."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, root / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, root)
    blocks, commands = parse(section(title))
    for block in blocks:
        apply(block, root)
    return blocks, commands


@pytest.mark.parametrize("name", SECTIONS)
def test_what_the_guide_adds_works(name, tmp_path):
    blocks, commands = follow(SECTIONS[name], tmp_path)
    written = sorted({block.path for block in blocks if block.path.endswith(".py")})
    for check in (["check"], ["format", "--check"]):
        done = subprocess.run(["ruff", *check, *written], cwd=tmp_path, capture_output=True, text=True, env=paths())
        assert done.returncode == 0, done.stdout + done.stderr
    env = {**paths(), "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    worker = [sys.executable, str(tmp_path / "tests" / "contributing_worker.py"), name, *commands]
    done = subprocess.run(worker, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def paths():
    """The environment with this Python's programs."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def test_a_stage_is_one_file_and_one_line():
    blocks, _ = parse(section(SECTIONS["stage"]))
    code = [block for block in blocks if block.path.startswith("linearize/")]
    created, edited = ([block for block in code if (block.how is None) is new] for new in (True, False))
    assert len(created) == 1 and [len(block.code.splitlines()) for block in edited] == [1]


def test_every_file_and_test_that_the_guides_name_is_there():
    """What a guide adds aside."""
    added = {block.path for title in SECTIONS.values() for block in parse(section(title))[0] if block.how is None}
    prose = FENCE.sub("", GUIDE)
    named = set(re.findall(r"`((?:linearize|modeling|kernels|tests|recipes|scripts|docs)/[\w./]+\.\w+)`", prose))
    assert len(named) > 30
    assert [name for name in sorted(named - added) if not (ROOT / name).is_file()] == []
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    tests = set(re.findall(r"`(test_\w+)`", prose))
    assert tests and [name for name in sorted(tests) if f"def {name}(" not in code] == []
