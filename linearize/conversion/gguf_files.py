"""Teachers in GGUF files: what transformers' loader leaves out is carried here, and the rest is refused by name.

The loader reads the keys and the tensors that it knows and passes over all others without a word: the scaling of
rotary positions, biases, the ids of special tokens. Formulas: llama.cpp, ggml/src/ggml.c (`rope_yarn`) and
convert_hf_to_gguf.py (`rope_freqs`), MIT.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from linearize.errors import UserError
from linearize.modeling import BACKBONES
from linearize.paths import user_path


class Read(NamedTuple):
    """What transformers' loader takes of a file."""

    layer: tuple[str, ...]
    """Parts of a layer that have weights."""
    keys: frozenset[str]
    """Of the architecture's metadata."""


_DECODER = "block_count context_length embedding_length feed_forward_length vocab_size attention.head_count "
_LLAMA = "attention.head_count_kv attention.layer_norm_rms_epsilon rope.dimension_count rope.freq_base"
ARCHITECTURES = {
    "llama": Read(
        ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"),
        frozenset((_DECODER + _LLAMA).split()),
    ),
    "gpt2": Read(
        ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down"),
        frozenset((_DECODER + "attention.layer_norm_epsilon").split()),
    ),
}
"""The architectures whose models can be converted."""
BIASES = {
    "attention_bias": ("attn_q", "attn_k", "attn_v", "attn_output"),
    "mlp_bias": ("ffn_gate", "ffn_up", "ffn_down"),
}
"""Settings of a Llama config, and whose biases they add."""
SAYS_NOTHING: dict[str, Callable[[Any, "Header"], bool]] = {
    "attention.key_length": lambda value, header: value == header.head_dim,
    "attention.value_length": lambda value, header: value == header.head_dim,
    "attention.scale": lambda value, header: math.isclose(value, header.head_dim**-0.5, rel_tol=1e-6),
    "attention.causal": lambda value, header: value is True,
    "attention.sliding_window": lambda value, header: value == 0 or value >= header.own("context_length"),
    "attention.clamp_kqv": lambda value, header: value == 0,
    "attention.max_alibi_bias": lambda value, header: value == 0,
    "attn_logit_softcapping": lambda value, header: value == 0,
    "final_logit_softcapping": lambda value, header: value == 0,
    "embedding_scale": lambda value, header: value == 1,
    "residual_scale": lambda value, header: value == 1,
    "logit_scale": lambda value, header: value == 1,
    "expert_count": lambda value, header: value == 0,
    "expert_used_count": lambda value, header: value == 0,
    "use_parallel_residual": lambda value, header: value is False,
    "tensor_data_layout": lambda value, header: value == "Meta AI original pth",
    "rope.scaling.finetuned": lambda value, header: True,
    "rope.scaling.original_context_length": lambda value, header: True,  # of no use without a scaling
    "rope.scaling.attn_factor": lambda value, header: value == 1,
    "rope.scaling.yarn_attn_factor": lambda value, header: value == 1,
    "rope.scaling.yarn_ext_factor": lambda value, header: value == 1,
    "rope.scaling.yarn_log_multiplier": lambda value, header: value == 0,
}
"""Keys that the loader passes over, and when that changes nothing."""
SPECIAL_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
LLAMA3_CONTEXT = 8192
"""The context that published Llama-3 models were first trained at; the file of one does not state it."""


@dataclass(frozen=True)
class Header:
    """The metadata and the tensors' names of a file."""

    source: str
    metadata: dict[str, Any]
    """Without vocabularies and other arrays of strings."""
    tensors: frozenset[str]
    vocabulary: int
    """Rows of the embedding."""
    rope_factors: np.ndarray | None
    """(head_dim / 2,) float32, what each frequency is divided by: the tensor `rope_freqs.weight`."""

    @property
    def architecture(self) -> str:
        return self.metadata["general.architecture"]

    def own(self, key: str, default: Any = None) -> Any:
        """The value of an architecture's key."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    @property
    def head_dim(self) -> int:
        width = self.own("embedding_length") // self.own("attention.head_count")
        return self.own("rope.dimension_count", width)


def is_gguf(source: str) -> bool:
    return source.endswith(".gguf")


def gguf_file(source: str) -> Path:
    """The path of a GGUF file that starts as one.

    Raises:
        UserError: missing, or not GGUF.
    """
    file = Path(user_path(source))
    if not file.is_file():
        raise UserError(f"there is no file {source}: check the path")
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UserError(f"{source} is no GGUF file (its first bytes are wrong): download it again")
    return file


def gguf_config(source: str) -> PreTrainedConfig:
    """The configuration of a GGUF file, with all that its metadata say about the model.

    Raises:
        UserError: the file cannot be read, or holds what no config of its architecture has.
    """
    file = gguf_file(source)
    config: Any = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    header = read_header(file, source)
    if header.architecture not in ARCHITECTURES:
        if config.model_type not in BACKBONES:
            return config  # of a model that cannot be converted, which others say
        raise _refusal(source, f"its architecture is {header.architecture}, of which the layout is not known")
    for name, key in SPECIAL_IDS.items():
        if (value := header.metadata.get(f"tokenizer.ggml.{key}")) is not None:
            setattr(config, name, value)
    config.vocab_size = header.vocabulary
    if header.architecture == "gpt2":
        config.n_positions = header.own("context_length")
        config.n_inner = header.own("feed_forward_length")
    else:
        _take_biases(header, config)
    rope = _rope_scaling(header)
    _refuse_unread(header, read=set(rope.pop("keys", ())))
    if rope:
        config.rope_parameters = {**config.rope_parameters, **rope}
    if hasattr(config, "sliding_window"):
        config.sliding_window = None  # the default of the class, which the file does not speak of
    _check_tensors(header, config)
    return config


def gguf_weights(source: str, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """The weights of a GGUF file by their names in transformers, dequantised.

    Args:
        config: `gguf_config`'s.
    """
    from transformers import GgufConfig

    file = gguf_file(source)
    load: Any = AutoModelForCausalLM.from_pretrained
    teacher, info = load(
        file.parent,
        gguf_file=file.name,
        config=config,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    for name in ("missing_keys", "mismatched_keys"):
        if lost := sorted(map(str, info[name])):
            raise UserError(f"the GGUF file {source} gives no {lost[0]} that its metadata ask for: download it again")
    return teacher.state_dict()


def read_header(file: Path, source: str) -> Header:
    """The metadata of a file and the names of its tensors; `source` is how the user called it."""
    import gguf

    reader = gguf.GGUFReader(file)
    strings = [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING]
    metadata = {name: field.contents() for name, field in reader.fields.items() if field.types != strings}
    factors = [gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors if t.name == "rope_freqs.weight"]
    return Header(
        source,
        metadata,
        frozenset(tensor.name for tensor in reader.tensors),
        next((int(tensor.shape[-1]) for tensor in reader.tensors if tensor.name == "token_embd.weight"), 0),
        np.array(factors[0], dtype=np.float32).reshape(-1) if factors else None,
    )


def _refusal(source: str, what: str) -> UserError:
    return UserError(
        f"the GGUF file {source} cannot be carried exactly: {what}; give the checkpoint that it was made from"
    )


def _refuse_unread(header: Header, read: set[str]) -> None:
    """Refuse metadata that say something about the model and are not read."""
    read |= ARCHITECTURES[header.architecture].keys
    for name, value in header.metadata.items():
        prefix, _, key = name.partition(".")
        if prefix != header.architecture or key in read:
            continue
        if not (key in SAYS_NOTHING and SAYS_NOTHING[key](value, header)):
            raise _refusal(header.source, f"its {name} is {value}, which is not read")


def _take_biases(header: Header, config: Any) -> None:
    for setting, parts in BIASES.items():
        if hasattr(config, setting) and all(f"blk.0.{part}.bias" in header.tensors for part in parts):
            setattr(config, setting, True)


def _check_tensors(header: Header, config: Any) -> None:
    """Refuse tensors that no weight is read from, and a file that lacks some."""
    gpt2 = header.architecture == "gpt2"
    biased = [part for setting, parts in BIASES.items() if getattr(config, setting, False) for part in parts]
    expected = {"token_embd.weight", "output_norm.weight"}
    if gpt2:
        expected |= {"position_embd.weight", "output_norm.bias"}
        biased = list(ARCHITECTURES["gpt2"].layer)
    for layer in range(config.num_hidden_layers):
        expected |= {f"blk.{layer}.{part}.weight" for part in ARCHITECTURES[header.architecture].layer}
        expected |= {f"blk.{layer}.{part}.bias" for part in biased}
    if lost := sorted(expected - header.tensors):
        raise UserError(f"the GGUF file {header.source} lacks the tensor {lost[0]}: give a complete file")
    known = expected | {"output.weight"} | (set() if gpt2 else {"rope_freqs.weight"})
    if odd := sorted(header.tensors - known):
        raise _refusal(
            header.source, f"it holds {len(odd)} tensors that are not read by its architecture, first {odd[0]}"
        )


# ---- the scaling of rotary positions


def _rope_scaling(header: Header) -> dict[str, Any]:
    """The entries of `rope_parameters` that the file asks for, and under `keys` what they were read from.

    Raises:
        UserError: they are of a kind that no such entries describe.
    """
    kind = header.own("rope.scaling.type", "none")
    factor = header.own("rope.scaling.factor")
    keys = ["rope.scaling.type", "rope.scaling.factor"]
    if (old := header.own("rope.scale_linear")) is not None:  # the key of the first files
        if factor is not None and factor != old:
            raise _refusal(header.source, f"it scales its rotary positions by {factor} and by {old}")
        kind, factor = "linear" if kind == "none" else kind, old
        keys.append("rope.scale_linear")
    if header.architecture == "gpt2":  # has no rotary positions: any such key is refused as not read
        return {}
    if header.rope_factors is not None and not np.all(header.rope_factors == 1):
        if kind != "none" or factor not in (None, 0, 1):
            raise _refusal(header.source, f"it scales its rotary positions as {kind} and by rope_freqs.weight at once")
        return {**_llama3(header), "keys": keys}
    if kind == "none" or factor is None:
        if factor not in (None, 0, 1) or kind not in ("none", "linear"):
            raise _refusal(header.source, f"it scales its rotary positions as {kind} by {factor}")
        return {"keys": keys}
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(factor), "keys": keys} if factor != 1 else {"keys": keys}
    if kind != "yarn":
        raise _refusal(header.source, f"it scales its rotary positions as {kind}")
    rope = {
        "rope_type": "yarn",
        "factor": float(factor),
        "original_max_position_embeddings": header.own(
            "rope.scaling.original_context_length", header.own("context_length")
        ),
    }
    for name in ("beta_fast", "beta_slow"):
        if (value := header.own(f"rope.scaling.yarn_{name}")) is not None:
            rope[name] = float(value)
            keys.append(f"rope.scaling.yarn_{name}")
    return {**rope, "keys": keys}


def _llama3(header: Header) -> dict[str, Any]:
    """The Llama-3 scaling whose factors a file holds.

    Raises:
        UserError: they are those of none.
    """
    factors: Any = header.rope_factors
    dim, base = header.head_dim, header.own("rope.freq_base", 10000.0)
    waves = 2 * math.pi * base ** (np.arange(0, dim, 2) / dim)
    context = header.own("rope.scaling.original_context_length", LLAMA3_CONTEXT)
    factor = round(float(factors.max()), 4)
    for low, high in [(1.0, 4.0), *_band(waves, factors, factor, context)]:
        made = _llama3_factors(waves, factor, low, high, context)
        if len(made) == len(factors) and np.allclose(made, factors, rtol=1e-6, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": context,
            }
    raise _refusal(header.source, "its tensor rope_freqs.weight is that of no llama3 scaling")


def _band(waves: np.ndarray, factors: np.ndarray, factor: float, context: int) -> list[tuple[float, float]]:
    """(low, high) of the frequencies that are scaled in part, from two of them: their shares are linear in
    context / wavelength, from 0 at low to 1 at high."""
    partial: Any = np.flatnonzero((factors > 1.001) & (factors < factor / 1.001)) if len(waves) == len(factors) else []
    if len(partial) < 2:
        return []
    ends = [partial[0], partial[-1]]
    shares = (1 / factors[ends].astype(np.float64) - 1 / factor) / (1 - 1 / factor)
    x = context / waves[ends]
    slope = (shares[0] - shares[1]) / (x[0] - x[1])
    low = x[0] - shares[0] / slope
    return [(round(float(low), 3), round(float(low + 1 / slope), 3))]


def _llama3_factors(waves: np.ndarray, factor: float, low: float, high: float, context: int) -> np.ndarray:
    """(head_dim / 2,): what each frequency is divided by."""
    share = np.clip((context / waves - low) / (high - low), 0, 1)  # of the frequency that stays
    return 1 / ((1 - share) / factor + share)
