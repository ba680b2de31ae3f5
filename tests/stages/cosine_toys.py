"""Checkpoints in the layout of the published cosine code, and its forward written out."""

import json
import math

import torch
from safetensors.torch import save_file
from tiny_runs import make_tokenizer
from torch.nn import functional

VOCABULARY, WIDTH, INNER, LAYERS, POSITIONS, ROTATED = 512, 32, 48, 2, 64, 6
HEADS = {"bert": 4, "gptj": 2}
BERT = {
    "architectures": ["BertForPreTraining"],
    "model_type": "bert",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS["bert"],
    "intermediate_size": INNER,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": POSITIONS,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "classifier_dropout": None,
    "gradient_checkpointing": False,
    "use_cache": True,
    "torch_dtype": "float32",
    "transformers_version": "4.34.0",
}
GPTJ = {
    "architectures": ["GPTJForCausalLM"],
    "model_type": "gptj",
    "vocab_size": VOCABULARY,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS["gptj"],
    "n_inner": INNER,
    "n_positions": POSITIONS,
    "rotary_dim": ROTATED,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "fast_inference": False,
    "summary_type": "cls_index",
    "use_cache": True,
    "torch_dtype": "float32",
    "transformers_version": "4.34.0",
}
FIELDS = {"bert": BERT, "gptj": GPTJ}
EXPONENTS = {"bert": "bert.encoder.layer.{}.attention.self.norm_const", "gptj": "transformer.h.{}.attn.norm_const"}
KINDS = list(FIELDS)


def published_weights(kind, seed=0):
    """Names and shapes of the published state dict; one `norm_const` per layer, and constants of old versions."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}

    def normal(name, *shape, std=0.3, mean=0.0):
        weights[name] = mean + std * torch.randn(*shape, generator=generator)

    def linear(name, out, width, bias=True):
        normal(f"{name}.weight", out, width)
        if bias:
            normal(f"{name}.bias", out)

    def norm(name):
        normal(f"{name}.weight", WIDTH, mean=1.0)
        normal(f"{name}.bias", WIDTH)

    if kind == "bert":
        for name, rows in (("word", VOCABULARY), ("position", POSITIONS), ("token_type", 2)):
            normal(f"bert.embeddings.{name}_embeddings.weight", rows, WIDTH)
        norm("bert.embeddings.LayerNorm")
        weights["bert.embeddings.position_ids"] = torch.arange(POSITIONS)[None]
        for i in range(LAYERS):
            at = f"bert.encoder.layer.{i}."
            for name in ("query", "key", "value"):
                linear(f"{at}attention.self.{name}", WIDTH, WIDTH)
            normal(f"{at}attention.self.norm_const", 1, HEADS[kind], 1, 1, std=1.0, mean=0.5)
            linear(f"{at}attention.output.dense", WIDTH, WIDTH)
            norm(f"{at}attention.output.LayerNorm")
            linear(f"{at}intermediate.dense", INNER, WIDTH)
            linear(f"{at}output.dense", WIDTH, INNER)
            norm(f"{at}output.LayerNorm")
        linear("bert.pooler.dense", WIDTH, WIDTH)
        linear("cls.predictions.transform.dense", WIDTH, WIDTH)
        norm("cls.predictions.transform.LayerNorm")
        normal("cls.predictions.bias", VOCABULARY)
        weights["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"]
        weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"]
        linear("cls.seq_relationship", 2, WIDTH)
        return weights
    normal("transformer.wte.weight", VOCABULARY, WIDTH)
    for i in range(LAYERS):
        at = f"transformer.h.{i}."
        norm(f"{at}ln_1")
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{at}attn.{name}", WIDTH, WIDTH, bias=False)
        normal(f"{at}attn.norm_const", 1, HEADS[kind], 1, 1, std=1.0, mean=0.5)
        weights[f"{at}attn.bias"] = torch.ones(1, 1, POSITIONS, POSITIONS).tril().bool()
        weights[f"{at}attn.masked_bias"] = torch.tensor(-1e9)
        linear(f"{at}mlp.fc_in", INNER, WIDTH)
        linear(f"{at}mlp.fc_out", WIDTH, INNER)
    norm("transformer.ln_f")
    linear("lm_head", VOCABULARY, WIDTH)
    return weights


def write(path, kind, *, weights=None, fields=None, tokenizer=True, safetensors=False):
    """A checkpoint as the published training leaves it: pickles of other things lie beside its weights."""
    path.mkdir()
    weights = published_weights(kind) if weights is None else weights
    (path / "config.json").write_text(json.dumps(FIELDS[kind] if fields is None else fields))
    if safetensors:
        save_file({name: tensor.clone() for name, tensor in weights.items()}, path / "model.safetensors")
    else:
        torch.save(weights, path / "pytorch_model.bin")
    for name in ("optimizer.pt", "scheduler.pt", "config.pt", "tokenizer.pt"):
        (path / name).write_bytes(b"pickles that nobody reads")
    if tokenizer:
        make_tokenizer().save_pretrained(path)
    return {name: tensor.double() for name, tensor in weights.items()}


def affine(weights, name, x):
    bias = weights.get(f"{name}.bias")
    return x @ weights[f"{name}.weight"].T + (0 if bias is None else bias)


def normed(weights, name, x, eps):
    centred = x - x.mean(-1, keepdim=True)
    unit = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return unit * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def unit(x):
    return x / x.norm().clamp(min=1e-12)


def published_attention(query, key, value, norm_const, real, causal, side="key"):
    """Token by token and head by head: `(T, width)` of one text whose real tokens `real (T,)` says.

    Of a text that is seen at once a value is divided by n^s, n its real tokens. Causal: by c_j^s, with c_j the real
    tokens up to the value's own; side "query" divides by those up to the query's, which is not what was published.
    """
    heads, output = norm_const.numel(), torch.zeros_like(value)
    dim = query.shape[-1] // heads
    counts = real.cumsum(0)
    for head in range(heads):
        at = slice(head * dim, (head + 1) * dim)
        rate = 1 / (1 + math.exp(-float(norm_const.flatten()[head])))
        for i in range(len(real)):
            for j in range(i + 1 if causal else len(real)):
                if not real[i] or not real[j]:
                    continue
                count = counts[j if side == "key" else i] if causal else counts[-1]
                cosine = unit(query[i, at]) @ unit(key[j, at])
                output[i, at] += cosine * value[j, at] / max(float(count) ** rate, 1.0)
    return output


def turned(x, heads):
    """The rotary embedding of GPT-J, `(T, width)`: neighbours among a head's first dimensions are turned."""
    x, dim = x.clone(), x.shape[-1] // heads
    for place in range(len(x)):
        for start in range(0, x.shape[-1], dim):
            for i in range(0, ROTATED, 2):
                angle = place / 10_000 ** (i / ROTATED)
                a, b = float(x[place, start + i]), float(x[place, start + i + 1])
                x[place, start + i] = a * math.cos(angle) - b * math.sin(angle)
                x[place, start + i + 1] = b * math.cos(angle) + a * math.sin(angle)
    return x


def published_bert(weights, ids, real, types):
    """Logits of the masked language model for one text `(T,)`, padding included."""
    table = "bert.embeddings.{}_embeddings.weight"
    x = weights[table.format("word")][ids] + weights[table.format("token_type")][types]
    x = normed(weights, "bert.embeddings.LayerNorm", x + weights[table.format("position")][: len(ids)], 1e-12)
    for i in range(LAYERS):
        at = f"bert.encoder.layer.{i}."
        query, key, value = (affine(weights, f"{at}attention.self.{name}", x) for name in ("query", "key", "value"))
        exponent = weights[f"{at}attention.self.norm_const"]
        mixed = published_attention(query, key, value, exponent, real, causal=False)
        x = x + affine(weights, f"{at}attention.output.dense", mixed)
        x = normed(weights, f"{at}attention.output.LayerNorm", x, 1e-12)
        inner = functional.gelu(affine(weights, f"{at}intermediate.dense", x))
        x = normed(weights, f"{at}output.LayerNorm", x + affine(weights, f"{at}output.dense", inner), 1e-12)
    x = functional.gelu(affine(weights, "cls.predictions.transform.dense", x))
    x = normed(weights, "cls.predictions.transform.LayerNorm", x, 1e-12)
    return x @ weights["bert.embeddings.word_embeddings.weight"].T + weights["cls.predictions.bias"]


def published_gptj(weights, ids, real, side="key"):
    """Logits of the language model for one text `(T,)`, padding included."""
    x = weights["transformer.wte.weight"][ids]
    for i in range(LAYERS):
        at = f"transformer.h.{i}."
        before = normed(weights, f"{at}ln_1", x, 1e-5)
        query, key, value = (affine(weights, f"{at}attn.{name}_proj", before) for name in ("q", "k", "v"))
        query, key = turned(query, HEADS["gptj"]), turned(key, HEADS["gptj"])
        mixed = published_attention(query, key, value, weights[f"{at}attn.norm_const"], real, causal=True, side=side)
        inner = affine(weights, f"{at}mlp.fc_in", before)
        inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        x = x + affine(weights, f"{at}attn.out_proj", mixed) + affine(weights, f"{at}mlp.fc_out", inner)
    return affine(weights, "lm_head", normed(weights, "transformer.ln_f", x, 1e-5))


def batch(tokens=(19, 12)):
    """Ids, mask and segments of texts that are padded on the right, as the published code pads them."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, VOCABULARY, (len(tokens), max(tokens)), generator=generator)
    mask = torch.stack([torch.arange(max(tokens)) < count for count in tokens]).long()
    types = (torch.arange(max(tokens)) > 7).long().expand_as(ids)
    return ids * mask, mask, types * mask
