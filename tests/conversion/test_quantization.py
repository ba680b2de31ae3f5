"""4-bit and 8-bit bases, on the CPU: they load, both stages train on them, and the result merges into the full
weights."""

import importlib.util

import pytest
import torch
from finetuning_toys import LENGTH, MIXERS, settings, stock_llama, token_blocks

from linearize import UserError
from linearize.config.settings import TransferConfig
from linearize.conversion import convert
from linearize.conversion.quantization import is_quantized, quantization_config
from linearize.stages.adapters import merge, merge_into_unquantized
from linearize.stages.finetuning import finetune
from linearize.stages.transfer import transfer_attention

BITS = {"4bit": {"load_in_4bit": True}, "8bit": {"load_in_8bit": True}}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return stock_llama(
        tmp_path_factory.mktemp("stock"),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        tie_word_embeddings=True,
    )


def load(stock, bits, dtype=torch.float32):
    config = quantization_config(**BITS[bits], compute_dtype=dtype)
    return convert(stock, MIXERS["linear"], dtype=dtype, quantization_config=config)


@torch.no_grad()
def logits(model):
    ids = torch.randint(0, 96, (2, LENGTH), generator=torch.Generator().manual_seed(5))
    return model(input_ids=ids, use_cache=False).logits


def test_settings():
    four = quantization_config(load_in_4bit=True, compute_dtype=torch.float16)
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == ("nf4", True)
    assert four.bnb_4bit_compute_dtype == torch.float16
    assert quantization_config(load_in_8bit=True).load_in_8bit
    assert quantization_config() is None
    with pytest.raises(UserError, match="choose one"):
        quantization_config(load_in_4bit=True, load_in_8bit=True)


def test_missing_bitsandbytes_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest)
    )
    with pytest.raises(UserError, match=r"need bitsandbytes: install it with pip install 'linearize\[quant\]'"):
        quantization_config(load_in_4bit=True)


@pytest.mark.parametrize("bits", BITS)
def test_projections_are_quantised_and_mechanisms_are_not(stock, bits):
    model = load(stock, bits, torch.bfloat16)
    assert is_quantized(model)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.dtype in (torch.uint8, torch.int8)
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in attention.mixer.parameters()} == {torch.float32}


@pytest.mark.parametrize("bits", BITS)
def test_both_stages_train_and_merge_into_the_full_weights(stock, bits, tmp_path):
    model, blocks = load(stock, bits), token_blocks(4)
    transfer = TransferConfig(max_steps=6, tokens_per_step=4 * LENGTH, batch_size=4, logging_steps=1)
    layers = torch.tensor(transfer_attention(model, blocks, transfer, output_dir=tmp_path).losses_per_layer)
    assert layers[-1].mean() < layers[0].mean()
    after_transfer = {name: tensor.clone() for name, tensor in model.mixer_state_dict().items()}

    result = finetune(
        model, blocks, settings(max_steps=8, kl_weight=0.2, gradient_checkpointing=True), output_dir=tmp_path
    )
    assert result.losses[-1] < result.losses[0] - 0.05
    trained = {name: p for name, p in result.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32} and any("mixer" in name for name in trained)
    with pytest.raises(UserError, match="merge_into_unquantized"):
        merge(result.model)

    merged = merge_into_unquantized(result.model, stock, dtype=torch.float32)
    assert not is_quantized(merged) and merged.lm_head.weight is merged.model.embed_tokens.weight
    plain = convert(stock, MIXERS["linear"], dtype=torch.float32)
    assert set(merged.state_dict()) == set(plain.state_dict())
    for index, layer in enumerate(merged.model.layers):
        lora = result.model.get_base_model().model.layers[index].self_attn.v_proj
        delta = lora.lora_B["default"].weight @ lora.lora_A["default"].weight * lora.scaling["default"]
        full = plain.model.layers[index].self_attn.v_proj.weight
        torch.testing.assert_close(layer.self_attn.v_proj.weight, full + delta, rtol=0, atol=1e-6)
    moved = merged.mixer_state_dict()
    assert all(not torch.equal(moved[name], tensor) for name, tensor in after_transfer.items())
    # Equal up to the rounding of the base, which is smaller than what training did.
    assert (logits(merged) - logits(result.model)).norm() < 0.5 * (logits(merged) - logits(plain)).norm()


def test_an_evaluation_before_training_leaves_the_gradients(stock, monkeypatch):
    """bitsandbytes would repack the weights of a model that was evaluated, and pass no gradient through them."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)

    def gradient(evaluated: bool) -> torch.Tensor:
        model, ids = load(stock, "4bit"), token_blocks(1)[0]["input_ids"][None]
        if evaluated:
            logits(model)
        mixer = model.model.layers[0].self_attn.mixer.feature_map_q.weight
        model.requires_grad_(False)
        mixer.requires_grad_(True)
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return mixer.grad

    fresh = gradient(evaluated=False)
    assert fresh.abs().max() > 0
    assert torch.equal(gradient(evaluated=True), fresh)


def test_merging_into_a_converted_repository(stock, tmp_path):
    """The adapters of an unquantised run, too: equal to merging in place."""
    first = convert(stock, MIXERS["linear"], dtype=torch.float32)
    first.save_pretrained(tmp_path / "converted")
    result = finetune(first, token_blocks(), settings(train_mixers=False), output_dir=tmp_path)
    merged = merge_into_unquantized(result.model, tmp_path / "converted", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(merge(result.model)), rtol=0, atol=1e-6)
