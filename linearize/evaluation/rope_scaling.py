"""A stock model with the RoPE of a longer context, which is what a user tries before converting anything: YaRN.

transformers does the arithmetic; the settings go into the config before the rotary module is built.
Source: YaRN, https://arxiv.org/abs/2309.00071.
"""

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from linearize.errors import UserError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """YaRN by a factor; None: the longest length asked for over the model's context, at least 1."""

    factor: float | None

    def choose(self, config: Any, lengths: Sequence[int]) -> float:
        """The factor for a model.

        Raises:
            UserError: it is automatic, and no length is asked for or the config names no context.
        """
        if self.factor is not None:
            return self.factor
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
        if not lengths or not context:
            missing = (
                "a length (--passkey, --natural or --context_perplexity)" if not lengths else "a context to scale"
            )
            raise UserError(f"--rope_scaling yarn=auto needs {missing}: give one, or a factor, as in yarn=4.0.")
        return max(1.0, max(lengths) / context)


def parse_rope_scaling(text: str) -> RopeScaling:
    """Read `yarn=4.0` or `yarn=auto`.

    Raises:
        UserError: anything else, or a factor below 1.
    """
    kind, _, number = (word.strip().lower() for word in text.partition("="))
    try:
        factor = None if number == "auto" else float(number)
    except ValueError:
        factor = math.nan
    if kind != "yarn" or (factor is not None and not 1 <= factor < math.inf):
        raise UserError(f"--rope_scaling is {text!r}: give yarn=FACTOR with a factor of at least 1, or yarn=auto.")
    return RopeScaling(factor)


def with_yarn(config: Any, factor: float, source: str) -> Any:
    """A copy of a stock model's config whose RoPE is stretched by YaRN.

    Args:
        config: as `from_pretrained` read it; its max_position_embeddings is the trained context.
        factor: trained context -> longest context, at least 1.
        source: how the sentences call the model.

    Raises:
        UserError: a converted model, one without RoPE, with a RoPE that is scaled already, or with several.
    """
    if hasattr(config, "mixer_types"):
        raise UserError(
            f"--rope_scaling is for stock softmax models, and {source} is a converted one: leave it out, or name the "
            "teacher."
        )
    config = copy.deepcopy(config)
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None)
    context = getattr(text, "max_position_embeddings", None)
    if not rope or not context:
        raise UserError(
            f"--rope_scaling needs rotary positions, and {source} ({text.model_type}) has none: leave it out."
        )
    if any(isinstance(entry, dict) for entry in rope.values()):
        raise UserError(f"--rope_scaling stretches one RoPE, and {source} has one per kind of layer: leave it out.")
    if (kind := rope.get("rope_type", "default")) != "default":
        raise UserError(f"The RoPE of {source} is scaled already (its rope_type is {kind}): leave --rope_scaling out.")
    yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": context}
    text.rope_parameters = {**rope, **yarn}
    text.max_position_embeddings = round(factor * context)
    return config


def check_scaled(model: Any, source: str) -> None:
    """Make sure that the loaded model's rotary module took the settings.

    Raises:
        UserError: it did not; its file computes the rotary embedding in a way of its own.
    """
    if not any(getattr(module, "rope_type", None) == "yarn" for module in model.modules()):
        kind = model.config.model_type
        raise UserError(f"The RoPE of {source} ({kind}) does not take YaRN in this transformers: omit --rope_scaling.")
