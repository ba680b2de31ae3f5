"""Tiny GLUE: a teacher, its student, the nine tasks in local files, and the settings of a run on them."""

import csv
import json
import random

from tiny_runs import WORDS, make_bert_directory, make_bert_tokenizer

import linearize
from linearize.config.yaml_io import resolve
from linearize.evaluation.glue.data import KINDS
from linearize.evaluation.glue.settings import GlueRunConfig
from linearize.evaluation.glue.tasks import TASKS

MIXER = {"type": "linear", "window": 3, "sinks": 1}
KEYWORD = "snow"


def sentence(generator, keyword=None):
    words = generator.choices(WORDS, k=generator.randint(3, 7))
    return " ".join([*words, keyword] if keyword else words)


def examples(name, count, seed=0):
    """Rows of a task; a text with the keyword is of class 1, or a similarity of 5."""
    task, generator = TASKS[name], random.Random(seed)
    rows = []
    for number in range(count):
        label = number % task.num_labels if task.labels else 5.0 * (number % 2)
        texts = [sentence(generator, KEYWORD if label and not i else None) for i in range(len(task.columns))]
        rows.append({**dict(zip(task.columns, texts, strict=True)), "label": label, "idx": number})
    return rows


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    return path


def write_task(root, name, kind=".jsonl", train=40, validation=12):
    for split in ("train", *TASKS[name].validation):
        rows = examples(name, train if split == "train" else validation, seed=len(split))
        write_rows(root / name / f"{split}{kind}", rows)


def make_inputs(root):
    """A teacher, its student, and all tasks in files of all kinds."""
    make_bert_directory(root / "teacher")
    linearize.convert(root / "teacher", MIXER).save_pretrained(root / "student")
    make_bert_tokenizer().save_pretrained(root / "student")
    for number, name in enumerate(TASKS):
        write_task(root / "files", name, KINDS[number % len(KINDS)])
    return root


def settings(inputs, output, **changes):
    values = {
        "models": [str(inputs / "teacher"), str(inputs / "student")],
        "output_dir": str(output),
        "device": "cpu",
        "tasks": ["sst2"],
        "seeds": [0],
        "data": {"dataset": str(inputs / "files"), "sequence_length": 32},
        "training": {"batch_size": 8, "max_steps": 1, "logging_steps": 1},
    }
    return resolve(values, {key.replace("__", "."): value for key, value in changes.items()}, settings=GlueRunConfig)
