"""Labelers: one file per source of preference labels, simulated or human, and what is fitted to them.

Here belongs who answers queries, and why as they do. A labeler that needs a simulator or a value function gets it as an
argument.
"""
