"""Chunked losses equal the plain ones, value and gradient."""

import pytest
import torch
import torch.nn.functional as F

from linearize.training.losses import LossWeights, language_model_loss, supervised_tokens

CASES = {
    "cross-entropy": LossWeights(),
    "divergence": LossWeights(0.0, 1.0),
    "both": LossWeights(0.7, 0.3),
    "temperature": LossWeights(0.7, 0.3, 2.5),
}


def make_inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden, teacher = (torch.randn(2, 9, 6, generator=generator, dtype=dtype) for _ in range(2))
    weight = torch.randn(11, 6, generator=generator, dtype=dtype)
    labels = torch.randint(0, 11, (2, 9), generator=generator)
    labels[0, :4] = -100
    labels[1, 6:8] = -100
    return hidden.requires_grad_(), teacher, weight.requires_grad_(), labels


def plain_loss(hidden, teacher, weight, labels, weights):
    """The definition, on whole logits."""
    logits, target = hidden[:, :-1] @ weight.T, (teacher[:, :-1] @ weight.detach().T)
    kept = labels[:, 1:] != -100
    cross_entropy = F.cross_entropy(logits[kept], labels[:, 1:][kept])
    p = (target / weights.temperature).softmax(-1)
    q = (logits / weights.temperature).log_softmax(-1)
    divergence = (p * (p.log() - q)).sum(-1)[kept].mean() * weights.temperature**2
    return weights.ce_weight * cross_entropy + weights.kl_weight * divergence, cross_entropy, divergence


@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("weights", CASES.values(), ids=CASES)
def test_chunked_loss_is_the_plain_loss(weights, chunk):
    hidden, teacher, weight, labels = make_inputs()
    expected, cross_entropy, divergence = plain_loss(hidden, teacher, weight, labels, weights)
    expected_gradients = torch.autograd.grad(expected, (hidden, weight))
    sums = language_model_loss(
        hidden, labels, lambda h: h @ weight.T, weights=weights, teacher_hidden_states=teacher, logits_chunk=chunk
    )
    gradients = torch.autograd.grad(sums.total, (hidden, weight))
    torch.testing.assert_close(sums.total, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(sums.cross_entropy, cross_entropy.detach(), rtol=0, atol=1e-12)
    if weights.kl_weight:
        torch.testing.assert_close(sums.divergence, divergence.detach(), rtol=0, atol=1e-12)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_gradcheck():
    hidden, teacher, weight, labels = make_inputs()

    def loss(hidden, weight):
        # The teacher has a head of its own here: finite differences would see what the definition holds constant.
        head = torch.nn.Module()
        head.forward = lambda h: h @ (weight if h.requires_grad else weight.detach() * 0 + 0.3).T
        return language_model_loss(
            hidden, labels, head, weights=CASES["temperature"], teacher_hidden_states=teacher, logits_chunk=4
        ).total

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_the_gradient_of_the_divergence_hardly_depends_on_the_temperature():
    hidden, teacher, weight, labels = make_inputs()
    hidden, teacher = (hidden.detach() * 0.01).requires_grad_(), teacher * 0.01
    norms = []
    for temperature in (1.0, 4.0):
        weights = LossWeights(0.0, 1.0, temperature)
        sums = language_model_loss(
            hidden, labels, lambda h: h @ weight.T, weights=weights, teacher_hidden_states=teacher
        )
        norms.append(torch.autograd.grad(sums.total, hidden)[0].norm())
    assert norms[1] / norms[0] == pytest.approx(1, rel=0.05)


def test_only_supervised_positions_and_one_chunk_at_a_time_go_through_the_head():
    hidden, teacher, weight, labels = make_inputs()
    rows = []

    def head(h):
        rows.append(len(h))
        return h @ weight.T

    language_model_loss(hidden, labels, head, weights=CASES["both"], teacher_hidden_states=teacher, logits_chunk=4)
    assert max(rows) == 4
    assert sum(rows) == 2 * int(supervised_tokens(labels))


def test_half_precision_logits_are_summed_in_float32():
    hidden, _, weight, labels = make_inputs(torch.bfloat16)
    total = language_model_loss(hidden, labels, lambda h: h @ weight.T, logits_chunk=4).total
    assert total.dtype == torch.float32
    expected = F.cross_entropy((hidden[:, :-1] @ weight.T).float().flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(total, expected)


def test_a_batch_without_labels_gives_zero_and_a_zero_gradient():
    hidden, _, weight, labels = make_inputs()
    sums = language_model_loss(hidden, torch.full_like(labels, -100), lambda h: h @ weight.T)
    assert sums.total == 0
    assert (torch.autograd.grad(sums.total, hidden)[0] == 0).all()


def test_the_first_label_is_never_a_target():
    labels = torch.tensor([[5, -100, 3], [-100, -100, 2]])
    assert supervised_tokens(labels) == 2


@pytest.mark.parametrize("options", [{"weights": LossWeights(1.0, 1.0)}, {"logits_chunk": 0}])
def test_wrong_arguments_are_refused(options):
    hidden, _, weight, labels = make_inputs()
    with pytest.raises(ValueError):
        language_model_loss(hidden, labels, lambda h: h @ weight.T, **options)
