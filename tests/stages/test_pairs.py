"""Every pair of mechanism and backbone: converted, one step of each of its stages, saved, loaded without the package;
those that cannot be; and their table in the README."""

import functools
import json
import subprocess
from pathlib import Path

import pytest
import torch
from finetuning_toys import LENGTH, token_blocks
from tiny_models import make_gpt2, make_gptj, make_mistral, make_teacher
from tiny_runs import make_bert_directory, make_teacher_directory, without_package, write_text
from transformers import BertForMaskedLM

import linearize
from linearize.cli import main
from linearize.config.embeddings import EmbeddingConfig
from linearize.config.full_training import FullTrainingConfig
from linearize.config.presets import all_presets
from linearize.config.record import make_record
from linearize.config.settings import AdaptationConfig, DataConfig, FinetuneConfig, TransferConfig
from linearize.conversion.students import load_encoder
from linearize.data.rows import prepare_rows
from linearize.errors import UserError
from linearize.hub.repository import save_final
from linearize.modeling import ATTENTIONS, BACKBONES, backbone_of
from linearize.stages.adaptation import adapt_scalers, collect_statistics, with_settings
from linearize.stages.calibration import calibrate
from linearize.stages.encoder_training import distill_embeddings
from linearize.stages.finetuning import finetune, merge
from linearize.stages.full_training import train_all
from linearize.stages.pairs import BEGIN, STAGES, make_pair, pairs, with_table
from linearize.stages.transfer import transfer_attention

README = Path(__file__).parents[2] / "README.md"
DECODERS = {"llama": make_teacher, "mistral": make_mistral, "gpt2": make_gpt2, "gptj": make_gptj}
SETTINGS = {
    "linear": {"window": 5, "sinks": 2},
    "cosine": {"window": 5, "sinks": 2},
    "gain_cell": {
        "window": 12,
        "cell_kind": "linear",
        "cell": {"tile": 4, "leak": 0.01, "score_saturation": 4.0, "output_saturation": 4.0},
    },
    "landmark": {"block_size": 4, "top_k": 2},
    "salient": {"window": 5, "sinks": 2, "kept_tokens": 4},
}
"""Of each mechanism, small enough for what it leaves out to matter in 32 tokens."""
ONE_STEP = {"max_steps": 1, "batch_size": 2, "tokens_per_step": 2 * LENGTH}
VALID = [(pair.mechanism, pair.backbone) for pair in pairs() if pair.refusal is None]
INVALID = [(pair.mechanism, pair.backbone) for pair in pairs() if pair.refusal is not None]
ids = "-".join

LOAD = """
import json, sys, torch, transformers

def state_bytes(cache):
    seen, tensors, rest = set(), [], list(cache.layers)
    while rest:
        item = rest.pop()
        if isinstance(item, torch.Tensor):
            tensors.append(item)
        elif isinstance(item, (list, tuple)):
            rest += item
        elif hasattr(item, "__dict__") and id(item) not in seen:
            seen.add(id(item))
            rest += vars(item).values()
    return sum(tensor.nbytes for tensor in tensors)

for job in sys.argv[1:]:
    auto_class, folder = job.split("=", 1)
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
    ids = torch.arange(3, 93)[None]
    found = {"class": type(model).__module__}
    with torch.no_grad():
        torch.save(model(ids[:, :40]).logits, folder + "/logits.pt")
        if model.can_generate():
            full = model.double()(ids).logits  # gain cells have levels, which turn rounding into whole steps
            cache, parts, sizes = transformers.DynamicCache(config=model.config), [], []
            for piece in ids.split([13, 1, 9, 1, 1, 55, *[1] * 10], 1):
                parts.append(model(piece, past_key_values=cache, use_cache=True).logits)
                sizes.append(state_bytes(cache))
            found |= {"cached": (torch.cat(parts, 1) - full).abs().max().item(), "sizes": [sizes[2], sizes[-1]]}
    print(json.dumps(found))
"""
"""A process of its own for all repositories: the logits of each, whole and through its cache."""


class Workshop:
    """Teachers, text and finished students of all pairs, each made when first asked for."""

    def __init__(self, root):
        self.root = root
        self.text = write_text(root / "text.jsonl")
        sentences = [f"The old cats ran past {x} houses. Two {x} cats slept in it. All {x} ran." for x in "abcdefgh"]
        self.sentences = root / "sentences.jsonl"
        self.sentences.write_text("\n".join(json.dumps({"text": text}) for text in sentences))
        self.blocks = token_blocks(4)
        self.teacher, self.student = functools.cache(self._teacher), functools.cache(self._student)

    @functools.cached_property
    def rows(self):
        data = {"dataset": str(self.sentences), "sequence_length": LENGTH, "cache_dir": str(self.root / "cache")}
        config = DataConfig(**data, validation_documents=0)
        return prepare_rows(config, linearize.load_tokenizer(self.teacher("bert")))[0]

    def _teacher(self, backbone):
        path = self.root / f"teacher-{backbone}"
        if BACKBONES[backbone].encoder:
            return make_bert_directory(path, kind=BertForMaskedLM, num_hidden_layers=2)
        return make_teacher_directory(path, make=DECODERS[backbone])

    def _student(self, mechanism, backbone):
        """Converted and through one step of each stage: the model, and what each stage has changed."""
        out = self.root / f"{mechanism}-{backbone}"
        torch.manual_seed(0)
        model = linearize.convert(self.teacher(backbone), {"type": mechanism, **SETTINGS[mechanism]})
        changes = {}
        for stage in make_pair(mechanism, backbone).stages:
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            model = STEPS[stage](self, model, backbone, out).eval()
            after = model.state_dict()
            assert after.keys() == before.keys() and all(tensor.isfinite().all() for tensor in after.values())
            changes[stage] = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
        return model, changes

    def save(self, model, backbone, path):
        """The repository, complete."""
        teacher = self.teacher(backbone)
        return save_final(model, linearize.load_tokenizer(teacher), path, make_record(teacher))

    # --- one step of each stage

    def calibrate(self, model, backbone, out):
        rows = self.rows if BACKBONES[backbone].encoder else self.blocks
        report = calibrate(model, rows, 2)
        if report is not None:  # gain cells have none: their scalers are set, not searched for
            before, after = (sum(errors.values()) for errors in (report.before, report.after))
            assert report.sequences == 2 and 0 < after < before
        return model

    def adapt(self, model, backbone, out):
        config, rows = AdaptationConfig(iterations=1), [self.blocks[i] for i in range(2)]
        targets = collect_statistics(model, rows)
        other = with_settings(model, config.attention)
        adapt_scalers(other, targets, rows, config)
        return other

    def transfer(self, model, backbone, out):
        rows = self.rows if BACKBONES[backbone].encoder else self.blocks
        branch = "both" if "linear" in model.arms() else "mixed"
        result = transfer_attention(model, rows, TransferConfig(**ONE_STEP, branch=branch), output_dir=out)
        assert result.steps == 1
        return model

    def finetune(self, model, backbone, out):
        result = finetune(model, self.blocks, FinetuneConfig(**ONE_STEP), output_dir=out)
        assert result.steps == 1 and len(result.losses) == 1
        return merge(result.model)

    def train_all(self, model, backbone, out):
        start = self.save(model, backbone, out / "start")
        data = {"dataset": str(self.text), "sequence_length": LENGTH, "validation_documents": 6}
        settings = {
            "model_name_or_path": str(start), "output_dir": str(out / "pretrain"), "device": "cpu",
            "data": {**data, "cache_dir": str(self.root / "cache")}, "evaluation": None,
            "stages": {"training": {"kind": "train", "weights": "all", **ONE_STEP, "warmup_steps": 0}},
        }  # fmt: skip
        result = linearize.run(settings)
        assert result.stages["training"].steps == 1
        return linearize.load_student(result.final)

    def find_words(self, model, backbone, out):
        tokenizer = linearize.load_tokenizer(self.teacher(backbone))
        config = FullTrainingConfig(**ONE_STEP, objective="masked", warmup_steps=0)
        hidden = {"tokenizer": tokenizer, "mask_probability": 0.15}
        assert train_all(model, self.rows, config, output_dir=out, device="cpu", **hidden).steps == 1
        return model

    def distill(self, model, backbone, out):
        config, teacher = EmbeddingConfig(**ONE_STEP, warmup_steps=0), load_encoder(self.teacher(backbone))
        assert len(distill_embeddings(model, teacher, self.rows, config, output_dir=out, device="cpu").losses) == 1
        return model


STEPS = {
    "calibration": Workshop.calibrate,
    "transfer": Workshop.transfer,
    "adaptation": Workshop.adapt,
    "LoRA": Workshop.finetune,
    "all weights": Workshop.train_all,
    "masked words": Workshop.find_words,
    "embeddings": Workshop.distill,
}
MECHANISM_ALONE = {"calibration", "transfer", "adaptation"}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("pairs"))


def test_the_readme_has_the_table_of_the_registries():
    readme = README.read_text(encoding="utf-8")
    assert f"## What works\n\n{BEGIN}\n" in readme
    assert readme == with_table(readme), "run python scripts/write_pairs_table.py"
    for mechanism in ATTENTIONS:
        assert f"\n| {mechanism} | " in readme
    with pytest.raises(ValueError, match="no place for the table"):
        with_table("# linearize\n")


def test_all_pairs_are_here():
    assert len(VALID) + len(INVALID) == len(ATTENTIONS) * len(BACKBONES)
    assert set(STEPS) == set(STAGES) == {stage for pair in pairs() for stage in pair.stages}


@pytest.mark.parametrize("mechanism, backbone", VALID, ids=map(ids, VALID))
def test_one_step_of_each_stage(workshop, mechanism, backbone):
    """The first stages change numbers of the mechanism alone, the others the projections too."""
    model, changes = workshop.student(mechanism, backbone)
    projections = backbone_of(model.config).lora_targets
    for stage, names in changes.items():
        mixers = {name for name in names if ".mixer." in name}
        moved = {target for target in projections if any(f".{target}." in name for name in names)}
        if stage in MECHANISM_ALONE:
            assert names == mixers != set(), stage
        else:
            assert moved == set(projections), stage


@pytest.mark.slow
def test_every_valid_pair_loads_without_the_package(workshop):
    """The logits are those of the model that was saved, and prefill in pieces and decoding give them too."""
    folders, jobs = {}, []
    for mechanism, backbone in VALID:
        model, _ = workshop.student(mechanism, backbone)
        folders[mechanism, backbone] = workshop.save(model, backbone, workshop.root / f"final-{mechanism}-{backbone}")
        auto_class = BACKBONES[backbone].auto_class(model.config.architectures)
        jobs.append(f"{auto_class.__name__}={folders[mechanism, backbone]}")
    done = subprocess.run([*without_package(LOAD), *jobs], capture_output=True, text=True, cwd=workshop.root)
    assert done.returncode == 0, done.stderr
    for names, line in zip(VALID, done.stdout.splitlines(), strict=True):
        found, pair = json.loads(line), make_pair(*names)
        logits = torch.load(folders[names] / "logits.pt", weights_only=True)
        with torch.no_grad():
            expected = workshop.student(*names)[0](torch.arange(3, 43)[None]).logits
        assert found["class"].startswith("transformers_modules.")
        assert (logits - expected).abs().max() <= 1e-5, names
        assert ("cached" in found) is (pair.cache is not None)
        if pair.cache is not None:
            assert found["cached"] <= 1e-9, names
            first, last = found["sizes"]
            assert last == first if pair.cache == "constant" else last > 2 * first, names


@pytest.mark.parametrize("mechanism, backbone", INVALID, ids=map(ids, INVALID))
def test_every_invalid_pair_is_one_sentence(workshop, mechanism, backbone, capsys):
    sentence = make_pair(mechanism, backbone).refusal
    assert "\n" not in sentence and mechanism in sentence and not make_pair(mechanism, backbone).stages
    teacher, out = workshop.teacher(backbone), workshop.root / "refused"
    capsys.readouterr()  # what saving it has printed
    with pytest.raises(UserError) as caught:
        linearize.convert(teacher, {"type": mechanism, **SETTINGS[mechanism]})
    assert str(caught.value) == sentence
    assert main(["convert", str(teacher), str(out), "--attention.type", mechanism]) == 2
    run = ["--model_name_or_path", str(teacher), "--data.dataset", str(workshop.sentences), "--output_dir", str(out)]
    run += ["--data.sequence_length", str(LENGTH)]
    stages = ["--transfer.max_steps", "1", "--finetune", "none"]
    commands = [["run", "--attention.type", mechanism, *stages, *run]]
    commands += [["run", preset.name, *run] for preset in all_presets() if preset.mechanism() == mechanism][:1]
    assert [main(command) for command in commands] == [2] * len(commands)
    assert capsys.readouterr().err == f"linearize: {sentence}\n" * (len(commands) + 1) and not out.exists()
