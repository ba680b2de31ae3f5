"""The loss of attention transfer, taken layer by layer while the teacher's forward runs.

Each converted attention computes the teacher's softmax output, which flows on to the next layer, and calls an observer
with the same queries, keys and values. The observer runs the student's mechanism on them and, at once, the backward of
this layer's loss: its graph is gone before the next layer starts, so the peak memory is that of one layer. The layers
are independent problems, because every layer sees the teacher's hidden states (LoLCATs: https://arxiv.org/abs/2410.10254,
section 3.1).

Each loss is a sum over a scale, and both are those of the whole step: however its sequences are cut into micro-batches
and shared out over processes, loss and gradients are the same. The scale is known only at the end of the step, so the
gradients are taken by that of the first micro-batch, and put right by one factor a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

LossFunction = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None"], "LossParts"]


class _SquaredDistance(torch.autograd.Function):
    """Sum of squared differences, which keeps one tensor: the differences in the outputs' own dtype.

    Everything else is in float32 at least: the squares, their sum, and the product that is the gradient. (Written as
    tensor operations, each would be a float32 tensor of twice the outputs' bytes in half precision.)
    """

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        difference = student - teacher
        ctx.save_for_backward(difference)
        return _sum_of_squares(difference)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (difference,) = ctx.saved_tensors
        # A factor with a dimension keeps its precision; `out` rounds the product once and in the same pass.
        factor = (2.0 * gradients[0]).reshape(1)
        return torch.mul(difference, factor, out=torch.empty_like(difference)), None


def _sum_of_squares(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 at least, without a copy of the tensor in it."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return torch.linalg.vector_norm(tensor, dim=-1, dtype=dtype).square().sum()


def _zero_padding(tensor: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
    """0 where padded (padded places may hold NaN, which a product with 0 would keep)."""
    return tensor if padding_mask is None else tensor.masked_fill(~padding_mask.bool()[:, None, :, None], 0.0)


def _real_places(tensor: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
    """How many of the numbers `(B, H, T, ...)` belong to real tokens."""
    if padding_mask is None:
        return torch.full((), tensor.numel(), dtype=torch.float64, device=tensor.device)
    return padding_mask.bool().sum().clamp_min(1).double() * (tensor.numel() // padding_mask.numel())


class LossParts(NamedTuple):
    """A loss as a fraction, so that it can be taken over more than one micro-batch: scalars."""

    error: torch.Tensor
    """Summed over real tokens, in float32 or better; differentiable with respect to the student's output."""
    scale: torch.Tensor
    """What the sum over all micro-batches is divided by, summed alike."""

    def mean(self) -> torch.Tensor:
        """The loss of this micro-batch alone."""
        return self.error / self.scale.to(self.error.dtype)


def relative_mse(student: torch.Tensor, teacher: torch.Tensor, padding_mask: torch.Tensor | None) -> LossParts:
    """Squared error over the square of the teacher's output: 1 is the loss of an output of zeros.

    Args:
        student, teacher: outputs of the attention before its output projection, `(B, H, T, D)`.
        padding_mask: `(B, T)`, True at real tokens, or None: all are.
    """
    student, teacher = _zero_padding(student, padding_mask), _zero_padding(teacher, padding_mask)
    scale = _sum_of_squares(teacher)
    scale = scale.clamp_min(teacher.numel() * torch.finfo(scale.dtype).tiny)
    return LossParts(_SquaredDistance.apply(student, teacher), scale)


def mse(student: torch.Tensor, teacher: torch.Tensor, padding_mask: torch.Tensor | None) -> LossParts:
    """Mean squared error over real tokens, heads and dimensions; arguments as in `relative_mse`."""
    student, teacher = _zero_padding(student, padding_mask), _zero_padding(teacher, padding_mask)
    return LossParts(_SquaredDistance.apply(student, teacher), _real_places(student, padding_mask))


def cosine(student: torch.Tensor, teacher: torch.Tensor, padding_mask: torch.Tensor | None) -> LossParts:
    """Mean over real tokens and heads of 1 - cosine similarity; arguments as in `relative_mse`."""
    student, teacher = _zero_padding(student, padding_mask), _zero_padding(teacher, padding_mask)
    dtype = torch.promote_types(student.dtype, torch.float32)
    distance = 1.0 - nn.functional.cosine_similarity(student.to(dtype), teacher.to(dtype), dim=-1)
    if padding_mask is not None:
        distance = distance.masked_fill(~padding_mask.bool()[:, None, :], 0.0)
    return LossParts(distance.sum(), _real_places(distance, padding_mask))


LOSSES: dict[str, LossFunction] = {"relative_mse": relative_mse, "mse": mse, "cosine": cosine}


def branch_weights(branch: str, hide_window: bool = False) -> dict[str, float]:
    """Which arms of the student a step trains, and the weight of each in the sum.

    Args:
        branch: "mixed" trains the output as it will be used, "linear" the linear branch alone over all visible keys,
            "both" the sum of the two losses.
        hide_window: the linear arm takes the place of the mixed output in this step (window dropout).
    """
    arms = {"both": ("mixed", "linear"), "mixed": ("mixed",), "linear": ("linear",)}[branch]
    weights: dict[str, float] = {}
    for arm in arms:
        arm = "linear" if hide_window else arm
        weights[arm] = weights.get(arm, 0.0) + 1.0
    return weights


def model_inputs(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What of a batch a model reads: tokens, and where there are such, the mask and the positions of its texts."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}


class LayerLosses:
    """Observes the teacher's forward and collects each layer's losses: `with LayerLosses(model, ...) as losses`.

    Inside the block the model is in its teacher arm. The loss of a step is the mean over layers of the weighted sum
    over arms.

    Args:
        model: a converted model.
        loss: a name in `LOSSES`.
        loss_scale: factor on each loss (1000 for the published MSE).
        immediate: backward of each loss as soon as it is known. False keeps all graphs until the forward is over and
            runs one backward on their sum: the same gradients, for the memory of all layers.
    """

    def __init__(self, model: Any, loss: str, loss_scale: float = 1.0, immediate: bool = True) -> None:
        self.model = model
        self.attentions = model.mixer_attentions()
        self.layers: list[int] = [attention.layer_idx for attention in self.attentions]
        self.loss_function, self.loss_scale, self.immediate = LOSSES[loss], loss_scale, immediate
        self._places = {layer: place for place, layer in enumerate(self.layers)}
        self._weights: Mapping[str, float] = {}
        self._gradient_factor: float | None = None
        self._graphs: list[torch.Tensor] = []
        self._parts: dict[str, list[list[LossParts]]] = {}

    def __enter__(self) -> LayerLosses:
        self._arm = self.model.use_arm("teacher")
        self._arm.__enter__()
        for attention in self.attentions:
            attention.observer = self._observe
        return self

    def __exit__(self, *exception: Any) -> None:
        for attention in self.attentions:
            attention.observer = None
        self._graphs = []
        self._arm.__exit__(*exception)

    def run(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        *,
        weights: Mapping[str, float],
        gradient_factor: float | None,
    ) -> None:
        """Runs the teacher over a micro-batch, notes each layer's losses and adds to the gradients.

        Nothing here waits for the GPU.

        Args:
            input_ids: `(B, T)`.
            attention_mask: `(B, T)`, 1 at real tokens, or None: all are.
            position_ids: `(B, T)` that start again with each text, where a row's texts are kept apart; or None.
            weights: arm -> weight, see `branch_weights`; the same in all micro-batches of a step.
            gradient_factor: factor on the gradients; None: no gradients. They are those of this process alone, by the
                scale of its first micro-batch of the step: see `totals` and `first_scales`.
        """
        self._weights, self._gradient_factor = weights, gradient_factor
        with torch.no_grad():
            given = {"attention_mask": attention_mask, "position_ids": position_ids}
            self.model.base_model(input_ids=input_ids, **given, use_cache=False)
        if self._graphs:
            torch.stack(self._graphs).sum().backward()
            self._graphs = []

    def first_scales(self, device: torch.device) -> torch.Tensor:
        """The scale of each layer in the step's first micro-batch, by which the gradients were taken: `(layers,)`."""
        by_layer = next(iter(self._parts.values()))
        return torch.stack([parts[0].scale.to(device).double() for parts in by_layer])

    def totals(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Sums over the micro-batches since the last call, by arm: errors and scales, `(2, layers)` in float64, which
        processes may add up; the loss is their fraction. Starts anew."""
        totals = {}
        for arm, by_layer in self._parts.items():
            sums = [[sum_of(column, device) for column in zip(*parts, strict=True)] for parts in by_layer]
            totals[arm] = torch.stack([torch.stack(pair) for pair in sums], dim=1)
        self._parts = {}
        return totals

    def means(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The losses of the micro-batches since the last call, by arm: `(layers,)` in float64. Starts anew."""
        return {arm: error / scale for arm, (error, scale) in self.totals(device).items()}

    def _observe(
        self,
        attention: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        teacher_output: torch.Tensor,
        padding_mask: torch.Tensor | None,
        packing: Any = None,
        **context: torch.Tensor,
    ) -> None:
        place = self._places[attention.layer_idx]
        for arm, weight in self._weights.items():
            noted = self._parts.setdefault(arm, [[] for _ in self.layers])[place]
            with torch.set_grad_enabled(self._gradient_factor is not None):
                given = {"padding_mask": padding_mask, "packing": packing, **context}
                student = attention.mix(query, key, value, arm=arm, **given)
                error, scale = self.loss_function(student, teacher_output, padding_mask)
                if self._gradient_factor is not None:
                    loss = LossParts(error, noted[0].scale if noted else scale).mean() * self.loss_scale
                    self._add_gradients(loss * (weight * self._gradient_factor / len(self.layers)))
            noted.append(LossParts(error.detach() * self.loss_scale, scale))

    def _add_gradients(self, loss: torch.Tensor) -> None:
        if self.immediate:
            loss.backward()
        else:
            self._graphs.append(loss)


def sum_of(values: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The sum of scalars, in float64."""
    return torch.stack([value.to(device) for value in values]).double().sum()
