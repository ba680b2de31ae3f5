"""Checkpoints of the published gain-cell code as converted GPT-2 repositories.

The file is a dictionary with the weights under `model` and the run's settings under `config`; the weights have
nanoGPT's names, in the layout of `nn.Linear`. Reading it needs no code from it: tensors and plain values only.

Source: the code of Leroux et al. 2025 (arXiv 2409.19315).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from linearize.conversion.gain_cells import Moments, Statistics
from linearize.errors import UserError
from linearize.modeling import GainCell, LinearizedGPT2Config, LinearizedGPT2ForCausalLM

PREFIXES = ("_orig_mod.", "module.")  # of torch.compile and DDP
OFF = 2**32  # levels that mean none
KINDS = {"LinearDRAMAttention": "linear", "DRAMAttention": "nonlinear"}
FLASH_KINDS = {"LinearDRAMFlashAttention": "linear", "DRAMFlashAttention": "nonlinear"}
"""They saturate and round the mean over all tiles of a text, so that what a token gets depends on what follows it;
with a single tile they are the kinds above."""
FIXED_SCALER = re.compile(r"transformer\.h\.\d+\.attn\.(?!(q|k|v|output)_scaler\.)\w+\.a")
"""The converters' scalers: one over the saturation of the scores, and of the outputs."""
FLIPPED = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # nn.Linear there, Conv1D in transformers
SCALER = re.compile(r"transformer\.h\.(\d+)\.attn\.(q|k|v|output)_scaler\.(a|b|target_std|target_mean)")
NAMES = {"q": "query_scaler", "k": "key_scaler", "v": "value_scaler", "output": "output_scaler"}
NOT_WEIGHTS = re.compile(r"transformer\.h\.\d+\.attn\.(?!c_|(q|k|v|output)_scaler\.)\w+(\.\w+)*")
"""Masks, decays and the fixed scalers of the converters, which the cell's settings replace (checked by
`_check_converters`)."""


def import_gain_cell(path: str | Path) -> tuple[LinearizedGPT2ForCausalLM, Statistics, dict[str, Any]]:
    """Read a checkpoint of the published code.

    Args:
        path: the `.pt` file.

    Returns:
        The student, in evaluation mode; the target statistics that it carries, empty where none were collected; and
        what was read from its settings.

    Raises:
        UserError: the file cannot be read, is of another layout, or uses what the published DRAM attentions do not.
    """
    weights, settings = _read(Path(path))
    sizes = _sizes(weights, settings)
    read = _cell_settings(settings, sizes["n_positions"])
    _check_converters(weights, GainCell(**read["cell"]))
    attention = {"type": "gain_cell", **read}
    config = LinearizedGPT2Config(
        **sizes, activation_function="gelu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=None, mixers={"gain_cell": attention},
    )  # fmt: skip
    model = LinearizedGPT2ForCausalLM(config)
    state, statistics = _translate(weights, model)
    missing = model.load_state_dict(state, strict=False).missing_keys
    if lost := [name for name in missing if name != "lm_head.weight" or not config.tie_word_embeddings]:
        raise UserError(f"{path} lacks {len(lost)} weights of a GPT-2, first {lost[0]}: it is incomplete.")
    return model.eval(), statistics, read


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"There is no file {path}: give the checkpoint (.pt) of the published code.")
    try:
        with torch.serialization.safe_globals([SimpleNamespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle and zip errors of many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} cannot be read as a checkpoint of tensors and plain values: {reason}") from error
    if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get("model"), Mapping):
        raise UserError(f"{path} has no weights under 'model': it is not a checkpoint of the published code.")
    weights = {}
    for name, tensor in checkpoint["model"].items():
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        weights[name] = tensor
    settings: dict[str, Any] = dict(checkpoint.get("model_args") or {})
    given = checkpoint.get("config") or {}
    return weights, settings | dict(vars(given) if isinstance(given, SimpleNamespace) else given)


def _sizes(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of the GPT-2, from its weights."""
    try:
        vocabulary, width = weights["transformer.wte.weight"].shape
        positions = weights["transformer.wpe.weight"].shape[0]
        heads = weights["transformer.h.0.attn.q_scaler.a"].numel()
    except KeyError as error:
        raise UserError(f"The checkpoint has no {error.args[0]}: it is not a gain-cell GPT-2.") from error
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("transformer.h."))
    if settings.get("n_head", heads) != heads:
        raise UserError(
            f"The checkpoint says {settings['n_head']} heads and has scalers for {heads}: it is inconsistent."
        )
    head = weights.get("lm_head.weight")
    tied = head is None or torch.equal(head, weights["transformer.wte.weight"])
    return {
        "vocab_size": vocabulary,
        "n_embd": width,
        "n_positions": positions,
        "n_layer": layers,
        "n_head": heads,
        "tie_word_embeddings": tied,
    }


def _cell_settings(settings: Mapping[str, Any], positions: int) -> dict[str, Any]:
    """Window, kind and device of the run; what it does not say is the published default."""
    kind = settings.get("attention", next(iter(KINDS)))
    if kind not in KINDS | FLASH_KINDS:
        known = ", ".join(KINDS | FLASH_KINDS)
        raise UserError(f"The checkpoint's attention is {kind!r}: only {known} run on gain cells.")
    for name in ("rope", "qkv_out_norm", "LayerScale"):
        if settings.get(name):
            raise UserError(f"The checkpoint was trained with {name}, which GPT-2 does not have.")

    def levels(name: str, published: int) -> int | None:
        value = settings.get(f"quantization_levels_{name}", published)
        return None if value is None or value >= OFF else int(value)

    cell = GainCell().replace(
        input_levels=levels("input", 16),
        weight_levels=levels("weights", 8),
        output_levels=levels("output", 32),
        output_grid="published",
        leak=float(settings.get("decay_factor") or 0.0),
    )
    if kind in FLASH_KINDS and positions > cell.tile:
        raise UserError(
            f"The checkpoint's attention is {kind}, which saturates and rounds the mean of all tiles of {cell.tile} "
            "tokens at once, so that no cache can hold it: finetune it as "
            f"{kind.replace('Flash', '')} with the published code first."
        )
    window = int(settings.get("sliding_window_size") or positions)
    if window < positions:
        raise UserError(
            f"The checkpoint's window is {window} tokens and its texts have up to {positions}: a token's first and "
            "last tile are apart there and share their cells here, so only windows as long as the texts are carried."
        )
    return {
        "window": -(-window // cell.tile) * cell.tile,  # never full: the next whole tile is the same
        "cell": cell.to_dict(),
        "cell_kind": (KINDS | FLASH_KINDS)[kind],
    }


def _check_converters(weights: Mapping[str, Tensor], cell: GainCell) -> None:
    """Refuse converters that saturate elsewhere than the cell's: those of the code's first version do."""
    known = torch.tensor([1 / cell.score_saturation, 1 / cell.output_saturation])
    for name, tensor in weights.items():
        if FIXED_SCALER.fullmatch(name) and not torch.isclose(tensor.flatten()[:1].float(), known, rtol=1e-3).any():
            raise UserError(
                f"{name} of the checkpoint is {float(tensor.flatten()[0]):.4g}, but only converters that saturate at "
                f"{cell.score_saturation:g} and {cell.output_saturation:g} are carried: it is of another version of "
                "the published code."
            )


def _translate(
    weights: Mapping[str, Tensor], model: LinearizedGPT2ForCausalLM
) -> tuple[dict[str, Tensor], Statistics]:
    """Weights by this project's names, and the target statistics where they were collected."""
    known = model.state_dict()
    state: dict[str, Tensor] = {}
    targets: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        if found := SCALER.fullmatch(name):
            layer, scaler, part = found[1], NAMES[found[2]], found[3]
            if part in ("a", "b"):
                target = f"transformer.h.{layer}.attn.mixer.{scaler}.{'scale' if part == 'a' else 'offset'}"
                state[target] = tensor.flatten().float()
            else:
                targets.setdefault(f"{layer}.{scaler}", {})[part.removeprefix("target_")] = tensor.flatten().double()
        elif name in known:
            state[name] = tensor.T.contiguous() if name.endswith(tuple(f"{x}.weight" for x in FLIPPED)) else tensor
        elif not NOT_WEIGHTS.fullmatch(name):
            raise UserError(f"The checkpoint has {name}, which a gain-cell GPT-2 has not: it is of another layout.")
    for name, tensor in known.items():  # nanoGPT may be trained without biases
        if name.endswith(".bias") and name not in state and name.removesuffix("bias") + "weight" in state:
            state[name] = torch.zeros_like(tensor)
    wrong = [name for name, tensor in state.items() if tensor.shape != known[name].shape]
    if wrong:
        raise UserError(
            f"{wrong[0]} has the shape {tuple(state[wrong[0]].shape)}: the checkpoint is of another layout."
        )
    collected = targets and all(moments["std"].any() for moments in targets.values())
    return state, {name: Moments(**moments) for name, moments in targets.items()} if collected else {}
