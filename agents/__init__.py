"""Agents: one algorithm, one file, read from top to bottom: config, networks, losses, update, act.

Here belongs what learns from batches. An agent sees no files, no simulators and no other agent's insides: what two of
them share is in robopref/ (agent.py, networks.py, losses.py).
"""
