"""Experiments: one file per paper, and experiment.py and grid.py, which all of them share.

Here belongs what compares methods: sizes, claims and verdicts. Whatever somebody else would call from a program of
their own belongs into one of the other folders.
"""
