"""Documents kept apart in a sequence, and whole documents fitted into sequences: data, both stages, the trainers."""

import numpy as np
import pytest
import torch
from data_toys import make_config, make_texts, make_tokenizer, write_jsonl, write_texts
from tiny_models import make_student, make_teacher, perturb
from tiny_runs import make_bert_directory, make_teacher_directory, tiny_config, write_text

from linearize.config.settings import DistillationConfig, FinetuneConfig
from linearize.data.sequences import TokenBlocks, prepare_data
from linearize.data.texts import best_fit, cut_documents
from linearize.errors import UserError
from linearize.evaluation import perplexity
from linearize.runs.engine import run
from linearize.stages.adapters import add_adapters
from linearize.stages.distillation import Distiller
from linearize.stages.finetuning_trainer import Objective
from linearize.stages.transfer_loss import LayerLosses, model_inputs
from linearize.training.losses import LossWeights

LENGTHS = (9, 1, 14, 8)


def packed(vocabulary=96, seed=3):
    """One sequence of four texts, as the data gives it, and the texts."""
    ids = torch.randint(3, vocabulary, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    blocks = TokenBlocks(ids, torch.where(positions > 0, ids, -100), positions=positions)
    return blocks, list(ids.split(LENGTHS, 1))


# ---- data


def documents_of(texts, tokenizer):
    return [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts]


@pytest.mark.parametrize("packing", ["stream", "bfd"])
def test_positions_start_again_with_each_document(tmp_path, packing):
    tokenizer, texts = make_tokenizer(), make_texts(40)
    path = write_texts(tmp_path / "a.jsonl", texts)
    options = {"validation_documents": 4, "packing": packing}
    train, validation = prepare_data(make_config(tmp_path, path, isolate_documents=True, **options), tokenizer)
    plain, _ = prepare_data(make_config(tmp_path, path, **options), tokenizer)
    assert train.identity != plain.identity and len(train) and len(validation)
    known = {tuple(document) for document in documents_of(texts, tokenizer)}
    found = set()
    for blocks in (train, validation):
        for row in blocks:
            ids, positions, labels = (row[name].numpy() for name in ("input_ids", "position_ids", "labels"))
            real = row["attention_mask"].bool().numpy() if packing == "bfd" else np.ones(len(ids), bool)
            starts = np.flatnonzero(positions == 0)
            assert starts[0] == 0
            assert ((np.diff(positions) == 1) | (positions[1:] == 0)).all()
            assert np.array_equal(labels, np.where((positions > 0) & real, ids, -100))
            for piece in np.split(np.arange(len(ids)), starts[1:]):
                if real[piece[0]]:
                    assert real[piece].all()
                    found.add(tuple(ids[piece].tolist()))
    whole = {document for document in known if len(document) <= 16}
    if packing == "bfd":
        assert whole <= found, "a document that fits into a row was cut"
    else:
        assert found & known, "no document is whole"
        assert np.array_equal(train.input_ids, plain.input_ids)


def test_best_fit_decreasing():
    sizes = [3, 8, 2, 5, 4, 1, 21]
    ends = np.cumsum(sizes)
    pieces = list(cut_documents(ends, [(0, int(ends[-1]))], 8))
    assert [piece.stop - piece.start for piece in pieces] == [3, 8, 2, 5, 4, 1, 8, 8, 5]
    rows = best_fit(pieces, 8)
    assert sorted(sorted(piece.stop - piece.start for piece in row) for row in rows) == [
        [1, 2, 5],
        [3, 5],
        [4],
        [8],
        [8],
        [8],
    ]
    assert sorted(piece for row in rows for piece in row) == pieces
    assert list(cut_documents(ends, [(11, 13), (18, 23)], 8)) == [(11, 13), (18, 22), (22, 23)]
    assert list(cut_documents(ends, [(9, 15)], 4)) == [(9, 11), (11, 13), (13, 15)]  # cut within documents


def test_prompts_are_no_more_learned_than_before(tmp_path):
    """Answers alone count, less the first token of a document."""
    tokenizer = make_tokenizer()
    records = [{"instruction": text, "output": text[::-1]} for text in make_texts(30, length=6)]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    options = {"sequence_length": 128, "isolate_documents": True, "validation_documents": 0}
    for packing in ("stream", "bfd"):
        train, _ = prepare_data(make_config(tmp_path, path, packing=packing, **options), tokenizer)
        for row in train:
            assert (row["labels"][row["position_ids"] == 0] == -100).all()
            assert (row["labels"] == -100).float().mean() > 0.3 and (row["labels"] != -100).any()


def test_encoders_refuse_both(tmp_path):
    encoder = make_bert_directory(tmp_path / "encoder")
    for changes in ({"packing": "bfd"}, {"isolate_documents": True}):
        settings = {"model_name_or_path": str(encoder), "output_dir": str(tmp_path / "out"), "data": changes}
        settings["stages"] = {"transfer": {"kind": "transfer", "max_steps": 1}}
        with pytest.raises(UserError, match="an encoder's row is a text of its own"):
            run(settings)
        assert not (tmp_path / "out").exists()


# ---- training


def test_transfer_of_texts_apart():
    """The loss of a layer is the mean of what the texts give alone, by their tokens; padding beside them is none."""
    model = make_student(make_teacher(), {"linear": {"type": "linear", "window": 4, "sinks": 2}}).double()
    perturb(model)
    blocks, texts = packed()

    def losses(batches):
        found = []
        with LayerLosses(model, "mse") as layers:
            for batch in batches:
                layers.run(**batch, weights={"mixed": 1.0, "linear": 1.0}, gradient_factor=None)
                found.append(torch.stack(list(layers.means(torch.device("cpu")).values())))
        return torch.stack(found)

    row = {name: x[None] for name, x in blocks[0].items()}
    alone = losses([{"input_ids": text} for text in texts])
    expected = (alone * torch.tensor(LENGTHS)[:, None, None]).sum(0) / sum(LENGTHS)
    assert (losses([model_inputs(row)])[0] - expected).abs().max() <= 1e-10
    padded = {name: torch.nn.functional.pad(x, (0, 5)) for name, x in row.items()}
    padded["attention_mask"] = (torch.arange(sum(LENGTHS) + 5) < sum(LENGTHS)).long()[None]
    assert (losses([model_inputs(padded)])[0] - expected).abs().max() <= 1e-10
    assert (losses([{"input_ids": row["input_ids"]}])[0] - expected).abs().max() > 1e-4


def test_finetuning_of_texts_apart():
    """Cross-entropy and divergence are the sums of what the texts give alone, in teacher and student."""
    mixers = {"linear": {"type": "linear", "window": 4, "sinks": 2}}
    student = make_student(make_teacher(), mixers, ["linear", "softmax", "linear"])
    perturb(student)
    model = add_adapters(student, FinetuneConfig(lora_dropout=0.0), train_mixers=True).double()
    objective = Objective(LossWeights(1.0, 1.0), 7)
    blocks, texts = packed()
    row = {name: x[None] for name, x in blocks[0].items()}
    count = torch.tensor(float(sum(LENGTHS) - len(LENGTHS)))
    found = torch.stack(objective(model, row["input_ids"], row["labels"], count, row["position_ids"]))
    alone = torch.stack([torch.stack(objective(model, text, text, count)) for text in texts if text.shape[1] > 1])
    assert (found - alone.sum(0)).abs().max() <= 1e-10 and found[2] > 1e-3
    apart, together = (perplexity(model, x, arm="mixed").nll for x in (blocks, TokenBlocks(blocks.input_ids)))
    assert abs(apart - found[1].item()) <= 1e-6 and abs(apart - together) > 1e-2


def test_distillation_of_texts_apart():
    """By a stock teacher, which transformers isolates, and by a converted student."""
    teacher = make_teacher().double()
    model = make_student(make_teacher(), {"landmark": {"type": "landmark", "block_size": 4}}).double().train()
    distiller = Distiller(teacher, model, DistillationConfig("teacher", hidden_weight=1.0))
    blocks, texts = packed()
    row = {name: x[None] for name, x in blocks[0].items()}

    def parts(losses):
        return torch.stack([losses.cross_entropy, losses.divergence, losses.hidden])

    found = parts(distiller.losses(model, row, 1.0))
    alone = [parts(distiller.losses(model, {"input_ids": x, "labels": x}, 1.0)) for x in texts if x.shape[1] > 1]
    difference = found - sum(alone)
    assert difference[:2].abs().max() <= 1e-8 and difference[2].abs() <= 1e-8


@pytest.mark.parametrize("packing", ["stream", "bfd"])
def test_a_run(tmp_path, packing):
    settings = tiny_config(
        make_teacher_directory(tmp_path / "teacher"),
        write_text(tmp_path / "a.jsonl"),
        tmp_path / "out",
        tmp_path / "c",
    )
    settings["data"] |= {"isolate_documents": True, "packing": packing, "sequence_length": 64}
    for stage in ("transfer", "finetune"):
        settings["stages"][stage] |= {"max_steps": 1, "tokens_per_step": 128, "batch_size": 2}
    run(settings)
    assert (tmp_path / "out" / "final" / "config.json").is_file()
