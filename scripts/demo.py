"""The demo: a real Llama checkpoint, SmolLM2-135M-Instruct, gets hybrid linear attention on a CPU, and proves it.

    make demo
    python scripts/demo.py --transfer_steps 110 --finetune_steps 30 --seed 0 --output_dir out/demo --json demo.json

Converts all layers (window 64, 4 sinks), trains the mechanism by attention transfer (stage 1), finetunes with LoRA
(stage 2), saves a repository, loads it in a fresh process, and prints what each step did to held-out perplexity beside
the two yardsticks that matter: the same window without any training, and the teacher after the same LoRA steps.
Trained on 512 tokens, it is also shown on 2048 and 4096, beside a plain window of as many bytes.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import Subset

import linearize
from linearize.config.record import make_record
from linearize.config.settings import DataConfig, FinetuneConfig, TransferConfig
from linearize.conversion import load_tokenizer
from linearize.data import prepare_data
from linearize.evaluation import (
    by_length,
    continuation,
    control_name,
    linear_index,
    linear_share,
    perplexity,
    window_reach,
)
from linearize.evaluation.report import STUDENT, TEACHER, Report
from linearize.hardware.state_bytes import state_bytes
from linearize.hub.repository import save_final
from linearize.stages.adapters import merge
from linearize.stages.finetuning import finetune
from linearize.stages.transfer import transfer_attention

SEQUENCE_LENGTH = 512  # tokens
YARDSTICK = "teacher + the same LoRA steps"
CONVERTED, STAGE_1, STAGE_2 = "student after conversion", "student after stage 1", "student after stage 2"
LINEAR_0, LINEAR_1, LINEAR_2 = (f"linear arm after {stage}" for stage in ("conversion", "stage 1", "stage 2"))
SOFTMAX_2 = "softmax arm after stage 2"
LOAD = """\
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{path}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{path}", trust_remote_code=True)"""
GENERATE = """
import sys
inputs = tokenizer({prompt!r}, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens={tokens}, do_sample=False)[0, inputs["input_ids"].shape[1]:]
assert "linearize" not in sys.modules, "the shipped code must do without the package"
print(tokenizer.decode(output, skip_special_tokens=True), end="")"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="order of the data and start of the adapters")
    parser.add_argument("--transfer_steps", type=int, default=110, help="steps of stage 1, 512 tokens each")
    parser.add_argument("--finetune_steps", type=int, default=30, help="LoRA steps, 512 tokens each, for both models")
    parser.add_argument("--evaluation_blocks", type=int, default=12, help="held-out sequences of 512 tokens")
    parser.add_argument("--length_tokens", type=int, default=4096, help="held-out tokens scored past 512; 0: none")
    parser.add_argument("--output_dir", default="out/demo")
    parser.add_argument("--json", help="also write the report to this file")
    parser.add_argument("--model_name_or_path", help="another Llama; default: SmolLM2-135M-Instruct from its wheel")
    parser.add_argument("--train_text", help="default: the demo's own text")
    parser.add_argument("--validation_text", help="default: the demo's own held-out text")
    parser.add_argument("--prompt", default="The history of the Roman Empire began")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> Report:
    args = parse_arguments(argv)
    started = time.perf_counter()
    report, output = Report(), Path(args.output_dir)
    for earlier in (output, output / "yardstick"):  # of an earlier demo: this one starts afresh
        shutil.rmtree(earlier / "checkpoints", ignore_errors=True)
    teacher, data = inputs(args, output)
    tokenizer = load_tokenizer(teacher)
    train, held_out = prepare_data(data, tokenizer)
    texts = [by_length.LengthText.of(by_length.HELD_OUT, held_out, args.length_tokens)] if args.length_tokens else []
    spread = range(0, len(held_out), max(1, len(held_out) // args.evaluation_blocks))[: args.evaluation_blocks]
    held_out = Subset(held_out, spread)

    def measure(name, model, arm):
        return report.add(name, perplexity(model, held_out, arm=arm, description=name))

    headline("Convert every layer; nothing is trained")
    model = linearize.convert(teacher, linearize.LinearAttentionConfig(window=64, sinks=4), dtype=torch.float32)
    report.reach, report.control = window_reach(model), control_name(model)
    report.state = state_bytes(model.config)
    measure(TEACHER, model, "teacher")
    measure(report.control, model, "softmax")
    measure(CONVERTED, model, "mixed")
    measure(LINEAR_0, model, "linear")

    headline(f"Stage 1, attention transfer: the mechanism alone learns, {args.transfer_steps} steps of 512 tokens")
    transfer = TransferConfig(max_steps=args.transfer_steps, tokens_per_step=SEQUENCE_LENGTH)
    stage_1 = transfer_attention(model, train, transfer, output_dir=output, seed=args.seed)
    report.seconds["stage 1, attention transfer"] = stage_1.seconds
    measure(STAGE_1, model, "mixed")
    measure(LINEAR_1, model, "linear")

    headline(f"Yardstick: {args.finetune_steps} LoRA steps on the teacher, which keeps its attention")
    lora = FinetuneConfig(max_steps=args.finetune_steps, tokens_per_step=SEQUENCE_LENGTH, learning_rate=3e-4)
    yardstick = finetune(model, train, lora, output_dir=output / "yardstick", seed=args.seed, arm="teacher")
    report.seconds[f"{YARDSTICK}, training"] = yardstick.seconds
    measure(YARDSTICK, yardstick.model, "teacher")
    if texts:
        report.by_length = by_length.start_report(texts, SEQUENCE_LENGTH)
        by_length.measure_controls(report.by_length, yardstick.model, texts, YARDSTICK)
    model = yardstick.model.unload()

    headline(f"Stage 2: the same {args.finetune_steps} LoRA steps on the student")
    stage_2 = finetune(model, train, lora, output_dir=output, seed=args.seed, tokenizer=tokenizer)
    report.seconds["stage 2, LoRA"] = stage_2.seconds
    measure(STAGE_2, stage_2.model, "mixed")
    measure(LINEAR_2, stage_2.model, "linear")
    measure(SOFTMAX_2, stage_2.model, "softmax")
    report.share = linear_share(stage_2.model, held_out, max_tokens=2048)
    report.seconds["perplexities"] = sum(row.seconds for row in report.rows)
    if report.by_length is not None:
        by_length.measure_student(report.by_length, stage_2.model, texts)
        report.seconds["perplexities by length"] = sum(figure.seconds for figure in report.by_length.figures)

    headline("Save, and load in a fresh process by the code that ships with the weights")
    # 120 tokens end well past the window; within it the untrained student's attention is the teacher's own
    options = {"prompt": args.prompt, "max_new_tokens": 120}
    report.samples = {"prompt": args.prompt}
    report.samples[TEACHER] = continuation(stage_2.model, tokenizer, arm="teacher", adapters=False, **options)
    final = merge(stage_2.model)
    report.samples["student"] = continuation(final, tokenizer, **options)
    tokens = {"attention transfer": stage_1.tokens, "finetuning": stage_2.tokens}
    record = make_record(teacher, tokens=tokens, seconds=report.seconds, evaluation=report.to_dict())
    save_final(final, tokenizer, output / "final", record)
    same = load_in_fresh_process(output / "final", args.prompt, options["max_new_tokens"]) == report.samples["student"]
    report.notes = [
        *verdict(report),
        f"a fresh process without the package continues with {'the same' if same else 'OTHER'} tokens",
    ]
    report.seconds["everything"] = time.perf_counter() - started
    finish(report, output, args.json)
    if not same:
        sys.exit("The saved model does not generate what the trained one does.")
    return report


def inputs(args: argparse.Namespace, output: Path) -> tuple[str, DataConfig]:
    """The teacher's path and the data's settings; what is not given comes from the demo's own."""
    teacher = args.model_name_or_path
    if teacher is None:
        from fetch_smollm2 import is_complete, smollm2_path

        teacher = str(smollm2_path())
        if not is_complete(smollm2_path()):
            sys.exit("The checkpoint is not there yet: run `make demo`, or `python scripts/fetch_smollm2.py` once.")
    text = Path(linearize.__file__).parent / "demo_text"
    data = DataConfig(
        dataset=args.train_text or str(text / "train.jsonl.gz"),
        validation=args.validation_text or str(text / "validation.jsonl.gz"),
        sequence_length=SEQUENCE_LENGTH,
        cache_dir=str(output / "data"),
    )
    return teacher, data


def load_in_fresh_process(final: Path, prompt: str, tokens: int) -> str:
    """Run the three lines that the demo prints, and a continuation, in a process of its own."""
    code = LOAD.format(path=final.absolute()) + GENERATE.format(prompt=prompt, tokens=tokens)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=final)
    if done.returncode:
        sys.exit(f"The saved model does not load:\n{done.stderr}")
    return done.stdout


def verdict(report: Report) -> list[str]:
    """What the table says, in sentences."""
    ppl = {row.name: row.perplexity for row in report.rows}
    closed = linear_index(report.nll(TEACHER), report.nll(STAGE_1), report.nll(report.control))
    return [
        f"stage 1 brings the student to {ppl[STAGE_1] / ppl[report.control]:.3f} of the control's perplexity"
        + (f" and closes {closed:.0%} of its gap to the teacher in log-perplexity" if closed is not None else ""),
        f"the linear arm falls {ppl[LINEAR_0] / ppl[LINEAR_1]:.1f}x in stage 1, "
        f"to {ppl[LINEAR_1] / ppl[TEACHER]:.1f}x the teacher",
        f"after stage 2 the student stands at {ppl[STAGE_2] / ppl[TEACHER]:.3f} of the teacher and at "
        f"{ppl[STAGE_2] / ppl[YARDSTICK]:.3f} of {YARDSTICK}",
        *past_the_trained_length(report.by_length),
    ]


def past_the_trained_length(report: by_length.LengthReport | None) -> list[str]:
    """How the student stands at 4 times the trained length; nothing where it was not measured."""
    if report is None:
        return []
    pairs = [[report.figure(by_length.HELD_OUT, name, times) for name in (STUDENT, YARDSTICK)] for times in (1, 4)]
    ratios = [own.perplexity / other.perplexity for own, other in pairs if own is not None and other is not None]
    if len(ratios) < 2:
        return []
    return [
        f"at 4 times the trained length, {4 * SEQUENCE_LENGTH} tokens, it stands at {ratios[1]:.3f} of {YARDSTICK}, "
        f"at {SEQUENCE_LENGTH} of the same text at {ratios[0]:.3f}"
    ]


def finish(report: Report, output: Path, json_path: str | None) -> None:
    report.save(output)
    if json_path:
        Path(json_path).write_text(report.to_json() + "\n")
    report.show()
    print(f"\nLoad it anywhere with\n\n{LOAD.format(path=output / 'final')}\n")


def headline(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    main()
