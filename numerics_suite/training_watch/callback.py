"""The watch as a callback of `transformers.Trainer`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from numerics_suite.training_watch.session import Watch
from numerics_suite.training_watch.watch_settings import WatchSettings


class NumericsCallback(TrainerCallback):  # type: ignore[misc]
    """Watches a Trainer's run: `Trainer(..., callbacks=[NumericsCallback()])`.

    What it reads is added to each log of the Trainer as `numerics/loss`, `numerics/largest_logit`, `numerics/gradient_norm`,
    `numerics/parameter_norm`, `numerics/update_ratio` and `numerics/loss_scale`, so it goes wherever the Trainer's own curves go.

    If training ends in an exception, Trainer tells no callback; the hooks come off when the callback is collected, or by :meth:`close`.

    Attributes:
        watch: the watch of the run, None before it begins; its finding and warnings stay after the end.
    """

    def __init__(  # noqa: PLR0913 - the public keywords
        self,
        *,
        every: int = 1,
        every_parameters: int = 20,
        snapshot_every: int = 0,
        ring: int = 4,
        on_bad: Any = "stop",
        bundle: str | Path | None = None,
    ) -> None:
        """As :func:`numerics_suite.watch`, without model and optimizer."""
        self.settings = WatchSettings(
            every=every, every_parameters=every_parameters, snapshot_every=snapshot_every, ring=ring
        )
        self.on_bad, self.bundle = on_bad, bundle
        self.watch: Watch | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - Trainer's signature
        """Open the watch on what is about to be trained."""
        self.close()
        _go_first(self)
        watch = Watch(
            kwargs["model"], kwargs.get("optimizer"), settings=self.settings, on_bad=self.on_bad, bundle=self.bundle
        )
        self.watch = watch.__enter__()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - Trainer's signature
        """Take an optimizer that was made after the beginning, as some sharded set-ups do."""
        if self.watch is not None and kwargs.get("optimizer") is not None:
            self.watch.bind(kwargs["optimizer"])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002 - Trainer's signature
        """Add the newest values to the log that the loggers after this callback, and the history, get."""
        if self.watch is None or logs is None or "loss" not in logs:
            return
        logs.update(self.watch.values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(self.watch.values)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - Trainer's signature
        """Read what is still under way and take the hooks off."""
        if self.watch is not None:
            self.watch.__exit__(None, None, None)

    def close(self) -> None:
        """Take the hooks off, as after an exception in training."""
        if self.watch is not None:
            self.watch.close()


def _go_first(callback: NumericsCallback) -> None:
    """Move the callback before the loggers, which would else have written a log before values are added to it.

    Trainer puts its loggers first and hands no callback the list; it is the caller's.
    """
    frame = sys._getframe(1)  # noqa: SLF001 - the documented way to look at a caller
    for _ in range(4):
        if frame is None or frame.f_back is None:
            return
        frame = frame.f_back
        callbacks = getattr(frame.f_locals.get("self"), "callbacks", None)
        if isinstance(callbacks, list) and callback in callbacks:
            # A new list: the caller goes through the old one right now.
            frame.f_locals["self"].callbacks = [callback, *(other for other in callbacks if other is not callback)]
            return
