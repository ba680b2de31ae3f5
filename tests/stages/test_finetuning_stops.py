"""Stage 2 interrupted, diverged, out of memory or out of disk: what is said, what is left, and how it goes on."""

import errno
import json

import pytest
import torch
from finetuning_toys import InterruptedBlocks, settings, stock_llama, student, token_blocks
from transformers import TrainerCallback

from linearize import UserError
from linearize.stages import finetuning_trainer
from linearize.stages.finetuning import finetune
from linearize.stages.finetuning_trainer import FinetuningTrainer


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return stock_llama(tmp_path_factory.mktemp("stock"))


def checkpoints(output):
    return sorted(path.name for path in (output / "checkpoints" / "finetune").iterdir())


def run(stock, output, **changes):
    keywords = {key: changes.pop(key) for key in ("resume", "arm", "train") if key in changes}
    keywords.setdefault("train", token_blocks())
    model = student(stock, changes.pop("dtype", torch.float32))
    return finetune(model, config=settings(**changes), output_dir=output, **keywords)


def test_resuming_continues_bit_for_bit(stock, tmp_path):
    """Dropout on, and neither the checkpoint nor the end fall on a line of the log or the end of an epoch."""
    changes = {"max_steps": 9, "lora_dropout": 0.1, "kl_weight": 0.5, "save_steps": 4, "logging_steps": 3}
    whole = run(stock, tmp_path / "whole", **changes)
    blocks = token_blocks()
    interrupted = InterruptedBlocks(blocks.input_ids, blocks.labels)
    with pytest.raises(KeyboardInterrupt):
        run(stock, tmp_path / "parts", train=interrupted, **changes)
    assert checkpoints(tmp_path / "parts") == ["step-4"]
    rest = run(stock, tmp_path / "parts", resume=True, **changes)
    assert rest.losses == whole.losses[4:]
    assert rest.log_path.read_text() == whole.log_path.read_text()
    for (name, ours), (_, theirs) in zip(
        rest.model.state_dict().items(), whole.model.state_dict().items(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert checkpoints(tmp_path / "parts") == ["step-8", "step-9"]
    again = run(stock, tmp_path / "parts", resume=True, **changes)
    assert (again.losses, again.steps) == ([], 9)
    assert torch.equal(
        again.model.state_dict()["base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"],
        whole.model.state_dict()["base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"],
    )


def test_resuming_with_another_batch_size_trains_the_same(stock, tmp_path):
    whole = run(stock, tmp_path / "whole", max_steps=6, dtype=torch.float64)
    run(stock, tmp_path / "parts", max_steps=6, dtype=torch.float64, save_steps=3, save_total_limit=9)
    (tmp_path / "parts" / "checkpoints" / "finetune" / "step-6").rename(tmp_path / "away")
    rest = run(stock, tmp_path / "parts", max_steps=6, dtype=torch.float64, resume=True, batch_size=4)
    assert rest.losses == pytest.approx(whole.losses[3:], abs=1e-7)


def test_a_run_is_not_trained_over_and_not_resumed_as_another(stock, tmp_path):
    run(stock, tmp_path, max_steps=2)
    with pytest.raises(UserError, match="already holds checkpoints"):
        run(stock, tmp_path, max_steps=2)
    with pytest.raises(UserError, match=r"trained with num_rows 10 \(now 8\)"):
        run(stock, tmp_path, max_steps=2, resume=True, train=token_blocks(8))


def test_checkpoints_are_kept_to_the_limit(stock, tmp_path):
    """And what a killed process left half-written goes."""
    (tmp_path / "checkpoints" / "finetune" / "checkpoint-99").mkdir(parents=True)
    run(stock, tmp_path, max_steps=6, save_steps=1, save_total_limit=3)
    assert checkpoints(tmp_path) == ["step-4", "step-5", "step-6"]


@pytest.mark.parametrize("how", ["parameter", "gradient", "output"])
def test_not_finite_names_step_and_place(stock, tmp_path, monkeypatch, how):
    model = student(stock)

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            mixer = model.get_base_model().model.layers[2].self_attn.mixer
            if state.global_step != 2:
                return
            if how == "parameter":
                mixer.modules_to_save["default"].feature_map_k.weight.data[0, 0, 0] = torch.nan
            elif how == "gradient":
                mixer.modules_to_save["default"].feature_map_q.weight.register_hook(lambda grad: grad * torch.inf)
            else:
                mixer.register_forward_hook(lambda module, arguments, output: output * torch.nan)

    original = FinetuningTrainer.__init__

    def with_poison(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(Poison())

    monkeypatch.setattr(FinetuningTrainer, "__init__", with_poison)
    place = {
        "parameter": r"the parameter model.layers.2.self_attn.mixer.feature_map_k.weight",
        "gradient": r"the gradient of model.layers.2.self_attn.mixer.feature_map_q.weight",
        "output": r"the output of layers.2.self_attn.mixer",
    }[how]
    with pytest.raises(UserError, match=rf"finetuning stopped: .*{place}\) is .* at step 3"):
        finetune(model, token_blocks(), settings(save_steps=2), output_dir=tmp_path)
    assert checkpoints(tmp_path) == ["step-2"]


def test_out_of_memory_says_what_to_lower(stock, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(finetuning_trainer, "language_model_loss", fail)
    with pytest.raises(
        UserError, match=r"in finetuning \(batch_size 2, sequence_length 32\): lower finetune.batch_size"
    ):
        run(stock, tmp_path)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file")],
)
def test_a_full_disk_leaves_the_previous_checkpoint(stock, tmp_path, monkeypatch, error):
    save, calls = torch.save, []

    def full(content, path, *args, **kwargs):
        if "checkpoint-4" in str(path) and str(path).endswith("optimizer.pt"):
            calls.append(path)
            save({"half": 1}, path)
            raise error
        return save(content, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"no space left on the disk while writing .*step-4"):
        run(stock, tmp_path, save_steps=2)
    assert calls and checkpoints(tmp_path) == ["step-2"]
    monkeypatch.setattr(torch, "save", save)
    assert run(stock, tmp_path, save_steps=2, resume=True).steps == 4
    state = json.loads((tmp_path / "checkpoints" / "finetune" / "step-4" / "state.json").read_text())
    assert state["step"] == 4
