"""The directory of a run: what lies in it, whether it may be used, and whether a resumed run is the run that it holds.

config.yaml                  every setting, resolved
selection.{json,yaml,png}    where windows and softmax layers are chosen by measuring
logs/STAGE.jsonl             losses, STAGE_validation.jsonl; evaluation.json: what has been measured so far;
                             inputs.json: digests of what the run is made of; stages.json: what its stages did;
                             ended.yaml: the settings that final was made with
plots/*.png
checkpoints/STAGE/step-N
STAGE/                       the repository after a stage that another one follows
yardstick/                   the teacher, trained on as many tokens: a repository, or an adapter where a LoRA trains
converted/                   the untrained student, where an adapter belongs on it
adapter/                     LoRA and the trained mechanisms, in peft's format
final/                       the repository after the last stage
report.json, report.md       figures of all stages, of the models between them and of the yardstick
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from linearize.config.record import FINAL, read_record
from linearize.config.selection import FILES
from linearize.config.settings import RunSettings
from linearize.config.yaml_io import differences, read_mapping, resolve, write_config
from linearize.errors import UserError
from linearize.runs.settings import resolve_run, trains_language
from linearize.stages.identity import STEPS, StageState, changed_settings, require_same_inputs

if TYPE_CHECKING:
    from linearize.runs.plan import RunPlan

CONFIG = "config.yaml"
REPORT, TABLES = "report.json", "report.md"
INPUTS = Path("logs", "inputs.json")
DONE = Path("logs", "stages.json")
ENDED = Path("logs", "ended.yaml")
PARTIAL = re.compile(r"\..+\.(tmp|old)-\d+")
"""Names of what was being written when a run was killed (`linearize.files`)."""
YARDSTICK, CONVERTED = "yardstick", "converted"
CONTENTS = (CONFIG, *FILES, "logs", "plots", "checkpoints", YARDSTICK, CONVERTED, "adapter", FINAL, REPORT, TABLES)
FREE_TO_CHANGE = (
    "output_dir",
    "overwrite",
    "resume_from_checkpoint",
    "report_to",
    "push_to_hub",
    "device",
    "op_backend",
    "data.cache_dir",
)
"""Settings that a resumed run may always change, beside those of `stages.identity.changed_settings`."""


class RunDirectory:
    """The directory of one run of any kind.

    Args:
        config: Its settings.
    """

    free_to_change: ClassVar[tuple[str, ...]] = FREE_TO_CHANGE
    """Settings that a resumed run may always change."""
    fixed: ClassVar[tuple[str, ...]] = ()
    """Settings that it may never change, though others of their name may."""

    def __init__(self, config: RunSettings) -> None:
        self.config: Any = config
        self.path = Path(config.output_dir)
        self.final = self.path / FINAL

    @property
    def contents(self) -> tuple[str, ...]:
        """What a run writes there, and all that replacing it deletes."""
        return CONTENTS

    def places(self) -> Mapping[str, str]:
        """The stages in their order: section of the settings -> its checkpoints, or a file that it leaves."""
        return {}

    def stored(self) -> RunSettings:
        """Settings of the run that lies there."""
        return resolve(self.path / CONFIG, settings=type(self.config))

    def holds_run(self) -> bool:
        """Whether any part of a run lies there."""
        return any((self.path / name).exists() for name in self.contents)

    def check(self) -> None:
        """Refuse a directory that this run may not use; nothing is touched.

        Raises:
            UserError: it is a file, holds a run, or holds another run than the one to resume.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file: name a directory as output_dir.")
        if not self.holds_run():
            return
        if self.config.resume_from_checkpoint:
            self._check_same_run()
        elif not self.config.overwrite:
            raise UserError(
                f"{self.path} already holds a run: continue it with --resume_from_checkpoint, replace it with "
                "--overwrite, "
                "or name another output_dir."
            )

    def _check_same_run(self) -> None:
        if not (self.path / CONFIG).is_file():
            return
        states = self.stage_states()
        changed = changed_settings(self.stored(), self.config, states, self.free_to_change, self.fixed)
        if changed:
            raise UserError(
                f"{self.path} holds a run with other settings ({', '.join(changed)}): resume it with its own, "
                f"{self.path / CONFIG}, or name another output_dir."
            )

    def stage_states(self) -> dict[str, StageState]:
        """How far each stage of the run that lies there is."""
        begun = [self._has_begun(place) for place in self.places().values()]
        states = {}
        for number, section in enumerate(self.places()):
            if any(begun[number + 1 :]):
                states[section] = StageState.CLOSED
            else:
                states[section] = StageState.OPEN if begun[number] else StageState.WAITING
        return states

    def _has_begun(self, place: str) -> bool:
        from linearize.training.checkpointing import step_directories

        return (self.path / place).is_file() or bool(step_directories(self.path / place))

    def prepare(self, inputs: Mapping[str, str] | None = None) -> None:
        """Make the directory, without the run that it held if that is to be replaced, and write the settings.

        Args:
            inputs: digests of what the run is made of, named as in `stages.identity.DIGESTS`.

        Raises:
            UserError: the run that it holds was made of others, or it cannot be made.
        """
        from linearize.files import write_file

        noted = self.path / INPUTS
        if self.config.resume_from_checkpoint and noted.is_file() and inputs is not None:
            require_same_inputs(json.loads(noted.read_text(encoding="utf-8")), inputs, self.path)
        if self.config.overwrite:
            for name in self.contents:
                target = self.path / name
                if target.is_dir() and not target.is_symlink():
                    shutil.rmtree(target)
                else:
                    target.unlink(missing_ok=True)
        if self.config.resume_from_checkpoint:
            self._clear_away()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"The directory {self.path} cannot be made ({error.strerror}): name another output_dir."
            ) from error
        write_config(self.config, self.path / CONFIG)
        if inputs is not None:
            write_file(noted, (json.dumps(inputs, indent=1) + "\n").encode())

    def _clear_away(self) -> None:
        """Delete what a killed run has left half-written."""
        for path in [path for path in self.path.rglob(".*") if PARTIAL.fullmatch(path.name)]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


class StagesDirectory(RunDirectory):
    """The directory of a run of stages."""

    @property
    def contents(self) -> tuple[str, ...]:
        """With the repositories of its stages, and of those of the run that lies there."""
        stages = dict.fromkeys([*self.config.stages, *self._stages_there()])
        return (*CONTENTS, *stages)

    def _stages_there(self) -> list[str]:
        path = self.path / CONFIG
        if not path.is_file():
            return []
        stages = read_mapping(path).get("stages")
        return [name for name in stages if isinstance(name, str)] if isinstance(stages, Mapping) else []

    def of_stage(self, name: str) -> Path:
        """The repository after a stage."""
        return self.path / name

    @property
    def yardstick(self) -> Path:
        """The trained teacher."""
        return self.path / YARDSTICK

    @property
    def measurements(self) -> Path:
        """What has been measured so far, for a resumed run to go on with."""
        return self.path / "logs" / "evaluation.json"

    def places(self) -> Mapping[str, str]:
        """Checkpoints of the stages that train, and the repositories that the others leave."""
        places = {
            name: f"checkpoints/{name}" if hasattr(stage, "tokens") else f"{name}/config.json"
            for name, stage in self.config.stages.items()
        }
        gone = [name for name in self._stages_there() if name not in places]
        return places | {name: f"checkpoints/{name}" for name in gone}

    def stored(self) -> RunSettings:
        """Settings of the run that lies there."""
        return resolve_run(self.path / CONFIG)

    def stage_states(self) -> dict[str, StageState]:
        """How far each stage of the run that lies there is. One that left its repository is not taken up again; once
        the yardstick has begun, which trains as long as all stages, their lengths are settled."""
        states = super().stage_states()
        states |= {name: StageState.CLOSED for name in states if (self.of_stage(name) / "config.json").is_file()}
        if self._has_begun(f"checkpoints/{YARDSTICK}"):
            trained = [name for name, stage in self.config.stages.items() if trains_language(stage)]
            states |= {name: StageState.SETTLED for name in trained if states[name] is not StageState.CLOSED}
        return states

    def is_complete(self) -> bool:
        """Whether the run that lies there has ended, and nothing more is asked for."""
        return self.has_ended() and not self.asks_for_more()

    def asks_for_more(self) -> bool:
        """Whether the settings have another stage, or other steps, than those that the repository in `final` was made
        with; also where a run was killed before it could note them."""
        if not (self.path / ENDED).is_file():
            return True
        names = differences(resolve_run(self.path / ENDED), self.config)
        return any(name in self.config.stages or name.rpartition(".")[2] in STEPS for name in names)

    def has_ended(self) -> bool:
        """Whether the run that lies there has ended: the repository is saved and, if asked for, measured."""
        if not self.final.is_dir() or not (self.path / REPORT).is_file():
            return False
        wanted = self.config.evaluation
        return wanted is None or not wanted.tasks or bool(read_record(self.final).get("tasks"))

    def ending(self) -> str:
        """Where all that a finished run left lies, and the next commands."""
        places = {
            "repository": [self.final],
            "report": [self.path / REPORT],
            "plots": [self.path / "plots"],
        }
        found = {what: next((path for path in paths if path.exists()), None) for what, paths in places.items()}
        lines = [f"{what:12s}{path}" for what, path in found.items() if path is not None]
        return "\n".join([*lines, *(f"{'next':12s}{command}" for command in self._next_commands())])

    def _next_commands(self) -> list[str]:
        from linearize.conversion.students import load_config
        from linearize.modeling import is_encoder

        final, config = shlex.quote(str(self.final)), load_config(str(self.final))
        evaluate, on_text = f"linearize evaluate {final} --data FILE", "--data FILE --output_dir DIR"
        if not hasattr(config, "mixer_types"):
            if is_encoder(config):
                glue = f"linearize glue --models {final} --output_dir DIR"
                return [evaluate, glue, f"linearize run minilm_linear {final} {on_text}"]
            return [f"linearize chat {final}", evaluate, f"linearize run PRESET {final} {on_text}"]
        push = f"linearize push {final} OWNER/NAME"
        if is_encoder(config):
            teacher = getattr(self.config, "model_name_or_path", None)
            named = f" --teacher {shlex.quote(teacher)}" if teacher else ""
            return [f"linearize info {final}", evaluate + named, push]
        return [f"linearize chat {final}", evaluate, push]


def stages_done(plan: RunPlan, directory: StagesDirectory) -> int:
    """How many stages, from the first on, a resumed run need not run again: the last of them left its repository."""
    if not directory.config.resume_from_checkpoint:
        return 0
    names = [current.name for current in plan.stages]
    if directory.final.is_dir() and not directory.asks_for_more():
        return len(names)
    left = [directory.of_stage(name) / "config.json" for name in names]
    there = [place for place, path in enumerate(left) if path.is_file()]
    return there[-1] + 1 if there else 0
