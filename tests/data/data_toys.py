"""A tokenizer, texts and files small enough to check by hand, for the tests of the data."""

import json
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from linearize.config.settings import DataConfig
from linearize.data.sequences import TokenBlocks

WORDS = [
    "the",
    "river",
    "ran",
    "over",
    "its",
    "bed",
    "of",
    "stones",
    "and",
    "nobody",
    "knew",
    "where",
    "it",
    "would",
    "stop",
    "so",
    "we",
    "followed",
    "it",
    "down",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>\n{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Leaves out what assistants said before the last turn, as templates of reasoning models leave out thoughts.
CHATML_FORGETFUL = CHATML.replace("{{ m['content'] }}", "{% if loop.last %}{{ m['content'] }}{% endif %}")


def make_tokenizer(bos: bool = False, text: str = " ".join(WORDS)) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([text], trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def make_texts(count: int, seed: int = 0, length: int = 30) -> list[str]:
    """Texts that differ from each other."""
    rng = np.random.default_rng(seed)
    return [f"{seed} {i} " + " ".join(rng.choice(WORDS, size=rng.integers(3, length))) for i in range(count)]


def write_jsonl(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def write_texts(path: Path, texts: list[str]) -> str:
    return write_jsonl(path, [{"text": text} for text in texts])


def make_config(tmp_path, dataset, **changes) -> DataConfig:
    return DataConfig(dataset=dataset, **{"sequence_length": 16, "cache_dir": str(tmp_path / "cache"), **changes})


def stream(texts, tokenizer, bos=()) -> list[int]:
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return list(chain.from_iterable([*bos, *document, tokenizer.eos_token_id] for document in ids))


def flat(blocks: TokenBlocks) -> list[int]:
    return np.asarray(blocks.input_ids).reshape(-1).tolist()


def supervised_text(blocks: TokenBlocks, tokenizer) -> str:
    labels = blocks[:]["labels"]
    return tokenizer.decode(labels[labels != -100], skip_special_tokens=False)
