"""Settings and the record of a model: values that several rooms use. Imports nothing of the rooms above.

settings.py       of data and stages; full_training.py, embeddings.py, of those; architecture.py, evaluation.py,
                  selection.py, sections of a run
values.py         how a value is read and refused; sizes.py, budgets
yaml_io.py        presets and a person's files, read and written
presets.py        the presets that the package carries
record.py         `linearize.json`: how a converted model was made
"""
