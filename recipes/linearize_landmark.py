r"""A Llama or Mistral to landmark attention, all weights trained at a short context, retrieval along.

The defaults are recipes/configs/mistral_7b_landmark_full.yaml. In training a share of the blocks is left out, so that
the model learns to read what retrieval leaves it; the softmax model teaches.

SmolLM2-135M on your own text (.txt, .jsonl or .parquet):

    accelerate launch recipes/linearize_landmark.py --config smollm2_landmark --data.dataset text.jsonl \
        --output_dir out

The published recipe, LLaMA-7B on labels alone:

    accelerate launch --config_file recipes/accelerate/multi_gpu.yaml --num_processes 8 \
        recipes/linearize_landmark.py --config landmark_published --output_dir out_published

After an interruption:

    accelerate launch recipes/linearize_landmark.py --output_dir out --resume_from_checkpoint

`out/report.json` and `out/plots` have the perplexities beside their tokens; `out/final` is the converted repository.
How far it reads: `linearize evaluate out/final --passkey 1k,8k,32k`.
Bad input ends with one sentence and exit code 2, Ctrl-C with 130 and a checkpoint.
"""

import sys
from collections.abc import Sequence

DEFAULT_CONFIG = "mistral_7b_landmark_full"


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
