r"""A BERT onto another attention: attention transfer, then masked language modelling or embedding distillation.

The defaults are recipes/configs/minilm_linear.yaml, an encoder for sentence embeddings;
recipes/configs/bert_base_linear.yaml is for BERT-base with its masked-language-modelling head.

One GPU, your own text (.txt, .jsonl or .parquet), a tenth of its documents or 200 held out:

    accelerate launch recipes/linearize_bert.py --data.dataset text.jsonl --data.dataset_config none \
        --data.validation none --output_dir out

Another teacher, two of its layers left softmax; flags win over the file, and every setting is a flag (--help):

    accelerate launch recipes/linearize_bert.py --model_name_or_path my/encoder --softmax_layers 0,5 --output_dir out

Eight GPUs, masked language modelling:

    accelerate launch --config_file recipes/accelerate/multi_gpu.yaml --num_processes 8 \
        recipes/linearize_bert.py --config bert_base_linear --output_dir out_bert

After an interruption:

    accelerate launch recipes/linearize_bert.py --output_dir out --resume_from_checkpoint

`out/report.json` has the figures after each stage: cosine to the teacher's embeddings, rank correlation, retrieval.
`out/final` is the converted repository; sentence-transformers loads it where it loads the teacher.
Bad input ends with one sentence and exit code 2, Ctrl-C with 130 and a checkpoint.
"""

import sys
from collections.abc import Sequence

DEFAULT_CONFIG = "minilm_linear"


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
