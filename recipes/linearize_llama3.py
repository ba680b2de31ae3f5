r"""Llama-3-8B to hybrid linear attention: convert, attention transfer, LoRA, evaluation, and a repository that loads
everywhere.

The defaults are Meta-Llama-3-8B on alpaca-cleaned, 20 M + 20 M tokens of 1024-token sequences
(recipes/configs/llama3_8b_linear.yaml).

One GPU:

    accelerate launch recipes/linearize_llama3.py --output_dir out

One GPU of 24 GB, the frozen weights in 4 bits:

    accelerate launch recipes/linearize_llama3.py --output_dir out --load_in_4bit

Eight GPUs:

    accelerate launch --config_file recipes/accelerate/multi_gpu.yaml --num_processes 8 \
        recipes/linearize_llama3.py --output_dir out

The published LoLCATs recipe, the same on Mistral-7B, or a YAML file of your own; flags win over the file, and every
setting is a flag (--help):

    accelerate launch recipes/linearize_llama3.py --config llama3_8b_lolcats --output_dir out_lolcats
    accelerate launch recipes/linearize_llama3.py --config mistral_7b --output_dir out_mistral
    accelerate launch recipes/linearize_llama3.py --config my.yaml \
        --model_name_or_path path/to/llama --data.dataset text.jsonl

What it would do, and the memory that it expects, without doing it:

    python recipes/linearize_llama3.py --dry_run

After an interruption:

    accelerate launch recipes/linearize_llama3.py --output_dir out --resume_from_checkpoint

`out/final` then loads with `AutoModelForCausalLM.from_pretrained("out/final", trust_remote_code=True)`, without this
package too.
Bad input ends with one sentence and exit code 2, Ctrl-C with 130 and a checkpoint.
"""

import sys
from collections.abc import Sequence

DEFAULT_CONFIG = "llama3_8b_linear"


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
