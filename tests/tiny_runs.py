"""A tiny local Llama with a tokenizer, some text, and the settings of a run on them that takes seconds."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

from tiny_models import make_bert, make_teacher
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


MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def make_bert_tokenizer():
    """A WordPiece tokenizer that can write any word of lower-case letters, with BERT's special tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    entries = [*special, *".,!?'\"", *letters, *(f"##{letter}" for letter in letters), *dict.fromkeys(WORDS)]
    vocabulary = {entry: number for number, entry in enumerate(dict.fromkeys(entries))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    names = {f"{token.strip('[]').lower()}_token": token for token in special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def make_bert_directory(path: Path, *, sentences: bool = False, **changes) -> Path:
    """A complete BERT checkpoint, as sentence-transformers saves one or as transformers does."""
    tokenizer = make_bert_tokenizer()
    make_bert(**{"vocab_size": len(tokenizer), **changes}).save_pretrained(path)
    tokenizer.save_pretrained(path)
    if sentences:
        (path / "1_Pooling").mkdir()
        (path / "modules.json").write_text(json.dumps(MODULES))
        (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64, "do_lower_case": False}))
        pooling = {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True}
        (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return path


def write_text(path: Path, documents: int = 60, seed: int = 0) -> Path:
    """A .jsonl file of random sentences."""
    generator = random.Random(seed)
    lines = [json.dumps({"text": " ".join(generator.choices(WORDS, k=40))}) for _ in range(documents)]
    path.write_text("\n".join(lines) + "\n")
    return path


def tiny_config(teacher: Path, text: Path, output: Path, cache: Path) -> dict:
    """Calibration, where the mechanism has one, and three steps of transfer and LoRA on sequences of 32 tokens."""
    steps = {"max_steps": 3, "tokens_per_step": 64, "logging_steps": 1, "save_steps": 2}
    return {
        "model_name_or_path": str(teacher),
        "output_dir": str(output),
        "dtype": "float32",
        "device": "cpu",
        "attention": {"type": "linear", "window": 8, "sinks": 2},
        "data": {"dataset": str(text), "sequence_length": 32, "validation_documents": 6, "cache_dir": str(cache)},
        "stages": {
            "calibrate": {"kind": "calibrate"},
            "transfer": {"kind": "transfer", **steps},
            "finetune": {"kind": "train", "weights": "lora", **steps},
        },
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
