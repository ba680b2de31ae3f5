r"""Encoders on the tasks of GLUE: a softmax teacher and its converted student, finetuned alike, in one table.

The defaults are BERT-base at a learning rate of 2e-5 with three seeds (recipes/configs/bert_base_glue.yaml);
recipes/configs/bert_base_glue_published.yaml tries the four published learning rates.

One GPU, a teacher beside the result of recipes/linearize_bert.py in out_bert:

    accelerate launch recipes/finetune_glue.py --models google-bert/bert-base-uncased,out_bert --names softmax,linear \
        --output_dir out_glue

Some tasks, two seeds, and the finetuned models kept; flags win over the file, and every setting is a flag (--help):

    accelerate launch recipes/finetune_glue.py --models out_bert --tasks mrpc,rte --seeds 0,1 --save_models \
        --output_dir out_glue

Without a network, from a folder with cola/train.tsv, cola/validation.tsv and so on (.csv, .tsv, .jsonl or .parquet):

    accelerate launch recipes/finetune_glue.py --models out_bert --data.dataset glue_files --output_dir out_glue

After an interruption, or to add a seed; what is finished is not run again:

    accelerate launch recipes/finetune_glue.py --output_dir out_glue --resume_from_checkpoint --seeds 0,1,2,3

`out_glue/report.md` has the table, mean and deviation over the seeds; `out_glue/report.json` has every finetuning.
Bad input ends with one sentence and exit code 2, Ctrl-C with 130 and a checkpoint.
"""

import sys
from collections.abc import Sequence

DEFAULT_CONFIG = "bert_base_glue"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe.

    Args:
        argv: Flags; default those of this process.

    Returns:
        The exit code.
    """
    from linearize.cli import run_recipe

    return run_recipe(DEFAULT_CONFIG, argv, name="glue")


if __name__ == "__main__":
    sys.exit(main())
