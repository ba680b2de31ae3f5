"""Calibration of landmark attention: landmarks' keys come to stand for their blocks."""

import copy
from types import SimpleNamespace

import pytest
import torch
from landmark_toys import rotary_tables
from test_calibration import rows
from tiny_models import make_gpt2, make_student, make_teacher, perturb
from torch.nn import functional

from linearize.errors import UserError
from linearize.stages.calibration import calibrate, calibrates
from linearize.stages.calibration_landmark import BlockScores

MIXER = {"type": "landmark", "block_size": 8, "top_k": 9}


def logits(model, blocks, arm="mixed"):
    with torch.no_grad(), model.use_arm(arm):
        return torch.stack([model(row["input_ids"][None], use_cache=False).logits[0] for row in blocks])


def naive_divergence(query, keys, landmarks, size, scaling):
    """Of rotated queries `(H, T, D)`, keys `(G, T, D)`, landmarks' keys `(G, U, D)`: mean over queries and heads."""
    found = []
    for head in range(query.shape[0]):
        group = head // (query.shape[0] // keys.shape[0])
        for t in range(query.shape[1]):
            own, target, given = t // size, [], []
            for block in range(own + 1):
                places = [j for j in range(block * size, block * size + size - 1) if j <= t]
                target.append(torch.stack([query[head, t] @ keys[group, j] * scaling for j in places]).logsumexp(0))
                gate = query[head, t] @ landmarks[group, block] * scaling if block < own else target[-1]
                given.append(gate)
            if own:
                p, q = (torch.stack(x).log_softmax(0) for x in (target, given))
                found.append(functional.kl_div(q, p, reduction="sum", log_target=True))
    return torch.stack(found).mean()


def rotate(x, tables, position):
    front, back = x.chunk(2, dim=-1)
    return x * tables[0][position] + torch.cat([-back, front], dim=-1) * tables[1][position]


def test_the_divergence_is_that_of_its_definition():
    torch.manual_seed(0)
    size, count, tables = 4, 5, tuple(x.float() for x in rotary_tables(20, dim=8))
    length = size * count
    query, keys = torch.randn(1, 4, length, 8), torch.randn(1, 2, length, 8)
    placed = rotate(keys, tables, torch.arange(length) % size)
    landmarks = torch.randn(1, 2, count, 8)  # rotated within their blocks
    call = SimpleNamespace(position=torch.arange(length)[None], rotary=tables)
    found = BlockScores(query, placed.unflatten(2, (count, size)), call, 0.3).divergence(landmarks)
    at = torch.arange(length)
    expected = naive_divergence(
        rotate(query[0], tables, at), rotate(keys[0], tables, at),
        rotate(landmarks[0], tables, at[::size]), size, 0.3,
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def leaning(teacher):
    """Queries with a common part, as trained models have them: a constant of the scores is written in it."""
    with torch.no_grad():
        for name, bias in teacher.named_parameters():
            if name.endswith("q_proj.bias"):
                bias.normal_()
            if name.endswith("c_attn.bias"):
                bias[: len(bias) // 3].normal_()
    return teacher.eval()


@pytest.mark.parametrize(
    "teacher",
    [make_teacher(attention_bias=True), make_gpt2()],
    ids=["llama", "gpt2"],
)
def test_a_student_comes_close_to_its_teacher(teacher):
    student = make_student(leaning(teacher), {"landmark": MIXER})
    blocks = rows(24, 70)
    target = logits(student, blocks, "teacher").log_softmax(-1)
    before = (logits(student, blocks).log_softmax(-1) - target).square().mean()
    rest = {name: x.clone() for name, x in student.state_dict().items() if ".keys." not in name}
    report = calibrate(student, blocks, 12)
    after = (logits(student, blocks).log_softmax(-1) - target).square().mean()
    assert report.summary()["after"] < 0.25 * report.summary()["before"]
    assert after < 0.8 * before
    assert all(torch.equal(x, rest[name]) for name, x in student.state_dict().items() if name in rest)
    assert all(a.mixer.observer is None for a in student.mixer_attentions())
    assert all(x.requires_grad and x.grad is None for a in student.mixer_attentions() for x in a.mixer.parameters())


def test_padding_and_batches_change_nothing_but_the_steps():
    """One batch of rows of one length, with padding behind them or without: the same numbers."""
    found = []
    for padding in (0, 11):
        student = make_student(make_teacher(), {"landmark": MIXER})
        perturb(student)
        gap = torch.zeros(padding, dtype=torch.long)
        blocks = [{name: torch.cat([x, gap]) for name, x in row.items()} for row in rows(4, 40)]
        calibrate(student, blocks, 4, batch_size=4)
        found.append(torch.cat([x.flatten() for x in student.mixer_state_dict().values()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


def test_bad_input_is_one_sentence():
    student = make_student(make_teacher(), {"landmark": MIXER})
    broken = copy.deepcopy(student)
    with torch.no_grad():
        broken.model.layers[1].self_attn.k_proj.weight.fill_(float("nan"))
    published = make_student(make_teacher(), {"landmark": {**MIXER, "landmark_key": "token"}})
    assert calibrates(student.config) and not calibrates(published.config)
    for call, sentence in (
        (lambda: calibrate(published, rows(), 4), "have nothing to calibrate"),
        (lambda: calibrate(student, rows(4, 7), 4), "have only one of 8"),
        (lambda: calibrate(broken, rows(), 4), "layer 1 are not finite"),
    ):
        with pytest.raises(UserError, match=sentence) as caught:
            call()
        assert "\n" not in str(caught.value)
