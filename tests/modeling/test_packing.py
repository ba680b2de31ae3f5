"""Packed rows: every text gives what it gives alone, in all arms, by every way of saying where it starts."""

import pytest
import torch
from tiny_models import make_gpt2, make_gptj, make_mistral, make_student, make_teacher, perturb
from torch.nn import functional
from transformers import DynamicCache

from linearize.kernels.triton_support import interpreting
from linearize.modeling.packing import through_packing

TEACHERS = {"llama": make_teacher, "gpt2": make_gpt2, "gptj": make_gptj, "mistral": make_mistral}
SMALL_CELL = {"tile": 4, "leak": 0.01, "score_saturation": 4.0, "output_saturation": 4.0}
MODELS = {
    "linear": ({"linear": {"type": "linear", "window": 4, "sinks": 2}}, None),
    "cosine": ({"cosine": {"type": "cosine", "window": 4, "sinks": 2}}, None),
    "cosine-pure": ({"cosine": {"type": "cosine", "window": 0, "sinks": 0, "scale_side": "key"}}, None),
    "gain-cell": ({"gain_cell": {"type": "gain_cell", "window": 8, "cell": SMALL_CELL}}, None),
    "landmark": ({"landmark": {"type": "landmark", "block_size": 4, "top_k": 1}}, None),
    "landmark-token": ({"landmark": {"type": "landmark", "block_size": 3, "landmark_key": "token"}}, None),
    "landmark-by-tokens": ({"landmark": {"type": "landmark", "block_size": 4, "block_weight": "tokens"}}, None),
    "hybrid": ({"linear": {"type": "linear", "window": 4}}, ["linear", "softmax", "linear"]),
}
LENGTHS = (9, 1, 14, 2, 8)  # of the texts: shorter and longer than windows and blocks
TOKENS = sum(LENGTHS)


@pytest.fixture(params=MODELS)
def mixers(request):
    return MODELS[request.param]


def make_model(teacher, mixers):
    model = make_student(TEACHERS[teacher](), *mixers)
    perturb(model)
    return model.double()  # levels of cells turn rounding into whole steps


def keep_norms_wide(model):
    """In float64, where stock norms round to float32: gradients of this size would show that."""

    def wide(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = wide.__get__(module)


def make_texts():
    ids = torch.randint(3, 97, (1, TOKENS), generator=torch.Generator().manual_seed(3))
    return ids, list(ids.split(LENGTHS, 1))


def bounds():
    return functional.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).int()


def positions():
    return torch.cat([torch.arange(n) for n in LENGTHS])[None]


def numbers():
    return torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))[None]


SIGNS = {
    "position_ids": lambda: {"position_ids": positions()},
    "cu_seq_lens": lambda: {"cu_seq_lens_q": bounds(), "cu_seq_lens_k": bounds()},
    "seq_idx": lambda: {"seq_idx": numbers().int()},
    "all": lambda: {
        **{"position_ids": positions(), "cu_seq_lens_q": bounds(), "cu_seq_lens_k": bounds(), "seq_idx": numbers()},
        **{"max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS)},
    },
}


def close(left, right, tolerance=1e-6):  # GPT-J's softmax is in float32, in any model
    return left.shape == right.shape and (left - right).abs().max() <= tolerance


@torch.no_grad()
@pytest.mark.parametrize("backbone", TEACHERS)
def test_packed_texts_are_as_if_alone(backbone, mixers):
    model, (ids, texts) = make_model(backbone, mixers), make_texts()
    for arm in model.arms():
        with model.use_arm(arm):
            alone = torch.cat([model(text, use_cache=False).logits for text in texts], 1)
            for name, sign in SIGNS.items():
                assert close(model(ids, **sign()).logits, alone), (arm, name)


@torch.no_grad()
@pytest.mark.parametrize("backbone", TEACHERS)
def test_packed_rows_with_padding(backbone, mixers):
    """Three rows, padding before, within and after the texts; by positions, and by the texts' numbers."""
    model, (_, texts) = make_model(backbone, mixers), make_texts()
    pad = torch.zeros(1, 1, dtype=torch.long)
    rows = [  # each a list of (text, tokens) with None for padding
        [None, None, 0, 3, *[None] * 3, 1],
        [4, *[None] * 3, 3, 3],
        [2, None],
    ]
    length = 18
    ids, mask, position, number = [], [], [], []
    for row in rows:
        pieces = [pad if i is None else texts[i] for i in row]
        real = torch.cat([torch.full_like(x[0], i is not None) for i, x in zip(row, pieces, strict=True)])
        places = torch.cat([torch.arange(x.shape[1]) for x in pieces])
        order = torch.cat([torch.full_like(x[0], n) for n, x in enumerate(pieces)])
        for target, x in ((ids, torch.cat(pieces, 1)[0]), (mask, real), (position, places), (number, order)):
            target.append(functional.pad(x, (0, length - len(x)), value=0))
    ids, mask, position, number = (torch.stack(x) for x in (ids, mask, position, number))
    for sign in ({"position_ids": position}, {"seq_idx": number}):
        for arm in ("mixed", "teacher"):
            with model.use_arm(arm):
                alone = [[model(texts[i], use_cache=False).logits[0] for i in row if i is not None] for row in rows]
                logits = model(ids, attention_mask=mask, use_cache=False, **sign).logits
            for found, real, texts_alone in zip(logits, mask.bool(), alone, strict=True):
                assert close(found[real], torch.cat(texts_alone)), (arm, list(sign))


@torch.no_grad()
def test_several_rows_without_padding(mixers):
    model, (ids, texts) = make_model("llama", mixers), make_texts()
    flipped = torch.cat([ids, ids.flip(1)])
    position = torch.cat([positions(), torch.cat([torch.arange(n) for n in reversed(LENGTHS)])[None]])
    logits = model(flipped, position_ids=position).logits
    assert close(logits[:1], torch.cat([model(x, use_cache=False).logits for x in texts], 1))
    texts = ids.flip(1).split(LENGTHS[::-1], 1)
    assert close(logits[1:], torch.cat([model(x, use_cache=False).logits for x in texts], 1))


@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
def test_gradients_of_packed_texts_in_training(backbone, mixers):
    model, (ids, texts) = make_model(backbone, mixers), make_texts()
    model.train()
    keep_norms_wide(model)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients(losses):
        return torch.autograd.grad(sum(losses), parameters, allow_unused=True)

    def loss(text, **more):
        return model(text, use_cache=False, **more).logits.log_softmax(-1)[..., 7].sum()

    found = gradients([loss(ids, **SIGNS["cu_seq_lens"]())])
    expected = gradients([loss(text) for text in texts])
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or close(ours, theirs)


@torch.no_grad()
@pytest.mark.skipif(not interpreting(), reason="a GPU is there: tests/gpu has the kernels")
@pytest.mark.parametrize("kind", ["linear", "cosine-pure", "landmark"])
def test_kernels_take_the_bounds(kind):
    """Training's path on the Triton backend, in its interpreter; `tests/kernels` have the gradients."""
    mixers = {"landmark": {"type": "landmark", "block_size": 16}} if kind == "landmark" else MODELS[kind][0]
    model = make_student(make_teacher(num_hidden_layers=1), mixers).train()
    perturb(model)
    ids, _ = make_texts()
    ids = torch.cat([ids, ids[:, :25]], 1)  # texts longer than a block
    sign = {"cu_seq_lens_q": torch.tensor([0, 9, 34, 59])}
    texts = ids.split([9, 25, 25], 1)
    model.set_op_backend("triton")
    found = model(ids, use_cache=False, **sign).logits
    alone = torch.cat([model(text, use_cache=False).logits for text in texts], 1)
    assert close(found, alone, 1e-5)


def test_blocks_are_left_out_for_each_text_in_training():
    """Texts draw their blocks apart, by the same rule as rows; what does not depend on the draw stays."""
    dropout = {"type": "landmark", "block_size": 4, "block_dropout": 0.9}
    for mixer in (dropout, {**dropout, "block_weight": "tokens"}):
        model, (ids, _) = make_model("llama", ({"landmark": mixer}, None)), make_texts()
        torch.manual_seed(0)
        with torch.no_grad():
            whole = model(ids, **SIGNS["cu_seq_lens"]()).logits
            model.train()
            thinned = model(ids, use_cache=False, **SIGNS["cu_seq_lens"]()).logits
        first = torch.cat([torch.arange(min(n, 3)) + start for n, start in zip(LENGTHS, bounds(), strict=False)])
        assert close(thinned[:, first], whole[:, first])  # a text's first block reads no other
        assert not close(thinned, whole, 1e-3)


@torch.no_grad()
def test_packed_rows_have_no_cache(student):
    ids, _ = make_texts()
    for sign in SIGNS.values():
        for cache in ({"past_key_values": DynamicCache(config=student.config)}, {"use_cache": True}):
            with pytest.raises(ValueError, match="a cache holds one text a row"):
                student(ids, **sign(), **cache)
        assert student(ids, **sign()).past_key_values is None


@torch.no_grad()
def test_rows_of_one_text_keep_their_cache(student):
    ids, _ = make_texts()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    padded = (mask.cumsum(1) - 1).clamp(min=0)
    jumping = torch.arange(TOKENS)[None] + (torch.arange(TOKENS) > 7)
    one = torch.tensor([0, TOKENS])
    for more in (
        {"position_ids": torch.arange(TOKENS)[None]},
        {"position_ids": padded, "attention_mask": mask},
        {"position_ids": torch.arange(TOKENS)[None], "attention_mask": 1 - mask.flip(1)},
        {"position_ids": jumping, "past_key_values": DynamicCache(config=student.config)},
        {"cu_seq_lens_q": one, "cu_seq_lens_k": one},
        {"seq_idx": torch.zeros_like(ids)},
    ):
        assert student(ids, use_cache=True, **more).past_key_values.get_seq_length() == TOKENS


@pytest.mark.parametrize(
    "sign, sentence",
    [
        ({"cu_seq_lens_q": torch.tensor([0, 5, 30])}, "must rise from 0 to the 34 tokens"),
        ({"cu_seq_lens_q": torch.tensor([0, 9, 5, TOKENS])}, "must rise"),
        ({"cu_seq_lens_q": torch.tensor([0, 9, 34]), "cu_seq_lens_k": torch.tensor([0, 5, 34])}, "differ"),
    ],
)
def test_bounds_that_do_not_fit_are_refused(student, sign, sentence):
    with pytest.raises(ValueError, match=sentence):
        student(make_texts()[0], **sign)
    with pytest.raises(ValueError, match="the texts of one row"):
        student(make_texts()[0].view(2, -1), cu_seq_lens_q=torch.tensor([0, 5, 17]))


class Toy(torch.nn.Module):
    """Gives back the number of each token's text."""

    @through_packing
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        packing = kwargs.get("packing")
        return torch.zeros_like(input_ids) if packing is None else packing.text + 0 * input_ids


def test_compiled_models_look_for_texts_and_exported_ones_do_not():
    """What depends on numbers leaves a compiled graph; an exported graph has one way for all numbers."""
    ids, _ = make_texts()
    compiled = torch.compile(Toy(), backend="eager")
    for name, sign in SIGNS.items():
        assert torch.equal(compiled(ids, **sign()), numbers()), name
    assert torch.equal(torch.compile(Toy(), backend="eager", fullgraph=True)(ids), 0 * ids)
    exported = torch.export.export(Toy(), (ids,), {"position_ids": positions()}, strict=False)
    assert torch.equal(exported.module()(ids, position_ids=positions()), 0 * ids)


@torch.no_grad()
@pytest.mark.parametrize("arm", ["mixed", "teacher"])
def test_a_mask_of_another_length_is_refused(student, arm):
    ids, _ = make_texts()
    cache = DynamicCache(config=student.config)
    with student.use_arm(arm):
        for length in (TOKENS - 1, TOKENS + 3):
            with pytest.raises(ValueError, match=rf"must be \(1, {TOKENS}\)"):
                student(ids, attention_mask=torch.ones(1, length))
    student(ids, past_key_values=cache)
    with pytest.raises(ValueError, match=rf"must be \(1, 1 or {TOKENS + 1}\)"):
        student(ids[:, :1], attention_mask=torch.ones(1, 5), past_key_values=cache)


def test_teacher_of_each_backbone_is_the_stock_model():
    """By transformers' own isolation, as a check of what isolated means."""
    teacher, (ids, _) = make_teacher(), make_texts()
    student = make_student(teacher, *MODELS["linear"])
    with torch.no_grad(), student.use_arm("teacher"):
        expected = teacher(ids, position_ids=positions(), use_cache=False).logits
        assert close(student(ids, **SIGNS["seq_idx"]()).logits, expected, 1e-5)
