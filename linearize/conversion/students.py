"""From a stock checkpoint to an untrained student, and back into memory from a converted repository."""

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from linearize.config.record import loaded_commit
from linearize.conversion.gguf_files import gguf_config, gguf_file, gguf_weights, is_gguf
from linearize.conversion.quantization import keep_differentiable, refuse_quantized
from linearize.data.vocabulary import check_vocabulary
from linearize.errors import UserError
from linearize.load_errors import explained
from linearize.modeling import BACKBONES, PREFIX, Backbone, is_encoder
from linearize.paths import user_path

logger = logging.getLogger(__name__)

SLIDING_WINDOW = ("keep", "lift")

GENERATION_MODES = ("do_sample", "num_beams", "use_cache", "return_dict_in_generate")
"""Settings of a generation config that say whether others mean anything."""

NOT_CARRIED = (
    "model_type",
    "architectures",
    "transformers_version",
    "_name_or_path",
    "auto_map",
    "layer_types",
    "dtype",
    "use_cache",  # false is a trace of training: a student would read the whole text again for every token
)
NOT_GENERATED_WITH = ("use_cache", "cache_implementation", "cache_config", "prompt_lookup_num_tokens")
"""Settings of a teacher's generation that a student has no use for: its state is its cache, and is never cut back."""


def convert(
    model_name_or_path: str | Path,
    attention: Any = None,
    *,
    mixer_types: Sequence[str] | None = None,
    mixers: dict[str, dict] | None = None,
    softmax_layers: Sequence[int] = (),
    sliding_window: str = "keep",
    revision: str | None = None,
    token: str | None = None,
    dtype: str | torch.dtype = "auto",
    quantization_config: Any = None,
    device_map: Any = None,
) -> PreTrainedModel:
    """Give a pretrained model another attention; nothing is trained.

    The teacher's weights load by name; only the mechanism's own parameters are new, in float32. The student of an
    encoder has the head that `architectures` in the teacher's config names, or none where no student has that head.

    Args:
        model_name_or_path: Hub id, local directory, or a `.gguf` file.
        attention: settings of one mechanism for every layer: a typed config or a dict with `"type"`; default linear.
        mixer_types, mixers: a name per layer and the settings of each name, instead of `attention`.
        softmax_layers: layers that keep softmax attention; negative numbers count from the end.
        sliding_window: of a teacher that has one, such as Mistral-7B-v0.1: `keep` it in softmax layers and the
            teacher arm, or `lift` it there, so that they see all tokens. Converted layers never have it.
        revision, token: of the Hub repository.
        dtype: of the model; `auto` is the checkpoint's.
        quantization_config: for example a BitsAndBytesConfig; the mechanism's parameters stay float32.
        device_map: as in `from_pretrained`.

    Returns:
        The student, a normal PreTrainedModel in evaluation mode.

    Raises:
        UserError: the checkpoint cannot be read, its architecture is not supported, or settings are wrong.
    """
    source = user_path(model_name_or_path)
    where = {"revision": revision, "token": token}
    teacher_config = load_config(source, **where)
    backbone = teacher_backbone(source, teacher_config)
    config = student_config(
        teacher_config, backbone.config, attention, mixer_types, mixers, softmax_layers, sliding_window
    )
    options = {"dtype": dtype, "quantization_config": quantization_config, "device_map": device_map}
    options = {name: value for name, value in options.items() if value is not None}
    model = _load_weights(source, backbone, teacher_config, config, where, options)
    keep_differentiable(model)
    start_landmarks(model)
    model.name_or_path = source
    model.config._commit_hash = loaded_commit(source, revision)  # never saved
    model.config.architectures = [type(model).__name__]
    if not is_gguf(source) and model.can_generate():
        take_generation_config(model, source, where)
    return model.eval()


def _load_weights(
    source: str, backbone: Backbone, teacher: Any, config: Any, where: dict[str, Any], options: dict[str, Any]
) -> Any:
    """The student with the teacher's weights.

    Args:
        teacher: Its config. config: The student's.
        where: Revision and token on the Hub.
        options: Of `from_pretrained`; the dtype `auto` is the file's.

    Raises:
        UserError: the checkpoint cannot be read, or lacks weights.
    """
    with quiet_transformers(), explained(source):
        if is_gguf(source):
            weights = gguf_weights(source, teacher)
            if options.get("dtype") == "auto":
                options = {**options, "dtype": next(iter(weights.values())).dtype}
            where_from: str | None = None
            extra: dict[str, Any] = {"state_dict": weights}
        else:
            where_from, extra = source, where
        # from_pretrained returns a pair when asked for the loading report.
        load: Any = backbone.model(teacher.architectures).from_pretrained
        model, info = load(where_from, config=config, output_loading_info=True, **extra, **options)
    check_loaded(source, info, model)
    return model


def start_landmarks(model: Any) -> None:
    """A new model's landmarks start from the mean of its vocabulary, and nothing happens without any."""
    if (tokens := model.base_model.landmarks) is not None:
        head = model.get_output_embeddings()
        embeddings = model.get_input_embeddings().weight
        tokens.start_from(embeddings, embeddings if head is None else head.weight)


def convert_like(model_name_or_path: str | Path, student: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """`convert`, untrained, with every setting of a converted model's config.

    Raises:
        UserError: as `convert`.
    """
    config: Any = student
    return convert(
        model_name_or_path,
        mixer_types=list(config.mixer_types),
        mixers=dict(config.mixers),
        sliding_window="lift" if config.softmax_window is None else "keep",
        **options,
    )


def load_student(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    token: str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Load a converted repository with this package's classes.

    Raises:
        UserError: it cannot be read, or is no converted repository.
    """
    source = user_path(path)
    where = {"revision": revision, "token": token}
    config = load_config(source, **where)
    if not config.model_type.startswith(PREFIX):
        raise UserError(
            f"{source} is a {config.model_type} model, not a converted one: run `linearize convert` on it first"
        )
    with quiet_transformers(), explained(source):
        backbone = BACKBONES[config.model_type.removeprefix(PREFIX)]
        load: Any = backbone.auto_class(config.architectures).from_pretrained
        model, info = load(source, dtype=dtype, trust_remote_code=False, output_loading_info=True, **where, **options)
    if lost := sorted(info["missing_keys"]):
        raise UserError(f"{source} lacks {len(lost)} weights, first {lost[0]}: save the repository again")
    keep_differentiable(model)
    mend_generation_config(model, source)
    return model.eval()


def load_model(
    path: str | Path, *, dtype: str | torch.dtype = torch.float32, revision: str | None = None
) -> PreTrainedModel:
    """Load a causal language model: a converted repository by `load_student`, else a stock checkpoint.

    Raises:
        UserError: it cannot be read, or is an encoder.
    """
    source = user_path(path)
    config = load_config(source, revision=revision)
    refuse_encoder(source, config)
    if config.model_type.startswith(PREFIX):
        return load_student(source, dtype=dtype, revision=revision)
    with quiet_transformers(), explained(source):
        load: Any = AutoModelForCausalLM.from_pretrained
        model = load(source, dtype=dtype, revision=revision)
    mend_generation_config(model, source)
    return model.eval()


def load_encoder(
    path: str | Path, *, dtype: str | torch.dtype = torch.float32, revision: str | None = None
) -> PreTrainedModel:
    """Load an encoder with the head it was saved with: a converted repository, else a stock checkpoint.

    Raises:
        UserError: it cannot be read, or is no encoder.
    """
    source = user_path(path)
    config = load_config(source, revision=revision)
    if not is_encoder(config):
        known = ", ".join(name for name, backbone in BACKBONES.items() if backbone.encoder)
        raise UserError(f"{source} is a {config.model_type} model, which is no encoder: known are {known}")
    if config.model_type.startswith(PREFIX):
        return load_student(source, dtype=dtype, revision=revision)
    auto_class = BACKBONES[config.model_type].auto_class(config.architectures)
    with quiet_transformers(), explained(source):
        return auto_class.from_pretrained(source, dtype=dtype, revision=revision).eval()


def refuse_encoder(source: str, config: PreTrainedConfig) -> None:
    """Say what trains and measures other models, where one that generates text is needed.

    Raises:
        UserError: the config is an encoder's, or names a class without the head that predicts tokens.
    """
    if is_encoder(config):
        raise UserError(
            f"{source} is an encoder, which predicts no next token: train it with `linearize run minilm_linear`, and "
            "measure its embeddings with `linearize evaluate DIRECTORY --data FILE`"
        )
    backbone = BACKBONES.get(config.model_type.removeprefix(PREFIX))
    if backbone is not None and backbone.auto_class(config.architectures) is not AutoModelForCausalLM:
        raise UserError(
            f"{source} has no language-modelling head (its class is {backbone.model(config.architectures).__name__}): "
            "give the checkpoint of a model that generates text, or train this one with transformers' Trainer"
        )


def load_config(source: str, *, revision: str | None = None, token: str | None = None) -> PreTrainedConfig:
    """The configuration of a Hub repository, a directory or a `.gguf` file.

    Raises:
        UserError: it cannot be read.
    """
    source = user_path(source)
    where = {"revision": revision, "token": token, "trust_remote_code": False}
    with quiet_transformers(), explained(source):
        if is_gguf(source):
            return gguf_config(source)
        if (folder := Path(source)).is_dir() and not (folder / "config.json").is_file():
            raise UserError(f"{source} holds no config.json: give a directory that save_pretrained wrote, or a Hub id")
        return AutoConfig.from_pretrained(source, **where)


def load_tokenizer(source: str | Path, *, revision: str | None = None, token: str | None = None):
    """The tokenizer of a Hub repository, a directory or a `.gguf` file.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    source = user_path(source)
    with quiet_transformers(), explained(source, what="tokenizer"):
        if is_gguf(source):
            file = gguf_file(source)
            return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        return AutoTokenizer.from_pretrained(source, revision=revision, token=token, trust_remote_code=False)


def load_model_tokenizer(source: str | Path, *, revision: str | None = None):
    """The tokenizer of a model that is to be trained or measured.

    Raises:
        UserError: as `load_tokenizer`, or the model's embedding lacks rows for its ids.
    """
    config = load_config(str(source), revision=revision)
    tokenizer = load_tokenizer(source, revision=revision)
    check_vocabulary(tokenizer, config.vocab_size, str(source))
    return tokenizer


def student_config(
    teacher, config_class, attention, mixer_types, mixers, softmax_layers, sliding_window
) -> PreTrainedConfig:
    """The config of a teacher's student; arguments as in `convert`.

    Raises:
        UserError: settings are wrong, or the teacher's config has what a student cannot have.
    """
    if sliding_window not in SLIDING_WINDOW:
        raise UserError(f"sliding_window is {sliding_window!r}, but it must be one of {', '.join(SLIDING_WINDOW)}")
    fields = {name: value for name, value in teacher.to_dict().items() if name not in NOT_CARRIED}
    if "gguf" in str(fields.get("quantization_config", "")):  # its weights arrive dequantised
        fields.pop("quantization_config", None)
    if sliding_window == "lift" and "sliding_window" in fields:
        fields["sliding_window"] = None
    if mixers is None:
        settings = (
            asdict(attention)
            if is_dataclass(attention) and not isinstance(attention, type)
            else dict(attention or {"type": "linear"})
        )
        mixers = {settings.setdefault("type", "linear"): settings}
    layers = teacher.num_hidden_layers
    if mixer_types is None:
        if len(mixers) != 1:
            raise UserError("mixers has several entries: say which layer uses which with mixer_types")
        kept = set()
        for index in softmax_layers:
            if not -layers <= index < layers:
                raise UserError(f"softmax_layers names layer {index}, the model has layers 0 to {layers - 1}")
            kept.add(index % layers)
        mixer_types = ["softmax" if i in kept else next(iter(mixers)) for i in range(layers)]
    try:
        return config_class(**fields, mixer_types=list(mixer_types), mixers=mixers)
    except Exception as error:  # @strict wraps ours and its own errors in several classes
        raise UserError(_first_reason(error)) from error


def _first_reason(error: BaseException) -> str:
    """The innermost message, which is the one that names the value."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())


def teacher_backbone(source: str, config: PreTrainedConfig) -> Backbone:
    """The backbone of a checkpoint that is to be converted.

    Raises:
        UserError: it cannot be, or is converted already.
    """
    if config.model_type.startswith(PREFIX):
        raise UserError(f"{source} is converted already: load it with load_student, or convert its teacher")
    if config.model_type not in BACKBONES:
        kind, known = config.model_type, ", ".join(BACKBONES)
        raise UserError(f"{source} is a {kind} model, which cannot be converted yet: supported are {known}")
    refuse_quantized(source, config)
    return BACKBONES[config.model_type]


def check_loaded(source: str, info: dict, model: Any) -> None:
    """Refuse a checkpoint that lacks weights, or has other ones, by what loading it has reported."""
    missing = sorted(name for name in info["missing_keys"] if "mixer." not in name)
    optional = [name for name in missing if name.startswith(model.optional_weights)]
    if optional:
        logger.warning("%s lacks %s: what needs them means nothing until trained", source, ", ".join(optional))
    if missing := [name for name in missing if name not in optional]:
        raise UserError(f"{source} lacks {len(missing)} weights of its architecture, first {missing[0]}")
    if odd := sorted(info["unexpected_keys"]):
        raise UserError(f"{source} holds {len(odd)} weights that its architecture does not have, first {odd[0]}")
    if clash := sorted(str(x) for x in info.get("mismatched_keys", ())):
        raise UserError(f"{source} holds weights of another shape than its config.json says, first {clash[0]}")


def take_generation_config(model: PreTrainedModel, source: str, where: dict) -> None:
    """A converted model generates with the teacher's settings; a checkpoint without any keeps the default."""
    from transformers import GenerationConfig

    with contextlib.suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(source, **where)
    for name in NOT_GENERATED_WITH:
        setattr(model.generation_config, name, None)
    mend_generation_config(model, source)


def mend_generation_config(model: Any, source: str) -> None:
    """Leave out settings of a checkpoint that have no effect or contradict others, such as a temperature of greedy
    decoding: transformers refuses to save them, which a run would find out when all training is done."""
    from transformers import GenerationConfig

    config: Any = getattr(model, "generation_config", None)
    if config is None or _is_valid(config):
        return
    found = config.to_diff_dict()
    mended, dropped = GenerationConfig(), []
    for name in sorted(found, key=lambda name: name not in GENERATION_MODES):  # the others depend on these
        trial = copy.deepcopy(mended)
        setattr(trial, name, found[name])
        if _is_valid(trial):
            mended = trial
        else:
            dropped.append(name)
    logger.warning(
        "the generation config of %s does not validate and is saved without %s, which it cannot have beside its other "
        "settings",
        source,
        ", ".join(dropped),
    )
    model.generation_config = mended


def _is_valid(config: Any) -> bool:
    """Whether transformers saves a generation config."""
    with quiet_transformers():
        try:
            config.validate(strict=True)
        except ValueError:
            return False
    return True


def take_saved_generation_config(model: Any, source: str) -> None:
    """Those of a checkpoint of an old version, with the model's padding token."""
    take_generation_config(model, source, {})
    model.generation_config.pad_token_id = model.config.pad_token_id


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide transformers' load reports and bars: what they say is checked here and said in one sentence."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
