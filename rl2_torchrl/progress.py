"""A bar that shows how far a training is, and what its trials earn."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import TqdmWarning

with warnings.catch_warnings():
    # In a notebook without ipywidgets it falls back to text, which is fine.
    warnings.simplefilter("ignore", TqdmWarning)
    from tqdm.auto import tqdm

__all__ = ["progress_bar"]

#: Scalars that are shown, and what they are called there.
SHOWN = {"train/trial_return": "trial return", "eval/trial_return": "held-out"}


@contextmanager
def progress_bar(total: float, done: int, show: bool) -> Iterator[Callable[[dict[str, float]], None]]:
    """A function that takes a row of scalars and moves the bar to its ``env_steps``.

    Args:
        total: env steps of the whole training; infinite shows steps and speed alone.
        done: env steps that were taken before.
        show: False shows nothing.
    """
    if not show:
        yield lambda row: None
        return
    latest: dict[str, str] = {}
    options = {"unit": " steps", "unit_scale": True, "smoothing": 0.1}
    with tqdm(total=None if math.isinf(total) else total, initial=done, **options) as bar:

        def advance(row: dict[str, float]) -> None:
            latest.update({label: f"{row[name]:.3f}" for name, label in SHOWN.items() if name in row})
            bar.set_postfix(latest, refresh=False)
            bar.update(row["env_steps"] - bar.n)

        yield advance
