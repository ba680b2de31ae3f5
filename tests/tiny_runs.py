"""A tiny local Llama with a tokenizer, some text, and the settings of a run on them that takes seconds."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

from tiny_models import make_teacher
from transformers import PreTrainedModel

WORDS = "the river ran past a small red house where two old cats slept in warm winter light and nobody spoke".split()
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def make_tokenizer(chat: bool = False):
    """A byte-level tokenizer of 512 entries: it can write anything."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=256
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def make_teacher_directory(
    path: Path, *, chat: bool = False, make: Callable[..., PreTrainedModel] = make_teacher, **changes
) -> Path:
    """A complete stock checkpoint: random weights, tokenizer, generation config."""
    tokenizer = make_tokenizer(chat)
    teacher = make(**{"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, **changes})
    teacher.generation_config.max_length = 64
    teacher.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def write_text(path: Path, documents: int = 60, seed: int = 0) -> Path:
    """A .jsonl file of random sentences."""
    generator = random.Random(seed)
    lines = [json.dumps({"text": " ".join(generator.choices(WORDS, k=40))}) for _ in range(documents)]
    path.write_text("\n".join(lines) + "\n")
    return path


def tiny_config(teacher: Path, text: Path, output: Path, cache: Path) -> dict:
    """Three steps of each stage on sequences of 32 tokens."""
    stage = {"max_steps": 3, "tokens_per_step": 64, "logging_steps": 1, "save_steps": 2}
    return {
        "model_name_or_path": str(teacher),
        "output_dir": str(output),
        "dtype": "float32",
        "device": "cpu",
        "attention": {"type": "linear", "window": 8, "sinks": 2},
        "data": {"dataset": str(text), "sequence_length": 32, "validation_documents": 6, "cache_dir": str(cache)},
        "transfer": dict(stage),
        "finetune": dict(stage),
        "evaluation": {"max_tokens": 256},
    }


BLOCK_PACKAGE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "linearize":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
"""
"""Runs first in a process that must not see the package, installed or not."""


def without_package(code: str) -> list[str]:
    """Arguments of a fresh Python process in which `import linearize` fails."""
    return [sys.executable, "-c", BLOCK_PACKAGE + code]
