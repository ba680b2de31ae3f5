"""The stage-1 part of `measure_llama_shapes.py`: tokens per second beside the teacher's forward alone."""

import contextlib
import statistics
import tempfile
import time
from pathlib import Path

import torch
from llama_shapes import Clock, Record, Spans, say
from torch import nn

from linearize.config.settings import TransferConfig
from linearize.data.sequences import TokenBlocks
from linearize.stages.transfer import mixer_parameters, training_only, transfer_attention
from linearize.stages.transfer_loss import LayerLosses, branch_weights

BARS = {"mixed": 0.7, "both": 0.6}


def measure_transfer(args, model, clock: Clock, record: Record) -> None:
    """Every length and branch: the teacher's forward, stage 1 as a run does it, and where a step's time goes."""
    tokens = args.tokens_per_step
    for length in args.lengths:
        batch = max(1, tokens // length)
        ids = torch.randint(3, model.config.vocab_size, (batch, length), device=model.device)
        repeats = max(2, args.steps // 2)
        teacher = _teacher_forward(model, ids, clock, repeats)
        for branch in args.branches:
            clock.clear()
            step, peak = _stage_one_step(args, model, length, branch)
            memory = clock.memory() | ({"stage_peak_gb": round(peak / 1e9, 2)} if peak else {})
            again = _teacher_forward(model, ids, clock, repeats)
            reference = min(teacher["ms"], again["ms"])
            record.add(
                part="stage1",
                length=length,
                batch=batch,
                branch=branch,
                teacher_tokens_per_second=1e3 * tokens / reference,
                tokens_per_second=1e3 * tokens / step,
                ratio=reference / step,
                bar=BARS[branch] if args.shape == "8b" else None,
                teacher_ms=reference,
                teacher_launch_ms=teacher["launch_ms"],
                step_ms=step,
                extra_ms_per_layer=(step - reference) / model.config.num_hidden_layers,
                memory=memory,
            )
            _breakdown(args, model, ids, branch, clock, record)


def _teacher_forward(model, ids, clock: Clock, repeats: int) -> dict[str, float]:
    """The body's forward alone (no head), as stage 1 runs it: no gradient, stock softmax attention."""

    def forward():
        model.model(input_ids=ids, use_cache=False)

    with torch.no_grad(), model.use_arm("teacher"):
        return {"ms": clock.milliseconds(forward, repeats), "launch_ms": clock.launch_milliseconds(forward)}


def _stage_one_step(args, model, length: int, branch: str) -> tuple[float, int | None]:
    """Median milliseconds of a step of `transfer_attention`, and its peak memory.

    Each step waits for its losses once, so that the times between two log lines are those of the GPU's work. The first
    steps compile the kernels.
    """
    batch = max(1, args.tokens_per_step // length)
    blocks = torch.randint(3, model.config.vocab_size, (2 * batch, length))
    config = TransferConfig(
        max_steps=args.warm_up + args.steps,
        batch_size=batch,
        tokens_per_step=batch * length,
        branch=branch,
        logging_steps=1,
    )
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        result = transfer_attention(
            model,
            TokenBlocks(blocks),
            config,
            output_dir=folder,
            device=None if args.device == "cuda" else "cpu",
            on_log=lambda _: ends.append(time.perf_counter()),
        )
    times = [1e3 * (after - before) for before, after in zip(ends[:-1], ends[1:], strict=True)]
    say(f"steps of {branch} at {length}: " + ", ".join(f"{ms:.0f}" for ms in times) + " ms")
    return statistics.median(times[args.warm_up - 1 :]), result.peak_memory_bytes


def _breakdown(args, model, ids, branch: str, clock: Clock, record: Record) -> None:
    """Device time of a step's parts per layer; the rest of the step beside them."""
    groups = mixer_parameters(model)
    parameters = [parameter for group in groups.values() for parameter in group.values()]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True if clock.gpu else None)
    weights = branch_weights(branch)
    spans = Spans(clock)
    layers = model.config.num_hidden_layers

    def update():
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with contextlib.ExitStack() as stack:
        stack.enter_context(training_only(model, parameters))
        losses = stack.enter_context(LayerLosses(model, "relative_mse"))
        _instrument(losses, spans, stack)
        forward = spans.wrap("forward", lambda: losses.run(ids, weights=weights, gradient_factor=1.0))
        timed_update = spans.wrap("update", update)
        for i in range(2 + args.steps // 2):
            if i == 2:
                spans.totals()
            forward()
            losses.means(model.device)
            timed_update()
        totals = {name: total / (args.steps // 2) for name, total in spans.totals().items()}
        launch = clock.launch_milliseconds(lambda: losses.run(ids, weights=weights, gradient_factor=1.0))
        totals["teacher's layers"] = totals["forward"] - totals["all of stage 1"]
        shares = {name: total / layers for name, total in totals.items() if name not in ("forward", "update")}
        record.add(
            part="stage1 by layer",
            length=ids.shape[1],
            branch=branch,
            ms_per_layer=shares,
            ms_per_step={name: totals[name] for name in ("forward", "update")} | {"launch of the forward": launch},
        )
        if args.profile:
            _profile(args, lambda: losses.run(ids, weights=weights, gradient_factor=1.0), ids.shape[1], branch)
        optimizer.zero_grad(set_to_none=True)


def _instrument(losses: LayerLosses, spans: Spans, stack: contextlib.ExitStack) -> None:
    """Puts a clock around what stage 1 adds to each layer, until the stack closes."""
    losses.loss_function = spans.wrap("loss", losses.loss_function)
    losses._add_gradients = spans.wrap("backward", losses._add_gradients)  # type: ignore[method-assign]
    for attention in losses.attentions:
        attention.observer = spans.wrap("all of stage 1", losses._observe)
        attention.mixer.forward = spans.wrap("student's forward", attention.mixer.forward)
        stack.callback(delattr, attention.mixer, "forward")


def _profile(args, work, length: int, branch: str) -> None:
    """The kernels of one micro-batch by their time, on the screen and in a file."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if args.device == "cuda" else [])
    with profile(activities=activities) as profiler:
        work()
        if args.device == "cuda":
            torch.cuda.synchronize()
    order = "self_device_time_total" if args.device == "cuda" else "self_cpu_time_total"
    events = profiler.key_averages()
    path = Path(args.output_dir, f"kernels-{args.shape}-{length}-{branch}.txt")
    path.write_text(events.table(sort_by=order, row_limit=60, max_name_column_width=90))
    kernels = [event for event in events if args.device != "cuda" or event.device_type.name == "CUDA"]
    kernels.sort(key=lambda event: -getattr(event, order))
    say(f"kernels of a micro-batch, {branch} at {length} (all in {path.name}):")
    for event in kernels[:16]:
        print(f"    {getattr(event, order) / 1e3:8.3f} ms {event.count:5d} x  {event.key[:100]}", flush=True)
