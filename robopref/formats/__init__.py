"""Readers and writers of foreign files, one module per format.

Readers give robopref's own types, with labels in its convention; episodes come one at a time (`EpisodeSource`). What a
format means belongs here; robopref's own files are in episodes.py and records.py.
"""
