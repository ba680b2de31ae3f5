"""A file in the published code's layout, its own forward written out, and what the import makes of it."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from linearize.cli import main
from linearize.conversion.importers.gain_cell import import_gain_cell
from linearize.errors import UserError
from linearize.stages.adaptation import load_statistics

LAYERS, HEADS, WIDTH, POSITIONS, VOCABULARY = 2, 2, 16, 128, 61
SETTINGS = {
    "attention": "LinearDRAMAttention",
    "n_head": HEADS,
    "quantization_levels_input": 16,
    "quantization_levels_weights": 8,
    "quantization_levels_output": 32,
    "decay_factor": 1.6e-4,
    "sliding_window_size": 128,
}


def published_weights(seed=0):
    """nanoGPT's names and layout; scalers of the shape (1, heads, 1, 1), masks and fixed scalers beside them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, std=0.2):
        return std * torch.randn(*shape, generator=generator)

    weights = {"transformer.wte.weight": normal(VOCABULARY, WIDTH), "transformer.wpe.weight": normal(POSITIONS, WIDTH)}
    for layer in range(LAYERS):
        at = f"transformer.h.{layer}."
        for name, out, width in (
            ("attn.c_attn", 3 * WIDTH, WIDTH), ("attn.c_proj", WIDTH, WIDTH),
            ("mlp.c_fc", 4 * WIDTH, WIDTH), ("mlp.c_proj", WIDTH, 4 * WIDTH),
        ):  # fmt: skip
            weights |= {f"{at}{name}.weight": normal(out, width), f"{at}{name}.bias": normal(out)}
        for name in ("ln_1", "ln_2"):
            weights |= {f"{at}{name}.weight": 1 + normal(WIDTH), f"{at}{name}.bias": normal(WIDTH)}
        for name, scale, offset in (("q", 1.0, 0.5), ("k", 0.5, 0.45), ("v", 0.5, 0.45), ("output", 2.0, 0.1)):
            scaler = f"{at}attn.{name}_scaler."
            weights[scaler + "a"] = scale + normal(1, HEADS, 1, 1, std=0.05)
            weights[scaler + "b"] = offset + normal(1, HEADS, 1, 1, std=0.05)
            weights[scaler + "target_std"] = 0.2 + normal(1, HEADS, 1, 1, std=0.01).abs()
            weights[scaler + "target_mean"] = normal(1, HEADS, 1, 1)
        weights |= {f"{at}attn.bias": torch.ones(1, 1, 8, 8), f"{at}attn.NL_scaler.a": torch.tensor([1 / 80])}
    weights |= {"transformer.ln_f.weight": 1 + normal(WIDTH), "transformer.ln_f.bias": normal(WIDTH)}
    return weights | {"lm_head.weight": weights["transformer.wte.weight"]}


def published_forward(weights, ids):
    """The published model: pre-norm blocks, exact GELU, linear cells in tiles of 64 tokens, the 33-value grid."""
    length = ids.shape[1]
    x = weights["transformer.wte.weight"][ids] + weights["transformer.wpe.weight"][:length]
    age = torch.arange(length)[:, None] - torch.arange(length)
    fade = torch.exp(-1.6e-4 * age.to(x))
    for layer in range(LAYERS):
        at = f"transformer.h.{layer}."

        def linear(x, name, at=at):
            return functional.linear(x, weights[f"{at}{name}.weight"], weights[f"{at}{name}.bias"])

        def norm(x, name, at=at):
            return functional.layer_norm(x, (WIDTH,), weights[f"{at}{name}.weight"], weights[f"{at}{name}.bias"])

        def scale(x, name, at=at):
            return weights[f"{at}attn.{name}_scaler.a"] * x + weights[f"{at}attn.{name}_scaler.b"]

        q, k, v = (
            y.unflatten(2, (HEADS, -1)).transpose(1, 2) for y in linear(norm(x, "ln_1"), "attn.c_attn").split(WIDTH, 2)
        )
        pulse = (scale(q, "q").clamp(0, 1) * 15).round() / 15
        kappa, nu = ((scale(y, n).clamp(0, 0.9) * 7 / 0.9).round() * 0.9 / 7 - 0.45 for y, n in ((k, "k"), (v, "v")))
        scores = (19.3 * (pulse @ kappa.mT) * fade / 80).clamp(0, 1).masked_fill(age < 0, 0.0) * fade
        total = 0
        for first in range(0, length, 64):
            y = 19.3 / 40 * scores[..., first : first + 64] @ nu[:, :, first : first + 64]
            total = total + (y.clamp(-1, 1) * 31 / 2).round() * 2 / 31
        mixed = scale(total, "output").transpose(1, 2).flatten(2)
        x = x + linear(mixed, "attn.c_proj")
        x = x + linear(functional.gelu(linear(norm(x, "ln_2"), "mlp.c_fc")), "mlp.c_proj")
    x = functional.layer_norm(x, (WIDTH,), weights["transformer.ln_f.weight"], weights["transformer.ln_f.bias"])
    return x @ weights["lm_head.weight"].T


def write(path, weights=None, **settings):
    config = SimpleNamespace(**{**SETTINGS, **settings})
    weights = published_weights() if weights is None else weights
    torch.save({"model": {f"_orig_mod.{n}": w for n, w in weights.items()}, "config": config, "iter_num": 3}, path)
    return path


@torch.no_grad()
def test_the_import_computes_what_the_original_does(tmp_path):
    model, statistics, _ = import_gain_cell(write(tmp_path / "ckpt.pt"))
    ids = torch.randint(0, VOCABULARY, (2, 100), generator=torch.Generator().manual_seed(1))
    weights = {name: tensor.double() for name, tensor in published_weights().items()}
    assert (model.double()(ids).logits - published_forward(weights, ids)).abs().max() < 1e-6
    assert model.config.activation_function == "gelu" and model.config.mixer(0).cell["output_grid"] == "published"
    assert torch.allclose(
        statistics["1.key_scaler"].std,
        published_weights()["transformer.h.1.attn.k_scaler.target_std"].flatten().double(),
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", ["LinearDRAMFlashAttention", "LinearDRAMAttention"])
def test_texts_of_a_single_tile_are_the_same_in_both_forms(tmp_path, kind):
    weights = published_weights()
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:60]
    model, _, read = import_gain_cell(write(tmp_path / "ckpt.pt", weights, attention=kind, sliding_window_size=60))
    ids = torch.randint(0, VOCABULARY, (2, 60), generator=torch.Generator().manual_seed(1))
    weights = {name: tensor.double() for name, tensor in weights.items()}
    assert read["window"] == 64 and read["cell_kind"] == "linear"
    assert (model.double()(ids).logits - published_forward(weights, ids)).abs().max() < 1e-6


def test_the_command_writes_a_repository(tmp_path, capsys):
    source = write(tmp_path / "ckpt.pt", attention="DRAMAttention", quantization_levels_output=2**32)
    assert main(["import", "gain-cell", str(source), str(tmp_path / "out")]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    settings = loaded.config.mixer(0)
    assert settings.cell_kind == "nonlinear" and settings.cell["output_levels"] is None
    assert loaded.config.tie_word_embeddings and set(load_statistics(tmp_path / "out")) >= {"0.query_scaler"}
    assert "tokenizer" in capsys.readouterr().out
    assert main(["import", "gain-cell", str(source), str(tmp_path / "out")]) == 2


def test_statistics_that_were_never_collected_are_left_out(tmp_path):
    weights = {n: torch.zeros_like(w) if "target" in n else w for n, w in published_weights().items()}
    assert import_gain_cell(write(tmp_path / "ckpt.pt", weights))[1] == {}


def without(weights, *names):
    return {name: weight for name, weight in weights.items() if name not in names}


@pytest.mark.parametrize(
    "weights, settings, sentence",
    [
        (None, {"attention": "SlidingWindowAttention"}, "SlidingWindowAttention"),
        (None, {"rope": True}, "rope"),
        (None, {"n_head": 4}, "inconsistent"),
        (None, {"sliding_window_size": 100}, "window is 100 tokens and its texts have up to 128"),
        (None, {"sliding_window_size": 64}, "window is 64 tokens and its texts have up to 128"),
        (None, {"attention": "LinearDRAMFlashAttention"}, "finetune it as LinearDRAMAttention"),
        (None, {"attention": "DRAMFlashAttention"}, "finetune it as DRAMAttention"),
        (published_weights() | {"transformer.h.0.attn.NL_scaler.a": torch.ones(1)}, {}, "NL_scaler.a .* is 1, but"),
        (without(published_weights(), "transformer.h.0.attn.q_scaler.a"), {}, "not a gain-cell GPT-2"),
        (without(published_weights(), "transformer.h.1.mlp.c_fc.weight"), {}, "incomplete"),
        (published_weights() | {"transformer.h.0.scale.weight": torch.ones(1)}, {}, "another layout"),
        (published_weights() | {"transformer.ln_f.weight": torch.ones(3)}, {}, "another layout"),
    ],
)
def test_other_files_are_one_sentence(tmp_path, weights, settings, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        import_gain_cell(write(tmp_path / "ckpt.pt", weights, **settings))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_checkpoints(tmp_path):
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    for name, sentence in (("none.pt", "no file"), ("text.pt", "cannot be read"), ("other.pt", "under 'model'")):
        with pytest.raises(UserError, match=sentence):
            import_gain_cell(tmp_path / name)
