"""A model whose attentions are arms (`state_arms.py`), the texts it is scored on, and what is measured."""

import math
from pathlib import Path

import numpy as np
import recall_tasks
import torch
from state_arms import ArmAttention, See
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer


class Bench:
    """A model whose attentions are arms, the texts, and the measures."""

    def __init__(self, args):
        torch.manual_seed(args.seed)
        torch.backends.cuda.matmul.allow_tf32 = True
        self.args, self.device = args, args.device
        path = Path(args.model)
        where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
        source = path.parent if where else path
        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="sdpa", **where)
        self.model = model.to(args.device).requires_grad_(False)
        for layer in self.model.model.layers:
            layer.self_attn = ArmAttention(layer.self_attn)
        self.arms: list[ArmAttention] = [layer.self_attn for layer in self.model.model.layers]
        self.texts = dict(np.load(args.data / "tokens.npz"))
        self.tokenizer = AutoTokenizer.from_pretrained(source, **where)
        self.shape = (self.model.config.num_key_value_heads, self.arms[0].stock.head_dim)

    def see(self, layers: list[See | None]) -> None:
        for arm, layer in zip(self.arms, layers, strict=True):
            arm.see = layer

    def batch(self, ids: np.ndarray) -> Tensor:
        return torch.from_numpy(ids.astype(np.int64)).to(self.device)

    def hidden(self, ids: Tensor) -> Tensor:
        return self.model.model(input_ids=ids, use_cache=False).last_hidden_state

    @torch.no_grad()
    def score(self, lengths, texts=None, tokens: int | None = None) -> dict:
        """Mean log-likelihood a token of every whole piece: text -> length -> list."""
        results: dict[str, dict[int, list[float]]] = {}
        for name in texts or [name for name in self.texts if name != "train"]:
            ids = self.texts[name]
            ids = ids[: min(len(ids), tokens or self.args.scored)]
            for length in lengths:
                pieces = ids[: len(ids) // length * length].reshape(-1, length)
                together = max(1, 4096 // length)
                values = [
                    value
                    for i in range(0, len(pieces), together)
                    for value in self.likelihoods(self.batch(pieces[i : i + together]))
                ]
                results.setdefault(name, {})[length] = values
        return results

    @torch.no_grad()
    def recall(self, lengths, count: int) -> dict:
        """Share of each item's answers that are right: task -> length -> list (`recall_tasks.py`); the items are the
        same for every arm and seed."""
        results: dict[str, dict[int, list[float]]] = {}
        for length in lengths:
            together = max(1, 4096 // length)
            items = recall_tasks.tasks(self.tokenizer, self.texts["validation"], length, count)
            for name, (ids, answers) in items.items():
                shares = [
                    recall_tasks.accuracy(self.predictions(part.to(self.device)).cpu(), part, asked)
                    for part, asked in zip(ids.split(together), answers.split(together), strict=True)
                ]
                results.setdefault(name, {})[length] = torch.cat(shares).tolist()
        return results

    def predictions(self, ids: Tensor) -> Tensor:
        """The likeliest next token at each place: `(N, T)`."""
        return torch.cat([self.model.lm_head(part).argmax(-1) for part in self.hidden(ids).split(1024, 1)], 1)

    def likelihoods(self, ids: Tensor) -> list[float]:
        hidden = self.hidden(ids)[:, :-1]
        losses = [
            F.cross_entropy(self.model.lm_head(part).float().flatten(0, 1), target.flatten(), reduction="none")
            .view(target.shape)
            .double()
            for part, target in zip(hidden.split(1024, 1), ids[:, 1:].split(1024, 1), strict=True)
        ]
        return torch.cat(losses, 1).mean(1).tolist()


def perplexities(scores: dict) -> str:
    cells = []
    for name, lengths in scores.items():
        values = " ".join(f"{math.exp(sum(v) / len(v)):.2f}" for v in lengths.values())
        cells.append(f"{name[:12]} {values}")
    return " | ".join(cells)


def shares(recall: dict) -> str:
    """Mean accuracy of each task by length, in percent."""
    cells = (f"{name} " + " ".join(f"{100 * np.mean(v):.0f}" for v in by.values()) for name, by in recall.items())
    return " | ".join(cells)
