"""The benchmark GLUE: what its tasks are, and a table of results. Training is `linearize/stages/glue_training.py`.

tasks.py          columns, labels, splits and metrics of the nine tasks
settings.py       the settings of a run
data.py           examples, checked and tokenised
metrics.py        by `evaluate` or scikit-learn
report.py         mean and deviation over the seeds
"""
