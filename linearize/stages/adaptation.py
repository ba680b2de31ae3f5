"""Fit the range scalers of gain-cell attention to statistics, without gradients.

Two uses. `start_from_moments` puts a stock model's queries, keys and values into the cells' ranges and its outputs
near the teacher's, before any training. `adapt_scalers` makes a model of one cell behave like a trained model of
another: its scalers are solved for until what comes out of each has the other's mean and deviation per head.

Source: the statistics matching of Leroux et al. 2025 (arXiv 2409.19315), which damps a fixed step; here each step
solves for the moments, over many batches and all processes, and a step that makes things worse is taken back.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.config.settings import AdaptationConfig
from linearize.conversion.gain_cells import Moments, Statistics
from linearize.errors import UserError
from linearize.evaluation.arms import input_device, measuring, unwrap
from linearize.evaluation.next_token import token_losses

MECHANISM = "gain_cell"
SCALERS = ("query_scaler", "key_scaler", "value_scaler", "output_scaler")
STALL = 4  # steps without a new best before the steps get shorter
SHORTER = 0.7
STATISTICS = "scaler_statistics.safetensors"


@dataclass
class AdaptationReport:
    """What an adaptation did; plain data.

    Fields: residuals, the largest distance from a target before each step and at the end; losses, the cross-entropy of
    the blocks (nats per token) beside them; layers, the final residual of each scaler by layer; converged, whether
    the tolerance was reached; best, the iteration whose scalers were kept.
    """

    residuals: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    layers: dict[int, dict[str, float]] = field(default_factory=dict)
    converged: bool = False
    best: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


class _Sums:
    """Count, sum and sum of squares per head, reduced over processes when asked for."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Take `(B, heads, T, D)`."""
        x = x.detach().double()
        sums = torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))])
        self.sums = sums if self.sums is None else self.sums + sums
        self.count += x.numel() // x.shape[1]

    def moments(self) -> Moments:
        assert self.sums is not None, "something was measured"
        sums = over_processes(torch.cat([self.sums, torch.full_like(self.sums[:1], self.count)]))
        mean = sums[0] / sums[2]
        return Moments(mean, (sums[1] / sums[2] - mean.square()).clamp(min=0).sqrt())


def over_processes(x: Tensor) -> Tensor:
    """The sum over all processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
    return x


def scalers_of(model: Any) -> dict[str, Any]:
    """Every range scaler by layer and name.

    Raises:
        UserError: the model has no gain-cell layer.
    """
    found: dict[str, Any] = {}
    for attention in unwrap(model).mixer_attentions() if hasattr(unwrap(model), "mixer_attentions") else ():
        if attention.config.mixer(attention.layer_idx).type == MECHANISM:
            found |= {f"{attention.layer_idx}.{name}": getattr(attention.mixer, name) for name in SCALERS}
    if not found:
        raise UserError("The model has no gain-cell layer: convert it with attention type gain_cell first.")
    return found


def collect_statistics(model: Any, blocks: Any, batch_size: int = 1) -> Statistics:
    """Moments after every scaler, in the student's arm, over all blocks and processes."""
    return _pass(model, blocks, batch_size)[1]


def save_statistics(statistics: Statistics, folder: str | os.PathLike[str]) -> Path:
    """Write them beside a student."""
    from linearize.files import write_file

    path = Path(folder, STATISTICS)
    write_file(path, statistics_bytes(statistics))
    return path


def statistics_bytes(statistics: Statistics) -> bytes:
    """Contents of the file that `load_statistics` reads."""
    from safetensors.torch import save

    return save({f"{name}.{part}": x.cpu() for name, m in statistics.items() for part, x in m._asdict().items()})


def load_statistics(folder: str | os.PathLike[str]) -> Statistics:
    """Read what `save_statistics` wrote.

    Raises:
        UserError: there is none.
    """
    from safetensors.torch import load_file

    path = Path(folder, STATISTICS)
    if not path.is_file():
        raise UserError(f"{folder} has no {STATISTICS}: collect the statistics of the linear-cell student first.")
    tensors = load_file(path)
    names = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    return {name: Moments(tensors[f"{name}.mean"], tensors[f"{name}.std"]) for name in names}


# --- before any training


def calibrate_gain_cells(model: Any, layers: dict[int, Any], rows: Sequence[Any], batch_size: int) -> None:
    """`start_from_moments` of gain cells; each process looks at its share of the rows."""
    from accelerate import PartialState

    start_from_moments(model, share_of(rows, len(rows), PartialState()), batch_size)


def share_of(rows: Any, count: int, state: Any) -> list[Any]:
    """This process's part of the first `count` rows.

    Raises:
        UserError: there is not one for each process.
    """
    count = min(count, len(rows))
    if count < state.num_processes:
        raise UserError(
            f"Gain cells are fitted to {count} sequences, and each of {state.num_processes} processes needs one: "
            "raise sequences, or give more text."
        )
    return [rows[i] for i in range(state.process_index, count, state.num_processes)]


def with_settings(student: Any, changes: Mapping[str, Any]) -> Any:
    """A gain-cell student of the same weights, whose mechanism has other settings.

    Args:
        changes: of every mechanism, such as `{"cell_kind": "nonlinear"}`.
    """
    config = type(student.config).from_dict(student.config.to_dict())
    for settings in config.mixers.values():
        settings.update(changes)
    config.prepare_mixers()
    other = type(student)(config).to(student.device)
    other.load_state_dict(student.state_dict())
    other.generation_config = student.generation_config
    other.name_or_path = student.name_or_path
    return other.eval()


@torch.no_grad()
def start_from_moments(model: Any, blocks: Any, batch_size: int = 1, deviations: float = 2.0) -> None:
    """Set every scaler from the teacher's numbers: `deviations` of queries, keys and values on either side fit into
    their ranges, and the output is the least-squares fit per head to the teacher's attention output.
    """
    scalers = scalers_of(model)
    sums: dict[str, _Sums] = {name: _Sums() for name in scalers}

    def meter(attention, query, key, value, teacher_output, padding_mask):
        for name, x in zip(SCALERS, (query, key, value), strict=False):
            sums[f"{attention.layer_idx}.{name}"].add(x)

    _observe_teacher(model, blocks, batch_size, meter)
    for attention in unwrap(model).mixer_attentions():
        cell = getattr(attention.mixer, "cell", None)
        ranges = (cell.input_range, cell.weight_range, cell.weight_range) if cell else ()
        for name, (low, high) in zip(SCALERS, ranges, strict=False):
            target = torch.full_like(scalers[f"{attention.layer_idx}.{name}"].scale, (high - low) / (2 * deviations))
            middle = torch.full_like(target, (low + high) / 2)
            _solve(
                scalers[f"{attention.layer_idx}.{name}"],
                sums[f"{attention.layer_idx}.{name}"].moments(),
                Moments(middle.double(), target.double()),
            )
    _fit_outputs(model, blocks, batch_size, scalers)


def _fit_outputs(model, blocks, batch_size, scalers) -> None:
    """Least squares of the teacher's output on the cells', per head; one that anticorrelates keeps its mean only."""
    products: dict[int, Tensor] = {}

    def meter(attention, query, key, value, teacher_output, padding_mask):
        if f"{attention.layer_idx}.output_scaler" not in scalers:
            return
        scaler = attention.mixer.output_scaler
        y = attention.mixer(query, key, value, padding_mask=padding_mask).double()
        y, t = (y - scaler.offset[:, None, None]) / scaler.scale[:, None, None], teacher_output.double()
        terms = [torch.ones_like(y), y, t, y * y, y * t]
        found = torch.stack([term.sum((0, 2, 3)) for term in terms])
        products[attention.layer_idx] = products.get(attention.layer_idx, 0) + found

    for name, scaler in scalers.items():
        if name.endswith("output_scaler"):
            scaler.scale.fill_(1.0)
            scaler.offset.fill_(0.0)
    _observe_teacher(model, blocks, batch_size, meter)
    for layer, found in products.items():
        count, y, t, yy, yt = over_processes(found)
        variance = (yy / count - (y / count).square()).clamp(min=1e-12)
        slope = ((yt / count - y * t / count.square()) / variance).clamp(min=1e-3)
        scaler = scalers[f"{layer}.output_scaler"]
        scaler.scale.copy_(slope)
        scaler.offset.copy_(t / count - slope * y / count)


def _observe_teacher(model: Any, blocks: Any, batch_size: int, observer: Callable[..., None]) -> None:
    with measuring(model, "teacher") as base:
        attentions = base.mixer_attentions()
        for attention in attentions:
            attention.observer = observer
        try:
            for input_ids, _ in _batches(base, blocks, batch_size):
                base.base_model(input_ids=input_ids, use_cache=False)
        finally:
            for attention in attentions:
                attention.observer = None


# --- from one cell to another


@torch.no_grad()
def adapt_scalers(
    model: Any,
    targets: Mapping[str, Moments],
    blocks: Any,
    config: AdaptationConfig | None = None,
    on_step: Callable[[int, float, float], None] | None = None,
) -> AdaptationReport:
    """Solve for the scalers until their outputs have the targets' moments; the best scalers found stay in the model.

    Every step measures all scalers in one pass and solves each for its own target. A layer's inputs change with the
    layers before it, so a step is exact from the first layer on, one more layer settling with each.

    Args:
        model: a gain-cell student; its scalers may start anywhere.
        targets: of the student that it is to resemble, from `collect_statistics`.
        blocks: text to measure on, as `perplexity` takes it; each process its own part.
        on_step: called with iteration, residual and cross-entropy.

    Raises:
        UserError: targets of another model, targets of nothing (a deviation of 0 everywhere), or numbers that are not
            finite.
    """
    config = config or AdaptationConfig()
    scalers = scalers_of(model)
    _check_targets(scalers, targets)
    report, damping, worse = AdaptationReport(), config.damping, 0
    best, kept = math.inf, _values(scalers)
    for iteration in range(config.iterations + 1):
        loss, found = _pass(model, blocks, config.batch_size)
        residuals = {name: _residual(found[name], targets[name]) for name in scalers}
        residual = max(residuals.values())
        report.residuals.append(residual)
        report.losses.append(loss)
        if on_step is not None:
            on_step(iteration, residual, loss)
        if residual < best:
            best, kept, worse, report.best = residual, _values(scalers), 0, iteration
            report.layers = _by_layer(residuals)
        else:
            worse += 1
            # Diverging, or caught between two levels of a quantiser: back to the best, with shorter steps.
            if not math.isfinite(residual) or residual > 2 * best or worse % STALL == 0:
                _restore(scalers, kept)
                damping *= SHORTER
                found = _pass(model, blocks, config.batch_size)[1]
        if best <= config.tolerance or worse >= config.patience or iteration == config.iterations:
            break
        for name, scaler in scalers.items():
            _solve(scaler, _before(scaler, found[name]), targets[name], damping)
    _restore(scalers, kept)
    report.converged = best <= config.tolerance
    if not math.isfinite(best):
        raise UserError("The adaptation found no finite numbers: the model's weights or the text give NaN.")
    return report


def _pass(model: Any, blocks: Any, batch_size: int) -> tuple[float, Statistics]:
    """Cross-entropy of the blocks in the student's arm, and the moments after every scaler."""
    scalers = scalers_of(model)
    sums: dict[str, _Sums] = {name: _Sums() for name in scalers}
    losses = torch.zeros(2, dtype=torch.float64)
    with measuring(model, "mixed") as base, contextlib.ExitStack() as hooks:
        for name, scaler in scalers.items():
            handle = scaler.register_forward_hook(lambda module, args, output, name=name: sums[name].add(output))
            hooks.callback(handle.remove)
        for input_ids, targets in _batches(base, blocks, batch_size):
            hidden = base.base_model(input_ids=input_ids, use_cache=False)[0][:, :-1]
            nll, scored = token_losses(base.get_output_embeddings(), hidden, targets)
            losses += torch.stack([nll.sum(), scored.sum().double()]).cpu()
    moments = {name: total.moments() for name, total in sums.items()}
    device = next(iter(moments.values())).mean.device
    total = over_processes(losses.to(device))
    return float(total[0] / total[1]), moments


def _batches(base: Any, blocks: Any, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids `(B, L)` and the targets of all but the last `(B, L - 1)`."""
    for start in range(0, len(blocks), batch_size):
        rows = [blocks[i] for i in range(start, min(start + batch_size, len(blocks)))]
        input_ids = torch.stack([row["input_ids"] for row in rows]).to(input_device(base))
        yield input_ids, torch.stack([row["labels"] for row in rows])[:, 1:].to(input_ids.device)


def _check_targets(scalers: Mapping[str, Any], targets: Mapping[str, Moments]) -> None:
    if odd := sorted(set(scalers) ^ set(targets)):
        raise UserError(f"The statistics are those of another model: {len(odd)} scalers differ, first {odd[0]}.")
    for name, scaler in scalers.items():
        if targets[name].mean.shape != scaler.scale.shape:
            raise UserError(f"The statistics are those of another model: {name} has another number of heads.")
        if not (torch.isfinite(targets[name].mean).all() and torch.isfinite(targets[name].std).all()):
            raise UserError(f"The statistics of {name} are not finite: collect them again.")
        if not targets[name].std.any():
            raise UserError(f"The statistics of {name} are all 0: nothing was collected, or the layer is dead.")


def _before(scaler: Any, after: Moments) -> Moments:
    """Moments of a scaler's input, from those of its output."""
    scale, offset = scaler.scale.detach().double().clamp(min=1e-20), scaler.offset.detach().double()
    return Moments((after.mean - offset) / scale, after.std / scale)


def _solve(scaler: Any, before: Moments, target: Moments, damping: float = 1.0) -> None:
    """Move a scaler towards the one that gives its input the target's moments; heads that are silent keep theirs."""
    target = Moments(*(x.to(before.mean) for x in target))
    alive = (before.std > 1e-12) & (target.std > 0)
    old = scaler.scale.detach().double()
    scale = torch.where(alive, target.std / before.std.clamp(min=1e-12), old)
    scale = old + damping * (scale - old)
    offset = target.mean - scale * before.mean
    scaler.offset.copy_(scaler.offset + damping * (offset - scaler.offset) if damping < 1 else offset)
    scaler.scale.copy_(scale)


def _residual(found: Moments, target: Moments) -> float:
    """Largest distance of a head's mean and deviation from the target's, in units of the target's deviation."""
    mean, std = (x.to(found.mean) for x in target)
    unit = std.clamp(min=1e-3 * float(std.max()))
    distance = torch.maximum((found.mean - mean).abs(), (found.std - std).abs()) / unit
    return float(distance.max()) if torch.isfinite(distance).all() else math.inf


def _by_layer(residuals: Mapping[str, float]) -> dict[int, dict[str, float]]:
    layers: dict[int, dict[str, float]] = {}
    for name, residual in residuals.items():
        layer, _, scaler = name.partition(".")
        layers.setdefault(int(layer), {})[scaler] = residual
    return layers


def _values(scalers: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (s.scale.detach().clone(), s.offset.detach().clone()) for name, s in scalers.items()}


def _restore(scalers: Mapping[str, Any], values: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    for name, scaler in scalers.items():
        scaler.scale.copy_(values[name][0])
        scaler.offset.copy_(values[name][1])


def plot_adaptation(report: AdaptationReport, path: str | os.PathLike[str]) -> None:
    """Largest residual and cross-entropy over the iterations, the one whose scalers were kept marked."""
    from matplotlib.figure import Figure

    from linearize.training.log import write_figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    curves = {
        "largest residual, deviations of the target": report.residuals,
        "cross-entropy, nats per token": report.losses,
    }
    for axes, (label, values) in zip(figure.subplots(1, 2), curves.items(), strict=True):
        axes.plot(values, marker="." if len(values) < 30 else "")
        axes.plot(report.best, values[report.best], "o", color="tab:red", label=f"kept: iteration {report.best}")
        axes.set(xlabel="iteration", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle("The adapted cells' scalers, fitted to the statistics of the cells before", fontsize=11)
    if all(0 < residual < math.inf for residual in report.residuals):
        figure.axes[0].set_yscale("log")
    write_figure(figure, path)
