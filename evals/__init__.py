"""Evaluations, run from the repository root as `python -m evals.NAME`; results go to `evals/results`."""
