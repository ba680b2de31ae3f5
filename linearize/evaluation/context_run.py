"""The context-length part of `linearize evaluate`: what is asked for, and checked before anything is measured."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from linearize.errors import UserError
from linearize.evaluation import by_length, natural, passkey
from linearize.evaluation.context_curve import ContextPerplexityReport, context_perplexity, load_stretches
from linearize.evaluation.context_lengths import Trials, check_trials, parse_lengths, parse_trials
from linearize.evaluation.context_reading import check_positions
from linearize.evaluation.retrieval import Prompt, RetrievalReport, measure_retrieval
from linearize.evaluation.rope_scaling import RopeScaling, parse_rope_scaling

DEMO_TEXT = Path(__file__).parents[1] / "demo_text" / "validation.jsonl.gz"


@dataclasses.dataclass(frozen=True)
class ContextPlan:
    """What to measure: lengths in tokens of each part (none: the part is left out), and how.

    Fields: passkey, natural, perplexity, ascending lengths; trials, prompts of each length; depths, bins; seed, of the
    prompts; rope_scaling, of the model.
    """

    passkey: tuple[int, ...] = ()
    natural: tuple[int, ...] = ()
    perplexity: tuple[int, ...] = ()
    trials: Trials = dataclasses.field(default_factory=Trials)
    depths: int = 10
    seed: int = 0
    rope_scaling: RopeScaling | None = None

    def lengths(self) -> tuple[int, ...]:
        """All that are asked for."""
        return self.passkey + self.natural + self.perplexity


def plan_contexts(
    passkey: str | None = None,
    natural: str | None = None,
    perplexity: str | None = None,
    *,
    trials: str | None = None,
    depths: int = 10,
    seed: int = 0,
    rope_scaling: str | None = None,
) -> ContextPlan:
    """Read the flags of the command line.

    Raises:
        UserError: one of them is malformed, or they do not go together.
    """
    flags = {"--passkey": passkey, "--natural": natural, "--context_perplexity": perplexity}
    passkeys, naturals, contexts = (() if text is None else parse_lengths(text, flag) for flag, text in flags.items())
    scaling = None if rope_scaling is None else parse_rope_scaling(rope_scaling)
    plan = ContextPlan(passkeys, naturals, contexts, Trials(), depths, seed, scaling)
    if plan.passkey or plan.natural:
        plan = dataclasses.replace(plan, trials=parse_trials(trials))
        check_trials(plan.trials, sorted({*plan.passkey, *plan.natural}), depths)
    return plan


def prepare_contexts(
    model: Any,
    tokenizer: Any,
    plan: ContextPlan,
    *,
    texts: Sequence[str | Path] = (),
    text_field: str = "text",
    max_tokens: int = 65_536,
    batch_size: int = 1,
    output: str | Path | None = None,
) -> list[Callable[[], Any]]:
    """Make all prompts and check all inputs; each part that comes back measures itself and returns its report.

    Args:
        model: student, stock model, or peft wrapper of either.
        texts: files for `natural` and `perplexity`; default the demo's held-out text.
        max_tokens: that the perplexity scores at each length.
        batch_size: sequences read together.
        output: folder in which the files of every finished length are kept up to date; default none.

    Raises:
        UserError: a length that does not fit the model or the prompt, or text that is missing or too short.
    """
    where, field = (list(texts), text_field) if texts else ([DEMO_TEXT], "text")
    notes = _notes(model)
    parts: list[Callable[[], Any]] = []

    def save(report: Any) -> None:
        if output is not None:
            report.save(output)

    def retrieval(prompts: dict[int, list[Prompt]], report: RetrievalReport) -> None:
        report.notes += notes
        options: dict[str, Any] = {"batch_size": batch_size, "after_length": save}
        parts.append(lambda: measure_retrieval(model, tokenizer, prompts, report, **options))

    for flag, lengths, answer in (
        ("--passkey", plan.passkey, passkey.NEW_TOKENS),
        ("--natural", plan.natural, natural.NEW_TOKENS),
        ("--context_perplexity", plan.perplexity, 0),
    ):
        check_positions(model, flag, lengths, answer)
    chosen: dict[str, Any] = {"trials": plan.trials, "depths": plan.depths, "seed": plan.seed}
    if plan.passkey:
        prompts = passkey.passkey_prompts(tokenizer, plan.passkey, **chosen)
        retrieval(prompts, passkey.passkey_report(plan.depths, plan.seed))
    if plan.natural:
        prompts = natural.natural_prompts(tokenizer, plan.natural, natural.read_documents(where, field), **chosen)
        retrieval(prompts, natural.natural_report(plan.depths, plan.seed))
    if plan.perplexity:
        stretches = load_stretches(where, tokenizer, plan.perplexity, max_tokens, text_field=field)
        report = ContextPerplexityReport(stretches.scored, len(stretches.contexts), stretches.documents, notes=notes)
        options: dict[str, Any] = {"batch_size": batch_size, "report": report, "after_length": save}
        parts.append(lambda: context_perplexity(model, stretches, plan.perplexity, **options))
    return parts


def measure_contexts(model: Any, tokenizer: Any, plan: ContextPlan, **options: Any) -> list[Any]:
    """Measure all that a plan asks for and return the reports; `options` are those of `prepare_contexts`.

    Raises:
        UserError: see there; nothing has been measured or written then.
    """
    return [measure() for measure in prepare_contexts(model, tokenizer, plan, **options)]


def trained_length(given: str, source: str, revision: str | None = None) -> int:
    """The tokens that `--by_length` means.

    Args:
        given: a length as a person writes it, or auto: the one in the record of `source`.
        revision: of `source` on the Hub.

    Raises:
        UserError: it is no length, or the record has none.
    """
    from linearize.config.record import read_record

    if given.strip().lower() == "auto":
        recipe = read_record(source, revision=revision).get("recipe") or {}
        recorded = (recipe.get("data") or {}).get("sequence_length")
        if recorded is None:
            raise UserError(f"--by_length auto: {source} has no record of a trained length; give it, such as 1k.")
        return int(recorded)
    lengths = parse_lengths(given, "--by_length")
    if len(lengths) > 1 or lengths[0] < 2:
        raise UserError(f"--by_length is {given!r}: give one trained length of 2 tokens or more, such as 1k, or auto.")
    return lengths[0]


def prepare_by_length(
    model: Any,
    tokenizer: Any,
    trained: int,
    *,
    texts: Sequence[str | Path] = (),
    text_field: str = "text",
    limit: int | None = None,
    **options: Any,
) -> Callable[[], by_length.LengthReport]:
    """Read the texts; what comes back measures and returns the report.

    Args:
        texts: files, each scored by itself; default the demo's held-out text.
        limit: tokens of each to read at most; default as many as the device has time for.
        options: of `measure_by_length`.

    Raises:
        UserError: a text is missing, unreadable or shorter than the trained length.
    """
    where, field = (list(texts), text_field) if texts else ([DEMO_TEXT], "text")
    limit = limit or by_length.default_tokens(model.device)
    read = by_length.load_lengths(where, tokenizer, trained, limit, text_field=field)
    return lambda: by_length.measure_by_length(model, read, trained, **options)


def _notes(model: Any) -> list[str]:
    """What a reader must know of the model."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if rope.get("rope_type") != "yarn":
        return []
    context = rope["original_max_position_embeddings"]
    return [
        f"RoPE is scaled by YaRN with a factor of {rope['factor']:g}, from a trained context of {context:,} tokens."
    ]
