"""Teach robots by preference, in JAX: the library itself, and all of the wheel.

Here belongs what does not depend on which simulator, algorithm or labeler is used: data and its files, losses,
training, rollouts, evaluation, reports, the command line. It imports none of the folders beside it; what needs one of
them gets it as an argument.
"""
