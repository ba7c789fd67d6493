"""Agents: one algorithm, one file, read from top to bottom: config, losses, update, act."""
