"""Experiments: one file per paper, and experiment.py, which all of them share."""
