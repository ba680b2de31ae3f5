"""A whole run: convert, transfer, finetune, evaluate, save. Recipes, `linearize run` and programs call `run`.

    result = linearize.run("llama3_8b_linear")           # a preset, a YAML file, a dictionary or a RunConfig
    result = linearize.run({"model_name_or_path": "my/llama", "data": {"dataset": "text.jsonl"}, "output_dir": "out"})

Each process of a launcher calls it; the main one alone prints and writes. What lies in the run directory:
`linearize/runs/directory.py`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.config.selection import OF_THE_CONVERSION
from linearize.config.settings import FinetuneConfig, RunConfig, TransferConfig
from linearize.config.yaml_io import resolve, to_values
from linearize.errors import UserError
from linearize.failures import smaller, stage
from linearize.processes import from_main_process
from linearize.runs.directory import RunDirectory

if TYPE_CHECKING:
    from accelerate import PartialState

    from linearize.data.sequences import TokenBlocks
    from linearize.evaluation import Report, TaskReport
    from linearize.evaluation.by_length import LengthText
    from linearize.runs.plan import RunPlan
    from linearize.stages.calibration_report import CalibrationReport
    from linearize.stages.finetuning import FinetuneResult
    from linearize.stages.select import Selection
    from linearize.stages.transfer import TransferResult

logger = logging.getLogger(__name__)


@dataclass
class RunResult:
    """What a run leaves. On the other processes of a launcher the measurements are None."""

    output_dir: Path
    final: Path
    """The converted repository."""
    record: dict[str, Any] = field(default_factory=dict)
    """The contents of its `linearize.json`."""
    calibration: CalibrationReport | None = None
    transfer: TransferResult | None = None
    finetune: FinetuneResult | None = None
    report: Report | None = None
    tasks: TaskReport | None = None


def run(config: RunConfig | Mapping[str, Any] | str | PathLike[str]) -> RunResult:
    """Run the whole pipeline.

    Args:
        config: Settings, a mapping of them, a YAML file, or the name of a shipped preset.

    Raises:
        UserError: Input that the user can mend; nothing half-written is left, checkpoints stay.
        KeyboardInterrupt: After Ctrl-C in a training stage, with a checkpoint left.
    """
    from linearize.runs.plan import complete_attention

    return _Run(complete_attention(resolve(config))).run()


def plan(config: RunConfig | Mapping[str, Any] | str | PathLike[str]) -> RunPlan:
    """Check a run and work out its steps and memory; nothing is loaded or written."""
    from linearize.runs.plan import complete_attention, make_plan

    settings = complete_attention(resolve(config))
    RunDirectory(settings).check()
    return make_plan(settings)


class _Run:
    """One call of `run`, step by step."""

    def __init__(self, config: RunConfig) -> None:
        from accelerate import PartialState

        self.config = config
        self.directory = RunDirectory(config)
        self.state: PartialState = PartialState(cpu=config.device == "cpu")
        self.record: dict[str, Any] = {}
        self.selection: Selection | None = None
        self.length_texts: list[LengthText] = []
        self.result = RunResult(self.directory.path, self.directory.final)

    def run(self) -> RunResult:
        """The steps of a run, in order."""
        from linearize.conversion.students import load_model_tokenizer
        from linearize.runs.plan import make_plan

        config, directory = self.config, self.directory
        directory.check()
        from_main_process(self._check_push)
        if config.resume_from_checkpoint and directory.is_complete():
            self._say(f"The run in {directory.path} is complete: {directory.final}")
            if self.state.is_main_process:
                self._push()
            return self._finished()
        self.plan = make_plan(config, self.state.num_processes)
        if self.state.is_main_process:
            self.plan.show()
        self.tokenizer = load_model_tokenizer(config.model_name_or_path, revision=config.revision)
        train, validation, held_out = self._load_data()
        self._select(train)
        with stage("loading the model", "load the base in 4 bit with load_in_4bit, or choose a smaller dtype"):
            model = self._load_model(quantized=True)
        inputs = self._inputs(model, train)
        from_main_process(lambda: directory.prepare(inputs))
        if self.selection is not None and self.state.is_main_process:
            self.selection.save(directory.path)
        report = self._start_report(held_out)
        if report is not None:
            self._measure(lambda: report.before_training(model, base_is_teacher=self._base_is_teacher()))
        if self.plan.calibration:
            self._calibrate(model, train)
            if report is not None:
                self._measure(lambda: report.after_calibration(model))
        if config.transfer is not None:
            self._transfer(config.transfer, model, train, validation)
            if config.finetune is not None and self.state.is_main_process:
                self._save(self._merged(model), self.directory.transferred)
            if report is not None:
                self._measure(lambda: report.after_transfer(model))
        if config.finetune is not None:
            if config.evaluation is not None and config.evaluation.yardstick:
                self._train_yardstick(config.finetune, model, train, report)
            self._finetune(config.finetune, model, train)
        if self.state.is_main_process:
            final = self._merged(model)
            del model  # a quantised base goes, before the full weights need its place
            self._finish(final, report)
        return self.result

    def _finish(self, final: Any, report: Any) -> None:
        """Save, measure and push the merged model: the main process, while the others are done."""
        self._save(final, self.directory.final)
        self._evaluate(final, report)
        self._push()
        self._say(f"Saved {self.directory.final}")
        if report is not None and report.report.by_length is not None:
            report.report.by_length.warn()

    def _push(self) -> None:
        """Upload the repository, if asked to; a push that failed is made good by resuming."""
        if self.config.push_to_hub is not None:
            from linearize.hub.repository import push

            self._say(f"Pushed to {push(self.directory.final, self.config.push_to_hub)}")

    def _check_push(self) -> None:
        """Ask the Hub who we are before hours of training, not after them."""
        if self.config.push_to_hub is None:
            return
        from linearize.hub.repository import check_token

        check_token(self.config.push_to_hub)

    def _load_data(self) -> tuple[TokenBlocks | None, TokenBlocks | None, TokenBlocks | None]:
        """Sequences to train on, to validate on and to evaluate on, as far as this run needs them."""
        from linearize.data.sequences import load_text_blocks, prepare_data, refuse_training_files
        from linearize.evaluation.by_length import run_texts
        from linearize.stages.finetune_lengths import training_rows

        data, evaluation = self.config.data, self.config.evaluation
        train = validation = held_out = None
        with stage("preparing the data"):
            trains = self.plan.stages or self.plan.calibration or self.plan.selection
            if trains and evaluation is not None and evaluation.texts is not None:
                refuse_training_files(data.dataset, evaluation.texts)
            if trains or (evaluation is not None and evaluation.texts is None):
                train, validation = prepare_data(data, self.tokenizer, seed=self.config.seed)
                held_out = validation
                if self.config.finetune is not None:
                    training_rows(train, self.config.finetune)  # refused here, not after the hours of stage 1
                self._say(f"{len(train):,} training sequences, {len(validation):,} for validation")
            if evaluation is not None and evaluation.texts is not None:
                length = evaluation.sequence_length or data.sequence_length
                limit, column = evaluation.max_tokens, data.text_field
                held_out = load_text_blocks(evaluation.texts, self.tokenizer, length, limit, text_field=column)
            if evaluation is not None and held_out and self.state.is_main_process:
                where = (self.tokenizer, self.state.device)
                self.length_texts = run_texts(evaluation, data, held_out, *where, trains=bool(trains))
        if evaluation is not None and not held_out:
            raise UserError(
                "There is no held-out text to evaluate on: give data.validation or evaluation.texts, raise "
                "data.validation_documents, or set evaluation to none."
            )
        return train, validation, held_out

    def _select(self, train: Any) -> None:
        """Choose windows and softmax layers by measuring, where the settings leave them to it."""
        plan = self.plan.selection
        if plan is None:
            return
        from linearize.stages.select import select

        earlier = self.directory.path if self.config.resume_from_checkpoint else None

        def load(attention: dict[str, Any]) -> Any:
            return self._load_model(quantized=True, layers={"attention": attention})

        with stage("the selection", "lower select.sequence_length or select.batch_size, or set load_in_4bit"):
            self.selection = select(plan, train, load, earlier)
        self._say(self.selection.sentence())

    def _layers(self) -> dict[str, Any]:
        """Which layer gets which attention, as `convert` takes it."""
        chosen = self.selection
        if chosen is None:
            return self.config.layers()
        return {"mixer_types": chosen.mixer_types, "mixers": chosen.mixers}

    def _load_model(self, *, quantized: bool, layers: dict[str, Any] | None = None) -> Any:
        """The untrained student, or the converted model that the run starts from.

        Args:
            quantized: In 4 or 8 bits if the settings say so; False loads the full weights on the CPU, to merge into.
            layers: Other layers than those of the run.
        """
        import torch

        from linearize.conversion.students import convert, load_student

        config, options = self.config, self._load_options(quantized=quantized)
        torch.manual_seed(config.seed)
        model: Any
        if self.plan.converted:
            model = load_student(config.model_name_or_path, revision=config.revision, **options)
        else:
            where = {name: getattr(config, name) for name in ("sliding_window", "revision")}
            model = convert(config.model_name_or_path, **(layers or self._layers()), **where, **options)
        if "quantization_config" not in options and quantized:
            model.to(self.state.device)
        model.set_op_backend(config.op_backend)
        return model

    def _load_options(self, *, quantized: bool) -> dict[str, Any]:
        """How weights are loaded; arguments as in `_load_model`."""
        import torch

        from linearize.conversion.quantization import quantization_config

        dtype = getattr(torch, self.config.dtype)
        bits = quantization_config(
            load_in_4bit=self.config.load_in_4bit and quantized,
            load_in_8bit=self.config.load_in_8bit and quantized,
            compute_dtype=dtype,
        )
        placed = {} if bits is None else {"quantization_config": bits, "device_map": {"": self.state.device}}
        return {"dtype": dtype, **placed}

    def _inputs(self, model: Any, train: Any) -> dict[str, str] | None:
        """Digests of what the run is made of; None where it leaves nothing that another call could go on with."""
        from linearize.stages.identity import base_identity, data_identity

        if train is None and self.config.evaluation is None:
            return None
        return {"base": base_identity(model)} | ({} if train is None else {"data": data_identity(train)})

    def _start_report(self, blocks: Any) -> Any:
        """The measurements of this run; None on the other processes or when there are none."""
        if self.config.evaluation is None or not self.state.is_main_process:
            return None
        from linearize.runs.report import RunReport

        report = RunReport(
            self.config.evaluation,
            blocks,
            self.directory.measurements,
            keep=self.config.resume_from_checkpoint,
            texts=self.length_texts,
            trained=self.config.data.sequence_length,
        )
        if self.selection is not None and (note := self.selection.sentence()) not in report.report.notes:
            report.report.notes.append(note)
        return report

    def _calibrate(self, model: Any, train: Any) -> None:
        from linearize.stages.calibration import calibrate, save_calibration

        lower = "set load_in_4bit, and resume; or set calibration_sequences to 0 in a new run"
        with stage("calibration", lower):
            calibration = calibrate(model, train, self.plan.calibration)
        self.result.calibration = calibration
        if self.state.is_main_process:
            save_calibration(calibration, self.directory.path)
        self._say(calibration.sentence())

    def _transfer(self, settings: TransferConfig, model: Any, train: Any, validation: Any) -> None:
        from linearize.stages.transfer import transfer_attention

        length = self.config.data.sequence_length
        lower = smaller("transfer.batch_size", settings.batch_size, length, "set load_in_4bit")
        with stage("stage 1 (attention transfer)", lower):
            self.result.transfer = transfer_attention(
                model,
                train,
                settings,
                output_dir=self.directory.path,
                seed=self.config.seed,
                resume=self.config.resume_from_checkpoint,
                report_to=self.config.report_to,
                validation=validation,
                device=self.config.device if self.config.device == "cpu" else None,
            )
        self._say_stage("attention transfer", self.result.transfer)

    def _train_yardstick(self, settings: FinetuneConfig, model: Any, train: Any, report: Any) -> None:
        """The same stage 2 on the softmax teacher, which is measured and taken off again."""
        trained = self._train_lora(settings, model, train, self.directory.yardstick, arm="teacher")
        self._say_stage("yardstick", trained)
        if report is not None:
            self._measure(lambda: report.after_yardstick(trained.model))
        trained.model.unload()

    def _finetune(self, settings: FinetuneConfig, model: Any, train: Any) -> None:
        given = {"tokenizer": self.tokenizer, **self._base_of_adapter(model)}
        self.result.finetune = self._train_lora(settings, model, train, self.directory.path, **given)
        self._say_stage("finetuning", self.result.finetune)

    def _train_lora(self, settings: FinetuneConfig, model: Any, train: Any, output: Path, **options: Any) -> Any:
        from linearize.stages.finetuning import SMALLER, finetune

        config = self.config
        lower = smaller("finetune.batch_size", settings.batch_size, config.data.sequence_length, *SMALLER)
        options |= {"seed": config.seed, "resume": config.resume_from_checkpoint, "report_to": config.report_to}
        with stage("stage 2 (finetuning)", lower):
            return finetune(model, train, settings, output_dir=output, **options)

    def _base_of_adapter(self, model: Any) -> dict[str, Any]:
        """The repository that stage 2's adapters belong on: the one that the run starts from, or what calibration and
        stage 1 have made of it, which is saved for them."""
        source = self.config.model_name_or_path
        if self.plan.converted and self.result.transfer is None and self.result.calibration is None:
            local = os.path.exists(source)
            return {"base_model": os.path.abspath(source) if local else source, "revision": self.config.revision}
        if self.state.is_main_process:
            self._save(self._merged(model), self.directory.transferred)
        self.state.wait_for_everyone()
        return {"base_model": self.directory.transferred.absolute()}

    def _merged(self, model: Any) -> Any:
        """The plain model in full weights."""
        import torch

        from linearize.conversion.quantization import is_quantized
        from linearize.stages.finetuning import merge, merge_into_unquantized

        quantized = is_quantized(model)
        if self.result.finetune is None:
            if not quantized:
                return model
            full = self._load_model(quantized=False)
            full.load_mixer_state_dict({name: tensor.cpu() for name, tensor in model.mixer_state_dict().items()})
            return full
        adapted = self.result.finetune.model
        if not quantized:
            return merge(adapted)
        self.result.finetune.model = None
        return merge_into_unquantized(
            adapted,
            self.config.model_name_or_path,
            dtype=getattr(torch, self.config.dtype),
            revision=self.config.revision,
        )

    def _save(self, model: Any, directory: Path) -> None:
        """Leave the converted repository of the stages so far, unless it is there."""
        from linearize.config.record import loaded_commit, make_record, read_record
        from linearize.hub.repository import save_final

        earlier, stages = self._earlier_record(), {"transfer": self.result.transfer, "finetune": self.result.finetune}
        done = {name: outcome for name, outcome in stages.items() if outcome is not None}
        source = self.config.model_name_or_path
        self.record = make_record(
            source,
            earlier=earlier,
            revision=loaded_commit(source, self.config.revision),
            recipe=self._recipe((earlier or {}).get("recipe") or {}),
            tokens={name: outcome.tokens for name, outcome in done.items()},
            seconds={name: outcome.seconds for name, outcome in done.items()},
            peak_memory_bytes={name: outcome.peak_memory_bytes for name, outcome in done.items()},
            calibration=self.result.calibration.summary() if self.result.calibration else None,
            selection=self.selection.summary() if self.selection else None,
        )
        self.result.record = self.record
        if directory == self.directory.transferred and read_record(directory).get("tokens") == self.record["tokens"]:
            return
        with stage("saving the model"):
            save_final(model, self.tokenizer, directory, self.record)

    def _recipe(self, earlier: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of this run; of a model converted before, its attention and the stages that it went through."""
        recipe = to_values(self.config)
        if self.plan.converted:
            for name in OF_THE_CONVERSION:
                recipe[name] = earlier.get(name)
            for name in ("transfer", "finetune"):
                recipe[name] = recipe[name] or earlier.get(name)
            if "imported" in earlier:
                recipe["imported"] = earlier["imported"]
        return recipe

    def _evaluate(self, model: Any, report: Any) -> None:
        """Measure the saved model, and add the figures to its record and card."""
        settings = self.config.evaluation
        if settings is None:
            return
        from linearize.hub.repository import write_record
        from linearize.runs.report import run_tasks_of

        lower = (
            f"lower evaluation.batch_size (now {settings.batch_size}) or evaluation.length_tokens; the model is saved "
            f"in {self.directory.final}"
        )
        with stage("evaluation", lower):
            model = self._placed(model)
            self.result.report = report.finish(model)
            self.record["evaluation"] = self.result.report.to_dict()
            self.result.report.draw(self.directory.path / "plots")
            write_record(self.directory.final, self.record, model.config)
            self.result.report.show()
            if settings.tasks:
                self.result.tasks = run_tasks_of(settings, model, self.tokenizer, self.directory.path)
                self.record["tasks"] = self.result.tasks.to_dict()
                write_record(self.directory.final, self.record, model.config)

    def _placed(self, model: Any) -> Any:
        """The finished model on its device, where nothing else of the run is left; where full weights do not fit, the
        saved ones in the bits that the run trained on."""
        import gc

        import torch

        from linearize.conversion.students import load_student
        from linearize.hardware.memory_full import fits

        gc.collect()
        if self.state.device.type == "cuda":
            torch.cuda.empty_cache()
        options = self._load_options(quantized=True)
        if "quantization_config" not in options or fits(model, self.state.device):
            return model.to(self.state.device)
        return load_student(self.directory.final, **options)

    def _base_is_teacher(self) -> bool:
        """Whether the weights outside the mechanism are the teacher's: not once a stage trained them or if unknown."""
        from linearize.config.record import base_is_teacher

        earlier = self._earlier_record()
        return earlier is None or base_is_teacher(earlier)

    def _earlier_record(self) -> dict[str, Any] | None:
        """The record of the converted model that the run starts from; None for a teacher."""
        from linearize.config.record import read_record

        config = self.config
        return read_record(config.model_name_or_path, revision=config.revision) if self.plan.converted else None

    def _finished(self) -> RunResult:
        from linearize.config.record import read_record

        self.result.record = read_record(self.directory.final)
        return self.result

    def _say(self, text: str) -> None:
        if self.state.is_main_process:
            print(text, flush=True)

    def _say_stage(self, name: str, outcome: Any) -> None:
        from linearize.runs.report import stage_line

        planned = self.plan.stage(name)
        self._say(stage_line(name, outcome, planned.forecast if planned else None))

    def _measure(self, work: Callable[[], None]) -> None:
        """Measure on the main process; the others go on and wait for it in the next stage."""
        with stage("evaluation", "lower evaluation.batch_size or evaluation.length_tokens"):
            work()
