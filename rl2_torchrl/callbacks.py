"""`Callback`: what a user does at fixed points of a training, beside what `train` does itself."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDictBase

__all__ = ["Callback"]


class Callback:
    """Something to do at three points of every iteration of `train`: a subclass writes those that it needs.

    In the order in which `train` calls them: a batch is collected, `after_batch`; networks are updated on it, `after_update`;
    on some updates held-out tasks are played, `after_evaluation`. ``progress`` is the share of the training, from 0 to 1, that
    was over when the batch began: the one that schedules follow. Batches have shape ``[*B, T]``.

    Examples:
        >>> class LargestRatio(Callback):
        ...     '''Logs the largest probability ratio of the whole training.'''
        ...     largest = 0.0
        ...
        ...     def after_update(self, row, progress):
        ...         self.largest = max(self.largest, row.get("train/max_ratio", 0.0))
        ...         return {"largest_ratio": self.largest}
        >>> LargestRatio().after_update({"env_steps": 640.0, "train/max_ratio": 1.25}, progress=0.0)
        {'largest_ratio': 1.25}
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if strangers := [name for name in vars(cls) if name.startswith("after_") and not hasattr(Callback, name)]:
            raise TypeError(
                f"{cls.__name__} has {strangers}, which nothing calls: a callback's are after_batch, after_update and "
                "after_evaluation. Give another method another name."
            )

    def after_batch(self, batch: TensorDictBase, progress: float) -> None:
        """A batch ``[*B, T]`` is collected and no update has seen it. What is changed in it, the update sees.

        A `TrialCollector` writes the next batch over it and its entries: keep clones.
        """

    def after_update(self, row: dict[str, float], progress: float) -> dict[str, float] | None:
        """The networks have learnt from the batch; ``row`` holds the update's scalars, under ``train/``.

        Of a first batch, of which a normalisation (``normalize=True``) is told and nothing is learnt, it holds no losses.

        Returns:
            Scalars to add to the row, by names that it does not hold yet, hence to history and logger; or None.
        """

    def after_evaluation(self, row: dict[str, float], progress: float) -> dict[str, float] | None:
        """Held-out tasks were played; ``row`` holds the evaluation's scalars too, under ``eval/``.

        Returns:
            Scalars to add to the row, or None.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training must know to go on as if it had never stopped; nothing here."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; not called where that was empty."""
