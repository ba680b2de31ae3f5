"""What the parts of `measure_llama_shapes.py` share: random models of known shapes, times, memory, and the record."""

import gc
import json
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from linearize.modeling import LinearizedLlamaConfig, LinearizedLlamaForCausalLM

COMMON = {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
SHAPES = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    "smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 97,
        "rope_theta": 10000.0,
    },
}
"""Llama-3-8B, SmolLM2-135M, and one that tries the script out on a CPU."""


def student_config(shape: str, layers: int | None = None, attention: dict | None = None) -> LinearizedLlamaConfig:
    """The config of a converted model of a shape; `attention` overrides our default settings."""
    fields = {**COMMON, **SHAPES[shape]}
    fields["num_hidden_layers"] = layers or fields["num_hidden_layers"]
    rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    mixers = {"linear": {"type": "linear", **(attention or {})}}
    return LinearizedLlamaConfig(**fields, rope_parameters=rope, mixers=mixers)


def random_student(config: LinearizedLlamaConfig, device: str) -> LinearizedLlamaForCausalLM:
    """A converted model on the device, never on the CPU before: bf16 weights of std 0.02, the mechanism in float32.

    The maps start where a conversion starts them. A CPU's model is float32 throughout.
    """
    model = _on_device(config, device)
    for attention in model.mixer_attentions():
        for module in attention.mixer.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return model


def stock_twin(student: LinearizedLlamaForCausalLM, config: LinearizedLlamaConfig) -> LlamaForCausalLM:
    """The stock Llama with the student's weights, in the same memory."""
    fields = config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "dtype", "mixers", "mixer_types"):
        fields.pop(name, None)
    fields.pop("layer_types", None)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**fields))
    weights = {name: tensor for name, tensor in student.state_dict().items() if ".mixer." not in name}
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    assert not unexpected and all(name == "lm_head.weight" for name in missing), (missing, unexpected)
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config).to(student.device)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _on_device(config: LinearizedLlamaConfig, device: str) -> LinearizedLlamaForCausalLM:
    """Built without memory, then given memory and random weights where it will run."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = LinearizedLlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model = model.to_empty(device=device)
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    for name, parameter in model.named_parameters():
        if ".mixer." not in name:
            parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    model.config.dtype = dtype
    return model.eval()


class Clock:
    """Medians of times on the device, and the memory that it holds."""

    def __init__(self, device: str):
        self.gpu = device == "cuda"

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def milliseconds(self, work: Callable[[], object], repeats: int, calls: int = 1) -> float:
        """Median time of a call, in device time on a GPU (which counts waiting for the host's launches).

        Args:
            work: what is timed; two calls of it come before the measurement.
            repeats: measurements.
            calls: calls in each, one after the other without waiting.
        """
        times = []
        for i in range(2 + repeats):
            self.wait()
            before = self.mark()
            for _ in range(1 if i < 2 else calls):
                work()
            after = self.mark()
            self.wait()
            if i >= 2:
                times.append(self.between(before, after) / calls)
        return statistics.median(times)

    def mark(self):
        """A point in the device's time."""
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, before, after) -> float:
        """Milliseconds between two marks that the device has passed."""
        return before.elapsed_time(after) if self.gpu else 1e3 * (after - before)

    def launch_milliseconds(self, work: Callable[[], object]) -> float:
        """Host time of one call: where it comes near the device time, the GPU waits for the host."""
        self.wait()
        started = time.perf_counter()
        work()
        elapsed = 1e3 * (time.perf_counter() - started)
        self.wait()
        return elapsed

    def clear(self) -> None:
        """Gives unused memory back and starts the peak anew."""
        gc.collect()
        if self.gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def free_bytes(self) -> int:
        """What an allocation can still take."""
        return torch.cuda.mem_get_info()[0] if self.gpu else 2**30

    def memory(self) -> dict[str, float]:
        """GB: tensors at the highest point since `clear`, and all that the GPU holds."""
        if not self.gpu:
            return {}
        free, total = torch.cuda.mem_get_info()
        return {
            "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
            "in_use_gb": round((total - free) / 1e9, 2),
        }


class Spans:
    """Device time by name of the functions that it wraps."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.marks: dict[str, list] = {}

    def wrap(self, name: str, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            before = self.clock.mark()
            try:
                return function(*args, **kwargs)
            finally:
                self.marks.setdefault(name, []).append((before, self.clock.mark()))

        return timed

    def totals(self) -> dict[str, float]:
        """Milliseconds by name, over all calls so far; starts anew."""
        self.clock.wait()
        totals = {
            name: sum(self.clock.between(before, after) for before, after in pairs)
            for name, pairs in self.marks.items()
        }
        self.marks = {}
        return totals


class Record:
    """The figures, printed as they come and on disk after every one."""

    def __init__(self, path: Path, head: dict):
        self.path, self.data = path, {**head, "rows": []}
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, **row) -> None:
        row = {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
        self.data["rows"].append(row)
        self.path.write_text(json.dumps(self.data, indent=1))
        say(" ".join(f"{name}={value}" for name, value in row.items() if not isinstance(value, dict)))
        for name, value in row.items():
            if isinstance(value, dict) and value:
                say(f"    {name}: " + ", ".join(f"{key} {_short(figure)}" for key, figure in value.items()))


def _short(figure) -> str:
    return f"{figure:.3f}" if isinstance(figure, float) else str(figure)


STARTED = time.perf_counter()


def say(text: str) -> None:
    """A line with the seconds since the start, at once."""
    print(f"[{time.perf_counter() - STARTED:6.1f} s] {text}", flush=True)


@contextmanager
def attempt(record: Record, **row):
    """A part that may fail without ending the run: its error becomes a row."""
    try:
        yield
    except Exception as error:
        record.add(**row, error=f"{type(error).__name__}: {error}"[:500])
