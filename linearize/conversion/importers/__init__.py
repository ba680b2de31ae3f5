"""Checkpoints of published code as converted repositories: one file for each code.

gain_cell.py, landmark.py (landmark_tokenizer.py), cosine.py
checkpoint_files.py   weights of a published checkpoint, mapped from the disk
"""
