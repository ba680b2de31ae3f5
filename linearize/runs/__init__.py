"""Whole runs: settings, plan, directory, stages in order, report. May import stages and all below.

pipeline.py       convert, transfer, finetune, evaluate, save: `run`
staged_run.py     what gain_cell.py and landmark.py share
encoder.py, pretraining.py, glue.py (its training: `linearize/stages/glue_training.py`)
plan.py           what a run is about to do, checked before any weight is loaded
directory.py      what lies in the directory of a run, and whether it may go on
report.py         what a run measures, and when
"""
