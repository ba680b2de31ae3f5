"""4-bit and 8-bit bases through bitsandbytes: the frozen weights shrink, the mechanism and the adapters stay in
float32."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch

from linearize.errors import UserError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

SKIPPED_MODULES = ("lm_head", "mixer")
"""Never quantised: the head, whose weight the embeddings often share, and the mechanism's own parameters."""


def require_bitsandbytes() -> None:
    """Checks that quantised weights can be made here.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "load_in_4bit and load_in_8bit need bitsandbytes: install it with pip install 'linearize[quant]', "
            "or switch them off."
        )


def quantization_config(
    *, load_in_4bit: bool = False, load_in_8bit: bool = False, compute_dtype: torch.dtype = torch.bfloat16
) -> BitsAndBytesConfig | None:
    """The settings with which `linearize.convert` loads a quantised base.

    4 bits: NF4 with double quantisation, as in QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section
    3); 8 bits: LLM.int8() (Dettmers et al. 2022, https://arxiv.org/abs/2208.07339) with its outlier threshold of 6.

    Args:
        load_in_4bit: 4 bits a weight.
        load_in_8bit: 8 bits a weight.
        compute_dtype: What the 4-bit weights are expanded to for a product: the run's dtype.

    Returns:
        None when neither is asked for.

    Raises:
        UserError: both are asked for, or bitsandbytes is missing.
    """
    if load_in_4bit and load_in_8bit:
        raise UserError("load_in_4bit and load_in_8bit are both set: choose one of them.")
    if not (load_in_4bit or load_in_8bit):
        return None
    require_bitsandbytes()
    from transformers import BitsAndBytesConfig

    skipped = list(SKIPPED_MODULES)
    if load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=skipped,
    )


def refuse_quantized(source: str, config: PreTrainedConfig) -> None:
    """Refuse a checkpoint whose file holds quantised weights, by its config: nothing of ours can be merged into them.

    Args:
        source: Where the config was read, for the sentence; the weights of a `.gguf` file arrive dequantised.

    Raises:
        UserError: Any `quantization_config` (bitsandbytes, GPTQ, AWQ, FP8 and others).
    """
    found = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    if not found or source.endswith(".gguf"):
        return
    settings = found if isinstance(found, dict) else found.to_dict()
    method = settings.get("quant_method") or "an unnamed method"
    raise UserError(
        f"The weights of {source} are quantised already ({getattr(method, 'value', method)}), and a conversion needs "
        "full ones: name the checkpoint that they were made from, and set load_in_4bit to hold it in 4 bits."
    )


def is_quantized(model: torch.nn.Module) -> bool:
    """Whether the base weights of a model are quantised by bitsandbytes."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def keep_differentiable(model: torch.nn.Module) -> None:
    """Keeps 4-bit weights in the layout that a backward pass can go through.

    On a CPU with AVX512-BF16, bitsandbytes repacks a layer's weights at its first call in evaluation mode, and for
    good: from then on the layer passes no gradient back, which a later training stage would not notice.
    """
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def freeze_base(model: PreTrainedModel) -> None:
    """Makes every weight of the base a constant, quantised or not, before adapters are attached.

    peft's `prepare_model_for_kbit_training` would also turn embeddings and head to float32 (4 GiB more for
    Llama-3-8B); neither trains here, norms compute in float32 anyway, and non-reentrant checkpointing needs no
    gradient at the embeddings. Dtypes therefore stay as loaded.
    """
    model.requires_grad_(False)
