"""Labelers: one file per source of preference labels, simulated or human."""
