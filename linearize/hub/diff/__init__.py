"""A converted model as its difference from the base model, exact to the bit.

difference.py     make and recover
record.py         `diff.json`
sources.py        the repositories and files that it is made of
"""
