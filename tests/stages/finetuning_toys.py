"""Tiny random models and token blocks for the tests of stage 2."""

import signal

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from linearize import LinearizedLlamaConfig, LinearizedLlamaForCausalLM
from linearize.config.settings import FinetuneConfig
from linearize.data.sequences import TokenBlocks

VOCABULARY, LENGTH = 96, 32
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
MIXERS = {"linear": {"type": "linear", "window": 8, "sinks": 2}}


def stock_llama(directory, dtype=torch.float32, **shape):
    """A random Llama saved to a directory; returns its path."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**SHAPE, **shape})).to(dtype).save_pretrained(directory)
    return str(directory)


def student(source, dtype=torch.float32, softmax_layers=(1,), **options):
    """The stock model of a directory with linear attention in all but the given layers; the mechanism is moved off its
    start."""
    stock = LlamaConfig.from_pretrained(source).to_dict()
    stock.pop("model_type")
    types = ["softmax" if layer in softmax_layers else "linear" for layer in range(stock["num_hidden_layers"])]
    config = LinearizedLlamaConfig(**stock, mixer_types=types, mixers=MIXERS)
    model = LinearizedLlamaForCausalLM.from_pretrained(source, config=config, dtype=dtype, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in model.mixer_state_dict().values():
            tensor += 0.1 * torch.randn(tensor.shape, dtype=torch.float64).to(tensor)
    return model.eval()


def token_blocks(number=10, seed=0, length=LENGTH):
    """Random tokens; each sequence is supervised from another place on."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (number, length), generator=generator)
    starts = torch.randint(0, length - 4, (number, 1), generator=generator)
    return TokenBlocks(ids.numpy(), torch.where(torch.arange(length) < starts, -100, ids).numpy())


class InterruptedBlocks(TokenBlocks):
    """Ctrl-C while the data of a step are read."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        if self.reads == 18:  # a micro-batch is read ahead: this is in step 4, of 4 sequences each
            signal.raise_signal(signal.SIGINT)
        return super().__getitem__(index)


@torch.no_grad()
def fixed_logits(model):
    """Of two fixed sequences."""
    ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(6))
    return model(input_ids=ids, use_cache=False).logits


def settings(**changes):
    """Four steps of four sequences."""
    given = {
        "max_steps": 4,
        "tokens_per_step": 4 * LENGTH,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "mixer_learning_rate": 3e-2,
    }
    return FinetuneConfig(**{**given, "logging_steps": 1, "save_steps": 100, **changes})
