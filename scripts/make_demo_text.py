"""Make the demo's text: public-domain English prose out of four Debian packages, one document a line.

    apt-get download jargon-text dict-devil sword-text-web r-cran-janeaustenr      # in an empty folder
    python scripts/make_demo_text.py FOLDER                                        # needs dpkg-deb

Writes linearize/demo_text/{train,validation}.jsonl.gz. The two splits come from different works (for the Jargon File,
from its lexicon and its appendices). Line wraps, markup, verse and tables are dropped. The same packages give the
same text.
"""

import argparse
import gzip
import json
import random
import re
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jargon-text", "dict-devil", "sword-text-web", "r-cran-janeaustenr")
DOCUMENT_CHARACTERS = 8000  # short entries are joined, and long chapters split, to about this length

AUSTEN = ("emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice", "sensesensibility")
AUSTEN_TRAIN = {"sensesensibility": "Sense and Sensibility"}
AUSTEN_VALIDATION = {"persuasion": "Persuasion"}
WEB_TRAIN = {"Gen": "Genesis", "Ruth": "Ruth", "1Sam": "First Samuel", "Jonah": "Jonah", "Luke": "Luke"}
WEB_VALIDATION = {"Acts": "Acts"}
VALIDATION_DOCUMENTS = 8  # of each work


def join_lines(lines: Iterable[str]) -> str:
    return re.sub(r"\s+", " ", " ".join(lines)).strip()


def paragraphs(lines: Iterable[str]) -> Iterator[list[str]]:
    """Groups of lines between blank ones."""
    group: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            group.append(line)
        elif group:
            yield group
            group = []


def is_prose(text: str) -> bool:
    """Whether a paragraph reads as sentences: no table, listing, heading or list of names."""
    letters = sum(character.isalpha() or character == " " for character in text)
    return len(text) > 40 and letters > 0.9 * len(text) and re.search(r"[.!?:;”’\")\]]$", text) is not None


def documents(source: str, texts: Iterable[str]) -> Iterator[dict[str, str]]:
    """Paragraphs joined to documents of about `DOCUMENT_CHARACTERS`."""
    group: list[str] = []
    for text in texts:
        group.append(text)
        if sum(map(len, group)) > DOCUMENT_CHARACTERS:
            yield {"source": source, "text": "\n\n".join(group)}
            group = []
    if sum(map(len, group)) > DOCUMENT_CHARACTERS // 4:
        yield {"source": source, "text": "\n\n".join(group)}


def jargon_file(root: Path) -> tuple[list[dict], list[dict]]:
    """Introduction and lexicon; and the appendices."""
    archive = root / "usr/share/doc/jargon-text/jargon.txt.gz"
    lines = gzip.decompress(archive.read_bytes()).decode().replace("\xa0", " ").splitlines()
    start, glossary, appendices, end = (
        max(i for i, line in enumerate(lines) if line.startswith(name))
        for name in ("Chapter 1. ", "Glossary", "Appendix A. ", "Bibliography")
    )

    def read(part: list[str]) -> Iterator[str]:
        entry = ""
        for group in paragraphs(part):
            text = join_lines(group)
            headword = re.fullmatch(r":(.+?):(.*)", text)
            if headword:
                word_class = re.findall(r"(?:\b(?:n|v|vt|vi|adj|adv|interj|suff|pref|prov)\.(?:,\s)?)+", headword[2])
                entry = ", ".join([headword[1], *word_class[:1]])
            elif is_prose(text):
                yield (f"{entry} — " if entry else "") + re.sub(r"[{}]|\s*<\S+@\S+>", "", text)
                entry = ""

    version = "Jargon File 4.4.7"
    train = [*documents(version, read(lines[start:glossary])), *documents(version, read(lines[glossary:appendices]))]
    return train, list(documents(f"{version}, appendices", read(lines[appendices:end])))


def devils_dictionary(root: Path) -> list[dict]:
    """The definitions, without their verses."""
    text = gzip.decompress((root / "usr/share/dictd/devil.dict.dz").read_bytes()).decode("utf-8", "replace")
    entries = text[text.index("ABASEMENT, n.") :].splitlines()
    prose = (join_lines(group) for group in paragraphs(entries) if not group[0].startswith("   "))
    return list(documents("Ambrose Bierce, The Devil's Dictionary", filter(is_prose, prose)))


def world_english_bible(root: Path, books: dict[str, str]) -> list[dict]:
    """Chapters of `books` (OSIS id to title) without notes and headings, from a SWORD zText module."""
    module = root / "usr/share/sword/modules/texts/ztext/engWEB2015eb"
    text = ""
    for testament in ("ot", "nt"):
        index, data = (module / f"{testament}.bzs").read_bytes(), (module / f"{testament}.bzz").read_bytes()
        for offset, size, _ in struct.iter_unpack("<III", index):
            text += zlib.decompress(data[offset : offset + size]).decode() if size else ""
    text = re.sub(r"<note\b.*?</note>|<title\b.*?</title>", " ", text, flags=re.DOTALL)
    found = []
    for book, title in books.items():
        chapters = re.findall(
            rf'<chapter [^>]*sID="{book}\.\d+"/>(.*?)<chapter [^>]*eID="{book}\.\d+"', text, re.DOTALL
        )
        assert chapters, book
        prose = []
        for chapter in chapters:
            for paragraph in re.split(r'<div [^>]*type="x-p"/>', chapter):
                plain = join_lines([re.sub(r"<[^>]*>", " " if "<l " in paragraph else "", paragraph)])
                prose.append(re.sub(r"\s+(?=[,.;:?!’”)])|(?<=[‘“(])\s+", "", plain))
        found += documents(f"World English Bible, {title}", filter(is_prose, prose))
    return found


def austen(root: Path, novels: dict[str, str]) -> list[dict]:
    """Chapters of `novels` (name in the package to title), from R's lazy-load database."""
    database = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    found, offset = [], 0
    for name in AUSTEN:  # the order in which they are stored
        block, size = next_block(database, offset)
        offset += size
        if name in novels:
            text = [re.sub(r"_", "", join_lines(group)) for group in paragraphs(r_strings(block))]
            found += documents(f"Jane Austen, {novels[name]}", filter(is_prose, text))
    return found


def next_block(database: bytes, offset: int) -> tuple[bytes, int]:
    """The decompressed block at `offset` (4 bytes of its length, then a zlib stream) and its stored size in bytes."""
    stream = zlib.decompressobj()
    block = stream.decompress(database[offset + 4 :])
    assert len(block) == int.from_bytes(database[offset : offset + 4], "big")
    return block, len(database) - offset - len(stream.unused_data)


def r_strings(block: bytes) -> list[str]:
    """The strings of a character vector in R's binary serialisation (type 16 of strings of type 9)."""
    header = 2 + 4 * 3  # "X\n" and three versions
    if int.from_bytes(block[2:6], "big") == 3:
        header += 4 + int.from_bytes(block[header : header + 4], "big")  # format 3 names its encoding
    assert block[header + 3] == 16
    count, offset, strings = int.from_bytes(block[header + 4 : header + 8], "big"), header + 8, []
    for _ in range(count):
        assert block[offset + 3] == 9
        length = int.from_bytes(block[offset + 4 : offset + 8], "big")
        strings.append(block[offset + 8 : offset + 8 + length].decode())
        offset += 8 + length
    return strings


def write(path: Path, rows: list[dict]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{path}: {len(rows)} documents, {len(text):,} characters, {path.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Folder with the four .deb files.")
    parser.add_argument("--output", type=Path, default=ROOT / "linearize" / "demo_text")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for package in PACKAGES:
            for archive in sorted(args.folder.glob(f"{package}_*.deb")) or [args.folder / f"{package}_VERSION.deb"]:
                subprocess.run(["dpkg-deb", "--extract", str(archive), scratch], check=True)
        root = Path(scratch)
        lexicon, appendices = jargon_file(root)
        train = [
            *lexicon,
            *devils_dictionary(root),
            *world_english_bible(root, WEB_TRAIN),
            *austen(root, AUSTEN_TRAIN),
        ]
        random.Random(0).shuffle(train)  # so that any part of the file holds all works
        works = (appendices, world_english_bible(root, WEB_VALIDATION), austen(root, AUSTEN_VALIDATION))
        turns = zip_longest(*(work[:VALIDATION_DOCUMENTS] for work in works))
        validation = [row for turn in turns for row in turn if row]
    args.output.mkdir(parents=True, exist_ok=True)
    write(args.output / "train.jsonl.gz", train)
    write(args.output / "validation.jsonl.gz", validation)


if __name__ == "__main__":
    main()
