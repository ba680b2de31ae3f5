"""What every converted config has: which layer uses which mechanism, and with which settings."""

import re
import warnings
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, ClassVar

import transformers

from .cache_layers import softmax_layer
from .peft_targets import tell_peft
from .registry import ATTENTIONS, mechanism, resolve_settings

SOFTMAX = "softmax"
OLDEST, NEWEST = (5, 17), (5, 24)
"""The first and the last minor release of transformers that is tested; pyproject.toml has the same bounds."""


def check_transformers(version: str) -> None:
    """Refuse a release of transformers that is too old, and warn of one that was not tested.

    Raises:
        ImportError: one sentence.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    release = tuple(map(int, found.groups())) if found else NEWEST
    tested = ".".join(map(str, OLDEST)) + " to " + ".".join(map(str, NEWEST))
    if release < OLDEST:
        raise ImportError(f"this model's code needs transformers {tested}, and {version} is installed: install one")
    if release > NEWEST:
        warnings.warn(
            f"this model's code is tested with transformers {tested}, and {version} is installed: if a call fails, "
            "install one of those",
            stacklevel=2,
        )


check_transformers(transformers.__version__)


class MixerConfigMixin:
    """Beside a stock config, which must declare the fields `mixer_types` and `mixers`.

    `mixer_types` names one entry per layer; `mixers` holds the settings of each name, with `"type"` one of the
    registry's mechanisms; `"softmax"` needs no entry. Both are plain JSON. Nothing typed is stored on the config.
    """

    if TYPE_CHECKING:
        model_type: ClassVar[str]
        mixer_types: list[str] | None
        mixers: dict[str, Any] | None
        num_hidden_layers: int
        num_attention_heads: int
        hidden_size: int

    # The stock plans cut projections that a mechanism reads whole, and layers that its landmarks go through.
    base_model_tp_plan: ClassVar[Any] = None
    base_model_pp_plan: ClassVar[Any] = None
    base_model_ep_plan: ClassVar[Any] = None
    learned_positions = False
    """Whether the model learns an embedding for each position, which no token can go past."""
    sees_both_sides = False
    """Whether a token sees those after it, as in an encoder."""

    @property
    def longest_text(self) -> int | None:
        """Tokens that learned positions reach, the landmarks among them counted; None where positions are computed."""
        if not self.learned_positions:
            return None
        positions: int = getattr(self, "max_position_embeddings")  # noqa: B009 # GPT-2 has it by another name
        first = self.mixer(0)
        return (
            positions - (positions + 1) // first.block_size if getattr(first, "type", "") == "landmark" else positions
        )

    def positions_of(self, tokens: int) -> int:
        """Positions that a text of so many tokens takes, the landmarks among them counted."""
        first = self.mixer(0)
        marked = getattr(first, "type", "") == "landmark"
        return tokens + tokens // (first.block_size - 1) if marked else tokens

    def to_dict(self) -> dict[str, Any]:
        """As ever. This is where peft reads a model's type, to look up what its adapters take."""
        tell_peft(self.model_type)
        return super().to_dict()  # type: ignore[misc] # of the stock config beside

    def prepare_mixers(self) -> None:
        """Check both fields and write every setting back, so that a later default never changes an old checkpoint.

        Raises:
            ValueError: unknown names or settings, or a number of layers that does not fit; one sentence.
        """
        if self.mixers is None:
            self.mixers = {"linear": {"type": "linear"}} if self.mixer_types is None else {}
        if self.mixer_types is None:
            if len(self.mixers) != 1:
                raise ValueError("mixer_types is needed: one name per layer, since mixers has not exactly one entry")
            self.mixer_types = list(self.mixers) * self.num_hidden_layers
        if SOFTMAX in self.mixers:
            raise ValueError(f"mixers describes {SOFTMAX!r}, which names the layers that keep their own attention")
        if len(self.mixer_types) != self.num_hidden_layers:
            raise ValueError(
                f"mixer_types names {len(self.mixer_types)} layers, the model has {self.num_hidden_layers}"
            )
        if unknown := sorted(set(self.mixer_types) - set(self.mixers) - {SOFTMAX}):
            known = ", ".join([*self.mixers, SOFTMAX])
            raise ValueError(
                f"mixer_types uses {', '.join(unknown)}, which mixers does not describe: known are {known}"
            )
        heads, groups = (
            self.num_attention_heads,
            getattr(self, "num_key_value_heads", None) or self.num_attention_heads,
        )
        if heads % groups:
            raise ValueError(f"{heads} attention heads do not divide among {groups} key/value heads")
        self.mixers = {name: asdict(self._typed(settings)) for name, settings in self.mixers.items()}
        self._check_landmarks()

    def _check_landmarks(self) -> None:
        """Landmarks are tokens of the whole model: all layers have them at the same places, or none has."""
        assert self.mixers is not None and self.mixer_types is not None, "prepare_mixers fills both"
        used = [self.mixers.get(name, {"type": SOFTMAX}) for name in self.mixer_types]
        if not any(settings["type"] == "landmark" for settings in used):
            return
        if others := sorted({settings["type"] for settings in used} - {"landmark"}):
            raise ValueError(
                f"landmark attention goes with no {', '.join(others)} layers, which would take its landmarks for "
                "tokens: give every layer landmark attention"
            )
        for name in ("block_size", "include_landmark_in_loss"):
            if len(values := {settings[name] for settings in used}) > 1:
                raise ValueError(f"{name} differs between layers ({', '.join(map(str, sorted(values)))}): choose one")

    def require_bidirectional(self) -> None:
        """Refuse mechanisms that an encoder cannot have; `prepare_mixers` goes before.

        Raises:
            ValueError: one sentence.
        """
        assert self.mixers is not None, "prepare_mixers fills it"
        for settings in self.mixers.values():
            if not mechanism(settings["type"]).bidirectional:
                known = ", ".join(name for name, entry in ATTENTIONS.items() if entry.bidirectional)
                raise ValueError(
                    f"{settings['type']} attention sees only the tokens before it, and an encoder needs both sides: "
                    f"choose one of {known}"
                )
            if settings["type"] == "cosine":
                self._typed(settings).check_bidirectional()

    def mixer(self, layer_idx: int):
        """The typed settings of a layer, or None where it stays softmax."""
        assert self.mixer_types is not None and self.mixers is not None, "prepare_mixers fills both"
        name = self.mixer_types[layer_idx]
        return None if name == SOFTMAX else self._typed(self.mixers[name])

    def _typed(self, settings: dict):
        config_class = mechanism(settings.get("type", "(none)")).config
        known = {field.name for field in fields(config_class)}
        if unknown := sorted(set(settings) - known):
            raise ValueError(f"unknown attention setting {', '.join(unknown)}: known are {', '.join(sorted(known))}")
        typed = config_class(**settings)
        if settings["type"] == "cosine":
            typed.check_heads(self.num_attention_heads)
        head_dim = getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads
        resolve_settings(typed, head_dim, self)
        return typed

    @property
    def softmax_window(self) -> int | None:
        """Last tokens that a softmax layer sees, the present one among them; None where it sees all."""
        return None

    @property
    def layer_types(self) -> list[str]:
        """Names of the cache layers, as transformers' DynamicCache reads them; never serialised."""
        assert self.mixer_types is not None and self.mixers is not None, "prepare_mixers fills both"
        types = {name: mechanism(settings["type"]).cache_layer_type for name, settings in self.mixers.items()}
        softmax: Any = softmax_layer(self.softmax_window)._layer_type
        return [types.get(name, softmax) for name in self.mixer_types]

    @layer_types.setter
    def layer_types(self, value: Any) -> None:
        """Nothing: a stock config with a field of this name sets it, and ours follow from the mixers."""

    def validate_layer_type(self) -> None:
        """Replaces the stock whitelist of layer types; `prepare_mixers` has checked ours."""
