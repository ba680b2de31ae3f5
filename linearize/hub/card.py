"""The README.md of a converted repository: metadata for the Hub, a quick start, what was measured, how it was made."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

BASE_TAGS = ["linearize", "linear-attention"]
QUICK_STARTS = {
    "AutoModelForCausalLM": (
        "text-generation",
        """\
generator = pipeline("text-generation", "{name}", trust_remote_code=True)
print(generator("The history of Rome began", max_new_tokens=40)[0]["generated_text"])""",
    ),
    "AutoModel": (
        "feature-extraction",
        """\
embed = pipeline("feature-extraction", "{name}", trust_remote_code=True)
print(embed("The history of Rome began with a quarrel.", return_tensors=True)[0].mean(0))""",
    ),
    "AutoModelForMaskedLM": (
        "fill-mask",
        """\
fill = pipeline("fill-mask", "{name}", trust_remote_code=True)
print(fill(f"The history of Rome began with a {{fill.tokenizer.mask_token}}."))""",
    ),
    "AutoModelForSequenceClassification": (
        "text-classification",
        """\
classify = pipeline("text-classification", "{name}", trust_remote_code=True)
print(classify("The history of Rome began with a quarrel."))""",
    ),
    "AutoModelForTokenClassification": (
        "token-classification",
        """\
classify = pipeline("token-classification", "{name}", trust_remote_code=True)
print(classify("Romulus founded Rome."))""",
    ),
    "AutoModelForQuestionAnswering": (
        "question-answering",
        """\
from transformers import AutoModelForQuestionAnswering, AutoTokenizer
model = AutoModelForQuestionAnswering.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("Who founded Rome?", "Romulus founded Rome.", return_tensors="pt")
answer = model(**inputs)
place = slice(answer.start_logits.argmax(), answer.end_logits.argmax() + 1)
print(tokenizer.decode(inputs.input_ids[0, place]))""",
    ),
}
"""Auto class -> the Hub's name of the task, and what a reader copies."""
IMPORT = "from transformers import pipeline\n"
ARCHITECTURES = {"gpt2": "GPT-2", "gptj": "GPT-J", "llama": "Llama", "mistral": "Mistral", "bert": "BERT"}
"""Stock `model_type` -> how it is written."""


TRAINED = {"mechanism": "the mechanism", "lora": "adapters of low rank", "all": "all weights"}
"""What a stage trained, by the record -> as the card says it."""


def model_card(name: str, record: Mapping[str, Any], config: Any) -> str:
    """The card as Markdown with its metadata block.

    Args:
        name: What the quick start loads, until the repository has a name on the Hub.
        record: The contents of `linearize.json`.
        config: Config of the converted model.
    """
    sections = [
        front_matter(card_metadata(record, config)),
        f"# {title(record, config)}",
        introduction(record, config),
        quick_start(name, config),
        evaluation_section(record),
        training_section(record),
        papers_section(config),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def front_matter(metadata: ModelCardData) -> str:
    """The block on top of a card."""
    return f"---\n{metadata.to_yaml()}\n---"


def adapter_card(name: str, lora: Any, config: Any, *, unsaved: str) -> str:
    """The card of an adapter that was trained on a converted model.

    Args:
        name: What the quick start loads: the adapter's directory.
        lora: Its peft config, whose `base_model_name_or_path` is what it belongs on.
        config: Config of the converted model.
        unsaved: That name where the model lies in no repository.
    """
    base = lora.base_model_name_or_path
    local, lost = os.path.exists(base), base == unsaved
    kinds = " and ".join(mechanisms(config)) or "softmax"
    shown = f"`{os.path.basename(base)}`, the converted model beside it" if local else f"`{base}`"
    metadata = ModelCardData(library_name="peft", pipeline_tag="text-generation", tags=["linearize", "lora"])
    if not local and not lost:
        metadata.base_model, metadata["base_model_relation"] = base, "adapter"
    along = ", and the mechanism trained along" if lora.modules_to_save else ""
    belongs = "a converted model that was not saved" if lost else shown
    lines = [
        f"Low-rank adapters of rank {lora.r} on {', '.join(sorted(lora.target_modules))}{along}, for a "
        f"{architecture(config)} with {kinds} attention.",
        f"They belong on {belongs}; on the softmax teacher that it was converted from they give another model.",
    ]
    if local:
        lines.append("To publish them, publish that model and name it in adapter_config.json.")
    code = f"""\
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)"""
    if lost:
        code = f"""\
from peft import PeftModel
model = PeftModel.from_pretrained(converted, "{name}")  # converted: as linearize.convert made it, with its stage 1"""
    front, text = front_matter(metadata), "\n".join(lines)
    return f"{front}\n\n# Adapters\n\n{text}\n\n## Quick start\n\n```python\n{code}\n```\n"


def task(config: Any) -> tuple[str, str]:
    """The Hub's name of the model's task, and the code that shows it."""
    from linearize.modeling import backbone_of

    return QUICK_STARTS[backbone_of(config).auto_class(config.architectures).__name__]


def quick_start(name: str, config: Any) -> str:
    """A few lines to run, and what they need."""
    kind, code = task(config)
    code = code.format(name=name)
    code = code if code.startswith("from ") else IMPORT + code
    state = f" {state_sentence(config)}" if kind == "text-generation" else ""
    return (
        f"## Quick start\n\n```python\n{code}\n```\n\n"
        f"The model code comes with the repository; the `linearize` package is not needed.{state}"
    )


def card_metadata(record: Mapping[str, Any], config: Any) -> ModelCardData:
    """What the Hub reads: base model, data, library, tags, what was measured."""
    kinds = [f"{kind}-attention" for kind in mechanisms(config)]
    results = list(eval_results(record, config)) or None
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=task(config)[0],
        tags=BASE_TAGS + kinds,  # each once
        eval_results=results,
        model_name=title(record, config) if results else None,  # the results' own: elsewhere it is no field of a card
    )
    if record.get("teacher") and record.get("teacher_on_hub"):
        metadata.base_model, metadata["base_model_relation"] = record["teacher"], "finetune"
    dataset = hub_dataset(record)
    if dataset and trained(record):
        metadata.datasets = [dataset]
    return metadata


def hub_dataset(record: Mapping[str, Any]) -> str | None:
    """The Hub's id of the training data; None of local data."""
    dataset = ((record.get("recipe") or {}).get("data") or {}).get("dataset")
    return dataset if isinstance(dataset, str) and dataset.count("/") == 1 else None


def eval_results(record: Mapping[str, Any], config: Any) -> Iterator[EvalResult]:
    """What was measured of the model itself, for the Hub; figures that are not finite are left out."""
    for dataset, metric, name, value in _figures(record):
        if value is not None and math.isfinite(value):
            yield EvalResult(
                task_type=task(config)[0], metric_type=metric, metric_name=name, metric_value=value, **dataset
            )


def _figures(record: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str, str, float | None]]:
    """Fields of the dataset, the metric's name in the field and its name in the card's tables, the figure."""
    recipe = record.get("recipe") or {}
    own = (recipe.get("evaluation") or {}).get("texts") or (recipe.get("data") or {}).get("validation")
    dataset = None if own else hub_dataset(record)
    text = {"dataset_type": dataset or "text", "dataset_name": f"held-out text{f' of {dataset}' if dataset else ''}"}
    if record.get("evaluation"):
        from linearize.evaluation.arms import STUDENT
        from linearize.evaluation.report import Report

        if row := Report.from_dict(record["evaluation"]).row(STUDENT):
            yield text, "perplexity", "perplexity", row.perplexity
    if record.get("embeddings"):
        from linearize.evaluation.arms import STUDENT
        from linearize.evaluation.embeddings import EmbeddingReport

        if found := EmbeddingReport.from_dict(record["embeddings"]).row(STUDENT):
            yield text, "cosine_similarity", "cosine to the teacher", found.cosine
            yield text, "spearmanr", "rank correlation with the teacher", found.rank_correlation
            yield text, "recall", "recall@1", found.recall
            yield text, "perplexity", "masked perplexity", found.masked_perplexity
    for name in ("perplexity", "accuracy"):
        shown = f"validation {name}" if record.get("evaluation") else name  # beside the table's, of other tokens
        yield text, name, shown, (record.get("validation") or {}).get(name)
    for score in (record.get("tasks") or {}).get("scores", ()):
        name = score["metric"] if score["filter"] == "none" else f"{score['metric']} ({score['filter']})"
        yield {"dataset_type": score["task"], "dataset_name": score["task"]}, score["metric"], name, score["value"]
    if glue := record.get("glue"):
        from linearize.evaluation.glue.tasks import METRIC_NAMES, TASKS, score_name

        of_task = TASKS[glue["task"]]
        for split in of_task.validation:
            dataset_fields = {"dataset_type": "glue", "dataset_name": f"GLUE {of_task.name}"}
            dataset_fields |= {"dataset_config": glue["task"], "dataset_split": split}
            for metric in of_task.metrics:
                yield dataset_fields, metric, METRIC_NAMES[metric], glue["scores"].get(score_name(metric, split))


def trained(record: Mapping[str, Any]) -> bool:
    """Whether any stage trained."""
    return any((record.get("tokens") or {}).values())


def mechanisms(config: Any) -> list[str]:
    """Types of the mechanisms in use, in order of first appearance."""
    return list(dict.fromkeys(config.mixers[name]["type"] for name in config.mixer_types if name in config.mixers))


def from_scratch(record: Mapping[str, Any]) -> bool:
    """Whether the model was trained from random weights, without a teacher."""
    return "teacher" in record and record["teacher"] is None


def architecture(config: Any) -> str:
    """Name of the model's architecture."""
    from linearize.modeling import PREFIX

    kind = config.model_type.removeprefix(PREFIX)
    return ARCHITECTURES.get(kind, kind)


def teacher_name(record: Mapping[str, Any]) -> str:
    """Name of the teacher as the card prints it."""
    return str(record.get("teacher") or "a pretrained model")


def title(record: Mapping[str, Any], config: Any) -> str:
    """Heading of the card."""
    kinds = " and ".join(name.replace("_", "-") for name in mechanisms(config)) or "softmax"
    name = architecture(config) if from_scratch(record) else os.path.basename(teacher_name(record))
    return f"{name} with {kinds} attention"


def introduction(record: Mapping[str, Any], config: Any) -> str:
    """What the model is, in two sentences."""
    converted = sum(name in config.mixers for name in config.mixer_types)
    kinds = ", ".join(mechanisms(config)) or "none"
    if from_scratch(record):
        size = f" of {record['parameters']:,} parameters" if record.get("parameters") else ""
        lines = [
            f"A {architecture(config)}{size}, trained from random weights, with another attention than softmax in "
            f"{converted} of its {config.num_hidden_layers} layers ({kinds})."
        ]
    else:
        lines = [
            f"`{teacher_name(record)}` with {converted} of its {config.num_hidden_layers} attention layers converted "
            f"({kinds})."
        ]
    for name, settings in config.mixers.items():
        values = ", ".join(f"{key} {value}" for key, value in settings.items() if key != "type" and value is not None)
        lines.append(f"Layers `{name}`: {settings['type']} attention, {values}.")
    if converted < config.num_hidden_layers and config.softmax_window is not None:
        lines.append(f"Softmax layers see the last {config.softmax_window:,} tokens, as the teacher's do.")
    if (record.get("recipe") or {}).get("imported"):
        lines.append("Imported from a checkpoint of the published code, which trained it.")
    elif not trained(record):
        lines.append("**Nothing has been trained yet: expect poor results until the stages of training have run.**")
    return "\n".join(lines)


def state_sentence(config: Any) -> str:
    """What generation has to keep."""
    if any(mixer["type"] == "landmark" and mixer["max_blocks"] is None for mixer in config.mixers.values()):
        return "Generation keeps all blocks of the text and reads the few that it retrieves."
    return "Generation keeps a state of constant size."


def evaluation_section(record: Mapping[str, Any]) -> str:
    """The tables of the evaluation, if there was one."""
    parts = []
    if validation := validation_sentence(record):
        parts.append(validation)
    if record.get("evaluation"):
        from linearize.evaluation.report import Report

        parts.append(Report.from_dict(record["evaluation"]).markdown().strip())
    if record.get("embeddings"):
        from linearize.evaluation.embeddings import EmbeddingReport

        parts.append(EmbeddingReport.from_dict(record["embeddings"]).markdown().strip())
    if record.get("tasks"):
        from linearize.evaluation.tasks import TaskReport, TaskScore

        scores = [TaskScore(**score) for score in record["tasks"]["scores"]]
        parts.append(TaskReport(scores).markdown().strip())
    if glue := record.get("glue"):
        from linearize.evaluation.glue.report import one_table
        from linearize.tables import markdown_tables

        parts.append(markdown_tables([one_table(glue["task"], glue["scores"])]).strip())
    return "## Evaluation\n\n" + "\n\n".join(parts) if parts else ""


def validation_sentence(record: Mapping[str, Any]) -> str:
    """What was measured at the end of the training of all weights, if anything was."""
    measured = record.get("validation") or {}
    if measured.get("perplexity") is None:
        return ""
    perplexity, tokens = measured["perplexity"], measured["tokens"]
    if measured.get("accuracy") is None:
        return f"At the end of training, perplexity of {tokens:,} tokens of the validation text: {perplexity:.2f}."
    return (
        f"At the end of training, {measured['accuracy']:.1%} of {tokens:,} hidden tokens of the validation text are "
        f"found; their perplexity is {perplexity:.2f}."
    )


def training_section(record: Mapping[str, Any]) -> str:
    """Tokens, settings and versions."""
    lines = ["## How it was made", ""]
    revision = f", revision `{record['teacher_revision']}`" if record.get("teacher_revision") else ""
    start = "no teacher: random weights" if from_scratch(record) else f"teacher: `{teacher_name(record)}`{revision}"
    lines.append(f"- {start}")
    if calibration := record.get("calibration"):
        lines.append(f"- {calibration_sentence(calibration)}")
    if selection := record.get("selection"):
        from linearize.evaluation.placement import selection_sentence

        lines.append(f"- {selection_sentence(selection)}")
    tokens, whats = record.get("tokens") or {}, record.get("trained") or {}
    kinds = {
        name: (stage or {}).get("kind") for name, stage in ((record.get("recipe") or {}).get("stages") or {}).items()
    }
    for stage in dict.fromkeys([*whats, *tokens]):  # the record has them in order
        if stage in tokens:
            what = f", {TRAINED[whats[stage]]} trained" if whats.get(stage) in TRAINED else ""
            lines.append(f"- {stage}: {tokens[stage]:,} tokens{what}")
        elif kinds.get(stage) == "adapt":
            lines.append(f"- {stage}: scalers fitted to statistics, no gradients")
    versions = ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items())
    lines.append(f"- versions: {versions}")
    if record.get("selection"):
        from linearize.config.selection import PLOT

        lines += ["", f"![The window of every layer, and what was measured]({PLOT})"]
    if record.get("recipe"):
        settings = yaml.safe_dump(dict(record["recipe"]), sort_keys=False, allow_unicode=True).strip()
        lines += ["", "<details><summary>All settings</summary>", "", f"```yaml\n{settings}\n```", "", "</details>"]
    return "\n".join(lines)


def papers_section(config: Any) -> str:
    """The papers behind the mechanisms, from the registry."""
    from linearize.modeling.registry import ATTENTIONS

    papers = [f"- {kind} attention: {ATTENTIONS[kind].paper}" for kind in mechanisms(config) if kind in ATTENTIONS]
    return "## Papers\n\n" + "\n".join(papers) if papers else ""


def calibration_sentence(summary: Mapping[str, Any]) -> str:
    """One line of a `CalibrationReport.summary()`."""
    return "calibration: {sequences:,} sequences, {measure} {before:.3f} -> {after:.3f}".format_map(summary)
