r"""A stock softmax GPT-2 from scratch on text: a teacher to convert, or a yardstick beside a converted model.

The defaults are a GPT-2 of 29 M parameters on 100 M tokens of TinyStories, with a tokenizer trained on them
(recipes/configs/pretrain/gpt2_mini_pretrain.yaml).

One GPU:

    accelerate launch recipes/pretrain.py --output_dir out

Your own text, .txt, .jsonl or .parquet:

    accelerate launch recipes/pretrain.py --output_dir out --data.dataset text.jsonl --data.validation none

GPT-2 of 124 M on eight GPUs (recipes/configs/pretrain/gpt2_small_pretrain.yaml); flags win over the file, and every
setting is a flag (--help):

    accelerate launch --config_file recipes/accelerate/multi_gpu.yaml --num_processes 8 \
        recipes/pretrain.py --config gpt2_small_pretrain --output_dir out_small

After an interruption:

    accelerate launch recipes/pretrain.py --output_dir out --resume_from_checkpoint

`out/final` then loads with `AutoModelForCausalLM.from_pretrained("out/final")`, and `out/report.json` has the losses,
the speed and the validation perplexity.
Bad input ends with one sentence and exit code 2, Ctrl-C with 130 and a checkpoint.
"""

import sys
from collections.abc import Sequence

DEFAULT_CONFIG = "gpt2_mini_pretrain"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe.

    Args:
        argv: Flags; default those of this process.

    Returns:
        The exit code.
    """
    from linearize.cli import run_recipe

    return run_recipe(DEFAULT_CONFIG, argv, name="pretrain")


if __name__ == "__main__":
    sys.exit(main())
