"""Whole runs: settings, plan, directory, stages in order, report. May import stages and all below.

settings.py       of a run and its stages: `RunConfig`
engine.py         convert, the stages in order, evaluate, save: `run`
plan.py           what a run is about to do, checked before any weight is loaded (checks.py, attention.py)
forecast.py       how long it will take, and what it writes
directory.py      what lies in the directory of a run, and whether it may go on
models.py         the models of a run: student, teachers, after each stage; texts.py, its tokenizer and text
page.py           report.md, the page of a run; records.py, linearize.json of its models
report.py         what a run measures, and when; of an encoder encoder_report.py
ending.py         repository, report and push at the end; curves.py, the perplexities as a plot
glue.py           the GLUE benchmark (its training: `linearize/stages/glue_training.py`)
"""
