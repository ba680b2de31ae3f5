r"""GPT-2 onto analog gain cells: linear cell, adaptation of the scalers, nonlinear cell.

The defaults are recipes/configs/gpt2_gain_cell.yaml; recipes/configs/gpt2_published.yaml has the published
hyper-parameters.

One GPU, your own text (.txt, .jsonl or .parquet):

    accelerate launch recipes/linearize_gpt2.py --data.dataset text.jsonl --output_dir out

A teacher of your own, such as one that recipes/pretrain.py made, or any Llama:

    accelerate launch recipes/linearize_gpt2.py --model_name_or_path gpt2_mini/final --data.dataset text.jsonl \
        --data.sequence_length 512 --output_dir out

Eight GPUs, the published run; flags win over the file, and every setting is a flag (--help):

    accelerate launch --config_file recipes/accelerate/multi_gpu.yaml --num_processes 8 \
        recipes/linearize_gpt2.py --config gpt2_published --output_dir out_published

After an interruption:

    accelerate launch recipes/linearize_gpt2.py --output_dir out --resume_from_checkpoint

`out/report.json` and `out/plots` have the perplexities beside their tokens; `out/final` is the converted repository.
Bad input ends with one sentence and exit code 2, Ctrl-C with 130 and a checkpoint.
"""

import sys
from collections.abc import Sequence

DEFAULT_CONFIG = "gpt2_gain_cell"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe.

    Args:
        argv: Flags; default those of this process.

    Returns:
        The exit code.
    """
    from linearize.cli import run_recipe

    return run_recipe(DEFAULT_CONFIG, argv)


if __name__ == "__main__":
    sys.exit(main())
