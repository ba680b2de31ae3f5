"""Tiny runs with every kind of stage, each in a process of its own that kills itself at a named moment.

A moment is `log STAGE STEP` (a line of a log is written), or `before FILE` or `after FILE`: a file or directory of the
run, by its path within it, takes its place. A process is forked from a server that has imported all that a run needs.
"""

import json
import multiprocessing
import os
import signal
from pathlib import Path

from tiny_runs import WORDS, make_bert_directory, make_teacher_directory, write_text

LITTLE = {"batch_size": 2, "tokens_per_step": 128, "logging_steps": 1, "save_steps": 2}
STEPS = {**LITTLE, "max_steps": 4}
FULL = {**STEPS, "learning_rate": 1e-3, "warmup_steps": 1, "eval_steps": 2}
CELL = {"tile": 8, "score_saturation": 20.0, "output_saturation": 10.0}


def make_inputs(root):
    """The checkpoints and texts of all runs here."""
    import random

    import torch

    torch.manual_seed(0)
    make_teacher_directory(root / "teacher")
    make_bert_directory(root / "bert", sentences=True)
    write_text(root / "text.jsonl")
    draw = random.Random(0)
    texts = ["".join(" ".join(draw.choices(WORDS, k=8)).capitalize() + ". " for _ in range(6)) for _ in range(60)]
    (root / "sentences.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def _config(root, output, stages, *, text="text.jsonl", **changes):
    data = {"dataset": str(root / text), "sequence_length": 32, "validation_documents": 6}
    if text == "sentences.jsonl":
        data["sentences_per_row"] = 3
    return {
        "output_dir": str(output),
        "device": "cpu",
        "seed": 3,
        "data": {**data, "cache_dir": str(root / "cache")},
        "stages": stages,
        "evaluation": {"max_tokens": 128, "length_tokens": 64},
        **changes,
    }


def lora(root, output):
    """Fitted numbers, transfer, adapters; the teacher gets adapters too."""
    stages = {
        "calibrate": {"kind": "calibrate", "sequences": 8},
        "transfer": {"kind": "transfer", **STEPS},
        "finetune": {"kind": "train", "weights": "lora", **STEPS, "learning_rate": 1e-3, "lora_dropout": 0.1},
    }
    attention = {"type": "cosine", "window": 8, "sinks": 2, "feature_map": "softmax"}
    start = {"model_name_or_path": str(root / "teacher"), "dtype": "bfloat16", "yardstick": "same_tokens"}
    return _config(root, output, stages, attention=attention, **start)


def chain(root, output):
    """All weights, another cell by statistics, the mechanism alone; the teacher is trained too."""
    stages = {
        "scalers": {"kind": "transfer", "branch": "mixed", **STEPS},
        "linear": {"kind": "train", "weights": "all", "teacher": "yardstick", **FULL},
        "adapted": {
            "kind": "adapt",
            "attention": {"cell_kind": "nonlinear"},
            **{"sequences": 6, "batch_size": 2, "iterations": 4},
        },
        "refined": {"kind": "train", "weights": "mechanism", "teacher": "linear", "labels_weight": 0, **FULL},
        "nonlinear": {"kind": "train", "weights": "all", "teacher": "base", **FULL, "max_steps": 2},
    }
    attention = {"type": "gain_cell", "window": 16, "cell": CELL, "cell_kind": "linear"}
    start = {"model_name_or_path": str(root / "teacher"), "yardstick": "same_tokens"}
    return _config(root, output, stages, attention=attention, **start)


def fitted(root, output):
    """All weights with random choices in the attention, then keys fitted anew at the end."""
    stages = {
        "calibrate": {"kind": "calibrate", "sequences": 8},
        "landmark": {"kind": "train", "weights": "all", "teacher": "base", **FULL},
        "again": {"kind": "calibrate", "sequences": 8},
    }
    attention = {"type": "landmark", "block_size": 8, "top_k": 2, "block_weight": "tokens"}
    attention |= {"block_dropout": 0.5, "block_dropout_rows": 0.5}
    return _config(root, output, stages, attention=attention, model_name_or_path=str(root / "teacher"))


def embeddings(root, output):
    """An encoder that learns a teacher's embeddings."""
    stages = {
        "transfer": {"kind": "transfer", "branch": "mixed", **STEPS},
        "distillation": {
            **{"kind": "train", "weights": "all", "objective": "embeddings"},
            **{**STEPS, "learning_rate": 1e-3, "warmup_steps": 1},
        },
    }
    attention = {"type": "cosine", "window": 0, "sinks": 0, "feature_map": "softmax"}
    start = {"model_name_or_path": str(root / "bert"), "evaluation": {"batch_size": 8, "pairs": 20}}
    return _config(root, output, stages, text="sentences.jsonl", attention=attention, **start)


def random_weights(root, output):
    """An encoder of random weights with its own tokenizer, by hidden tokens, with dropout."""
    shape = {"type": "bert", "n_layer": 2, "n_head": 2, "n_embd": 32, "dropout": 0.1}
    stages = {"training": {"kind": "train", "weights": "all", "objective": "masked", **FULL}}
    changes = {"architecture": shape, "tokenizer": {"source": "train", "vocab_size": 300}}
    attention = {"type": "cosine", "window": 0, "sinks": 0}
    return _config(root, output, stages, text="sentences.jsonl", attention=attention, **changes)


def killed_at(moment, output):
    """Make this process kill itself at a moment, the first time that it comes; without one, return the moments."""
    from linearize.training.log import TrainingLog

    write, replace, moments = TrainingLog.write, os.replace, []

    def at(name):
        moments.append(name)
        if name == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def write_and_tell(log, record):
        write(log, record)
        at(f"log {log.path.stem} {record['step']}")

    def replace_and_tell(source, target, **options):
        inside = Path(target).is_relative_to(output)
        name = Path(target).relative_to(output) if inside else ""
        if inside:
            at(f"before {name}")
        replace(source, target, **options)
        if inside:
            at(f"after {name}")

    TrainingLog.write, os.replace = write_and_tell, replace_and_tell
    return moments


def work(make, root, output, moment, resume):
    """One process: the run, which may be killed at a moment; its moments are left beside it."""
    import torch

    import linearize

    torch.set_num_threads(1)
    moments = killed_at(moment, Path(output))
    linearize.run({**make(Path(root), Path(output)), "resume_from_checkpoint": resume})
    Path(output).with_suffix(".moments").write_text("\n".join(moments))


def run(make, root, output, moment=None, *, resume=False, seconds=None):
    """A run in a process of its own, which is killed after some seconds where they are given; its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["linearize", "linearize.runs.engine", "linearize.modeling", "linearize.runs.ending"]
    )
    process = context.Process(target=work, args=(make, str(root), str(output), moment, resume))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode
