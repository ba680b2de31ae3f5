"""Models with landmark attention: landmarks that nobody sees, labels, blocks in the cache, what is refused."""

from contextlib import nullcontext

import pytest
import torch
from landmark_students import TEACHERS, make, make_ids
from tiny_models import make_gpt2, make_student, make_teacher
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache

from linearize import LandmarkAttentionConfig, convert
from linearize.modeling.compiled import compiled_training
from linearize.modeling.landmark_tokens import Landmarks


@pytest.fixture
def ids():
    return make_ids()


# --- where the landmarks stand


def test_a_landmark_follows_every_block_of_real_tokens():
    real = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0]]).bool()
    plan = Landmarks.plan(real, None, 4, simple=False)
    assert plan.position.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8], [-1, -1, -1, 0, 1, 2, 3, 4, -1]]
    assert plan.source.tolist() == [[0, 1, 2, 7, 3, 4, 5, 7, 6], [8, 0, 1, 2, 3, 4, 7, 5, 6]]
    later = Landmarks.plan(torch.ones(2, 1).bool(), torch.tensor([6, 5]), 4, simple=True)
    assert later.position.tolist() == [[6, 7], [-1, 5]]
    embeddings = torch.randn(2, 7, 3)
    with_landmarks = plan.insert(embeddings, torch.tensor([7.0, 8.0, 9.0]))
    assert torch.equal(plan.extract(with_landmarks), embeddings)
    assert with_landmarks[0, 3].tolist() == [7, 8, 9] and not with_landmarks[1, 0].any()


def test_a_landmark_is_one_more_embedding_of_the_sequence(ids):
    """By hand: landmarks as ordinary embeddings of a model whose own are switched off by a plan of none."""
    model = make(top_k=20)
    with torch.no_grad():
        found = model(ids[:1, :8]).logits
        base = model.model
        rows = base.embed_tokens(ids[:1, :8])
        mark = base.mixer.embedding[None, None]
        by_hand = torch.cat([rows[:, :3], mark, rows[:, 3:6], mark, rows[:, 6:]], dim=1)
        place = torch.tensor([0, 1, 2, 4, 5, 6, 8, 9])
        plan = Landmarks(
            torch.arange(10)[None], True, 10, torch.zeros(1, 10), torch.arange(10)[None], torch.zeros(1, 10)
        )
        plan.rotary = base.rotary_tables(100)
        base.place_landmarks = lambda *args: plan
        plan.insert = lambda embeddings, landmark: embeddings
        states = base(inputs_embeds=by_hand, use_cache=False).last_hidden_state
        expected = model.lm_head(states[:, place])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", TEACHERS)
def test_states_and_logits_are_free_of_landmarks(kind, ids):
    model = make(kind)
    output = model(ids, output_hidden_states=True)
    assert output.logits.shape[:2] == ids.shape
    assert {x.shape[1] for x in output.hidden_states} == {29}
    assert output.past_key_values.get_seq_length() == 29
    last = model.base_model(ids).last_hidden_state
    torch.testing.assert_close(output.hidden_states[-1], last, rtol=0, atol=1e-5)
    states, *_ = model.base_model(ids, return_dict=False)
    torch.testing.assert_close(states, last, rtol=0, atol=1e-5)


# --- labels


def test_the_ordinary_loss_knows_no_landmark(ids):
    model = make()
    output = model(ids, labels=ids)
    expected = functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("length", [29, 27])
def test_published_labels(ids, length):
    """A block's last token predicts the landmark, the landmark the next token, among the vocabulary and it; the
    landmark that ends a row of whole blocks is no target."""
    ids = ids[:, :length]
    model = make(include_landmark_in_loss=True, top_k=20)
    labels = ids.clone()
    labels[0, :5] = -100
    caught = []
    model.model.norm.register_forward_hook(lambda module, args, output: caught.append(output))
    found = model(ids, labels=labels)
    states = caught[0]  # (2, length + 9, width)
    wide = torch.cat([model.lm_head(states), (states @ model.model.mixer.output)[..., None]], dim=-1)
    places = [i + i // 3 for i in range(length)]
    terms = []
    for row in range(2):
        for t in range(length):
            if t % 3 == 2 and t < length - 1 and labels[row, t] != -100:  # the landmark, entry 97
                terms.append(functional.cross_entropy(wide[row, places[t]], torch.tensor(97)))
            if t < length - 1 and labels[row, t + 1] != -100:
                terms.append(functional.cross_entropy(wide[row, places[t] + (t % 3 == 2)], labels[row, t + 1]))
    torch.testing.assert_close(found.loss, torch.stack(terms).mean())
    after = torch.tensor([place + (t % 3 == 2) for t, place in enumerate(places)])
    torch.testing.assert_close(found.logits, model.lm_head(states[:, after]))
    assert found.logits.shape[-1] == 97
    found.loss.backward()
    assert model.model.mixer.output.grad.abs().sum() > 0 and model.model.mixer.embedding.grad.abs().sum() > 0


def test_published_labels_over_a_global_batch(ids):
    model = make(include_landmark_in_loss=True)
    whole = model(ids, labels=ids).loss
    half = [model(row[None], labels=row[None], num_items_in_batch=56).loss for row in ids]
    torch.testing.assert_close(whole, sum(half), rtol=1e-5, atol=0)


def test_published_labels_of_padded_rows(ids):
    """A row's last token is its own, wherever its padding lies."""
    model = make(include_landmark_in_loss=True, top_k=20)
    alone = model(ids[:1, :24], labels=ids[:1, :24]).loss
    for pad in ((0, 5), (5, 0)):
        padded, mask = (functional.pad(x, pad) for x in (ids[:1, :24], torch.ones(1, 24, dtype=torch.long)))
        labels = padded.masked_fill(mask == 0, -100)
        labels[:, pad[0]] = -100  # else padding would predict the first token
        torch.testing.assert_close(model(padded, attention_mask=mask, labels=labels).loss, alone)


def test_published_labels_add_up_however_a_batch_is_cut(ids):
    """Rows with prompts of different lengths, whose labels and landmarks are not in one proportion."""
    model = make(include_landmark_in_loss=True)
    labels = ids.clone()
    labels[0, :20] = -100
    count = (labels[:, 1:] != -100).sum()
    whole = model(ids, labels=labels, num_items_in_batch=count).loss
    parts = [model(x[None], labels=y[None], num_items_in_batch=count).loss for x, y in zip(ids, labels, strict=True)]
    torch.testing.assert_close(whole, sum(parts), rtol=1e-5, atol=0)


# --- training


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")  # the name that 5.17 knows
def test_gradient_checkpointing_changes_nothing(ids):
    model = make(block_dropout=0.5).train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert "model.mixer.embedding" in gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")  # the name that 5.17 knows
def test_a_cache_in_training_is_filled_or_refused(ids):
    model = make().train()
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    assert cache.get_seq_length() == ids.shape[1]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(RuntimeError, match="gradient checkpointing gives layers no cache"):
        model(ids, past_key_values=DynamicCache(config=model.config))
    assert model(ids).past_key_values is None


def test_all_blocks_are_open_in_training_and_some_with_dropout(ids):
    model = make(top_k=2)
    everything = make(top_k=20)
    with torch.no_grad():
        full = everything(ids).logits
        assert not torch.allclose(model(ids).logits, full, atol=1e-3)
        torch.testing.assert_close(model.train()(ids).logits, full, rtol=0, atol=1e-5)
        dropping = make(top_k=20, block_dropout=0.9)
        torch.testing.assert_close(dropping(ids).logits, full, rtol=0, atol=1e-5)
        torch.manual_seed(0)
        assert not torch.allclose(dropping.train()(ids).logits, full, atol=1e-3)
    assert model.train()(ids).past_key_values is None


def test_dropout_leaves_some_rows_whole(ids):
    """In every layer: a row's share is drawn once, so that a whole row is read as it is after training."""
    many = ids[:1].expand(16, -1)
    with torch.no_grad():
        full = make(top_k=20)(ids[:1]).logits
        none = make(top_k=20, block_dropout=0.9, block_dropout_rows=0.0).train()(many).logits
        torch.testing.assert_close(none, full.expand(16, -1, -1), rtol=0, atol=1e-5)
        torch.manual_seed(0)
        mixed = make(top_k=20, block_dropout=0.9, block_dropout_rows=0.5).train()(many).logits
    whole = ((mixed - full).abs().amax(dim=(1, 2)) < 1e-5).sum().item()
    assert 3 <= whole <= 13


def test_a_row_draws_once_for_all_layers(ids):
    model, seen = make(block_dropout=0.5), []
    for layer in model.model.layers:
        layer.self_attn.mixer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["landmarks"].drawn), with_kwargs=True
        )
    with torch.no_grad():
        model(ids)
        assert seen and all(drawn is None for drawn in seen)
        seen.clear()
        model.train()(ids)
    assert len(seen) > 1 and all(drawn is seen[0] for drawn in seen)
    assert seen[0].shape == (len(ids), 2) and seen[0].unique().numel() == 2 * len(ids)


@torch.no_grad()
def test_a_rows_draws_are_its_own_however_a_batch_is_cut(ids):
    """Two ranks, or two micro-batches, of one row each give what one of two rows gives; layers draw for themselves."""
    model = make(block_dropout=0.9, top_k=20).train()
    tokens, seeds = model.model.mixer, torch.tensor([5, 11])

    def logits(rows):
        torch.manual_seed(0)  # as every rank is
        tokens.row_seeds = seeds[rows]
        return model(ids[rows]).logits

    together = logits(slice(None))
    parts = [logits(slice(i, i + 1)) for i in range(2)]
    torch.testing.assert_close(torch.cat(parts), together, rtol=0, atol=1e-5)
    assert tokens.row_seeds is None, "used up: another loop's rows draw at random"
    same = ids[:1].expand(2, -1)
    tokens.row_seeds = seeds
    first, second = model(same).logits
    assert (first - second).abs().max() > 1e-3
    landmarks = model.model.place_landmarks(torch.zeros(2, 200, 32), None, None)
    opened = [layer.self_attn.mixer._open_blocks(landmarks) for layer in model.model.layers]
    assert not torch.equal(opened[0], opened[1])


@torch.no_grad()
def test_ranks_that_share_a_seed_leave_out_other_blocks(ids, monkeypatch):
    model, found = make(block_dropout=0.9).train(), []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        torch.manual_seed(0)
        found.append(model.model.place_landmarks(torch.zeros(2, 29, 32), None, None).drawn)
    assert not torch.equal(*found)


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_compiled_training_changes_nothing(share, ids, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend="aot_eager", **options))
    model = make(top_k=4, block_dropout=share).train()
    gradients = []
    for compiled in (nullcontext(), compiled_training()):
        torch.manual_seed(3)
        model.zero_grad()
        with compiled:
            model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, other in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, other, rtol=1e-4, atol=1e-6)


def test_only_the_landmark_is_new_and_starts_from_the_mean(tmp_path):
    teacher = make_teacher()
    teacher.bfloat16().save_pretrained(tmp_path / "teacher")
    settings = LandmarkAttentionConfig(block_size=8, include_landmark_in_loss=True, landmark_key="token")
    student = convert(tmp_path / "teacher", settings)
    assert set(student.mixer_state_dict()) == {"model.mixer.embedding", "model.mixer.output"}
    embeddings = teacher.get_input_embeddings().weight
    assert student.dtype == torch.bfloat16 and student.model.mixer.embedding.dtype == torch.float32
    torch.testing.assert_close(student.model.mixer.embedding, embeddings.float().mean(0))
    torch.testing.assert_close(student.model.mixer.output, teacher.lm_head.weight.float().mean(0))
    assert student.get_input_embeddings().weight.shape == embeddings.shape
    student.save_pretrained(tmp_path / "student")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype="auto")
    ids = torch.randint(3, 97, (1, 40))
    assert torch.equal(again(ids).logits, student(ids).logits)


# --- refusals


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"block_size": 1}, "at least 2"),
        ({"top_k": 0}, "at least 1 block"),
        ({"top_k": 5, "max_blocks": 4}, "at least top_k"),
        ({"selection": "best"}, "choose one of"),
        ({"block_dropout": 1.0}, "below 1"),
        ({"block_dropout_rows": 1.5}, "between 0 and 1"),
        ({"landmark_key": "least"}, "choose one of"),
        ({"landmark_key": "bounds"}, "set block_weight to tokens"),
        ({"landmark_key": "bounds", "block_weight": "tokens", "key_parts": 0}, "63 tokens has 1 to"),
        ({"landmark_key": "bounds", "block_weight": "tokens", "key_parts": 64}, "63 tokens has 1 to"),
        ({"key_parts": 2}, "leave it out"),
        ({"contract": 9}, "contract 9"),
        ({"contract": 1}, "contract 1 .* set contract to 2"),
    ],
)
def test_settings_that_cannot_be(settings, sentence):
    with pytest.raises(Exception, match=sentence):
        LandmarkAttentionConfig(**settings)


def test_contract_2_is_contract_1_where_blocks_weigh_by_their_tokens():
    """Only the gates of read blocks changed, which these do not have."""
    old = LandmarkAttentionConfig(contract=1, block_weight="tokens")
    assert old.contract == 1 and LandmarkAttentionConfig().contract == 2


def test_no_other_layers_and_one_block_size():
    mixers = {"a": {"type": "landmark", "block_size": 4}, "b": {"type": "landmark", "block_size": 8}}
    with pytest.raises(Exception, match="block_size differs"):
        make_student(make_teacher(), mixers, ["a", "b", "a"])
    with pytest.raises(Exception, match="no softmax layers"):
        make_student(make_teacher(), mixers, ["a", "softmax", "a"])


def test_what_a_growing_cache_cannot_do(ids):
    model = make()
    with pytest.raises(ValueError, match="state of constant size"), model.captured_decoding():
        pass
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        model.generate(ids[:1], assistant_model=make(), max_new_tokens=4, do_sample=False)


def test_what_has_no_place_for_landmarks(ids):
    model = make("gpt2")
    with pytest.raises(ValueError, match="token_type_ids"):
        model(ids, token_type_ids=torch.zeros_like(ids))
    with pytest.raises(ValueError, match="2-dimensional"):
        model(ids, attention_mask=torch.ones(2, 1, 29, 29))
    with pytest.raises(ValueError, match="exactly one"):
        model()
    long = torch.randint(3, 97, (1, 200))  # 266 with landmarks, of 256 positions
    with pytest.raises(ValueError, match="learned positions"):
        model(long)


@torch.no_grad()
@pytest.mark.parametrize("positions", [30, 31, 32, 33])
def test_the_longest_text_fills_the_learned_positions(positions):
    model = make_student(make_gpt2(n_positions=positions), {"landmark": {"type": "landmark", "block_size": 4}})
    longest = model.config.longest_text
    assert model.config.positions_of(longest) <= positions < model.config.positions_of(longest + 1)
    model(torch.randint(3, 97, (1, longest)))
    with pytest.raises(ValueError, match=f"landmarks counted \\({longest} are without\\)"):
        model(torch.randint(3, 97, (1, longest + 1)))
