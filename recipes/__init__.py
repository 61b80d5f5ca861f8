"""Experiments: one file each, importable (``recipes.bandit.main(...)``) and runnable (``python -m recipes.bandit``)."""
