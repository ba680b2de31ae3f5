r"""A GPT-2, Llama or BERT from scratch on text, softmax or with any mechanism: a teacher to convert, a yardstick
beside a converted model, or an attention that no pretrained model had.

The defaults are a GPT-2 of 29 M parameters on 100 M tokens of TinyStories, with a tokenizer trained on them
(recipes/configs/gpt2_mini_pretrain.yaml).

One GPU:

    accelerate launch recipes/pretrain.py --output_dir out

Your own text, .txt, .jsonl or .parquet:

    accelerate launch recipes/pretrain.py --output_dir out --data.dataset text.jsonl --data.validation none

GPT-2 of 124 M on eight GPUs (recipes/configs/gpt2_small_pretrain.yaml); flags win over the file, and every
setting is a flag (--help):

    accelerate launch --config_file recipes/accelerate/multi_gpu.yaml --num_processes 8 \
        recipes/pretrain.py --config gpt2_small_pretrain --output_dir out_small

Another attention, shape and settings of your own (`out/final` is then a converted repository); its softmax twin, which
starts from the same weights, has `--attention none`:

    accelerate launch recipes/pretrain.py --output_dir out --architecture.type llama --architecture.n_kv_head 4 \
        --attention linear --attention.window 32 --softmax_layers 0,-1

A BERT, which learns to find hidden tokens; its report has their perplexity and the share that it finds:

    accelerate launch recipes/pretrain.py --output_dir out --architecture.type bert --training.objective masked \
        --data.sequence_length 128

The published cosine models: `--config cosine_300m`, `cosine_1b`, and `cosine_bert_base` with `cosine_bert_base_512`
after it (recipes/configs).

After an interruption:

    accelerate launch recipes/pretrain.py --output_dir out --resume_from_checkpoint

`out/final` then loads with `AutoModelForCausalLM.from_pretrained("out/final")` (`AutoModelForMaskedLM` for a BERT, and
`trust_remote_code=True` for a mechanism), and `out/report.json` has the losses, the speed and the validation
perplexity.
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

    return run_recipe(DEFAULT_CONFIG, argv)


if __name__ == "__main__":
    sys.exit(main())
