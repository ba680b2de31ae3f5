r"""Mistral-7B to landmark attention with LoRA: a long prompt is read block by block, and only the blocks that matter.

The defaults are recipes/configs/mistral_7b_landmark.yaml: the landmark and adapters of rank 32 train at a context of
1008 tokens, against labels and the softmax teacher's logits.

One GPU, your own text (.txt, .jsonl or .parquet):

    accelerate launch recipes/linearize_mistral.py --data.dataset text.jsonl --output_dir out

Hybrid linear attention instead, by the published LoLCATs recipe:

    accelerate launch recipes/linearize_mistral.py --config mistral_7b --output_dir out_linear

A Llama: recipes/linearize_llama3.py --config llama3_8b_landmark. All weights instead of LoRA, any size:
recipes/linearize_landmark.py. Flags win over the file, and every setting is a flag (--help).

What it would do, without doing it:

    python recipes/linearize_mistral.py --dry_run

After an interruption:

    accelerate launch recipes/linearize_mistral.py --output_dir out --resume_from_checkpoint

How far the result reads: `linearize evaluate out/final --passkey 1k,8k,32k`.
Bad input ends with one sentence and exit code 2, Ctrl-C with 130 and a checkpoint.
"""

import sys
from collections.abc import Sequence

DEFAULT_CONFIG = "mistral_7b_landmark"


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
