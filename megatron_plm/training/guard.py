"""What ends a run early: signals, and numbers that are no longer finite."""

import math
import signal
import time
from types import FrameType

from megatron_plm.errors import UserError

_SAME_SIGNAL_SECONDS = 3.0


class StopRequest:
    """Set by SIGTERM, SIGUSR1 (Slurm's notice before the end), SIGINT or SIGHUP; the loop then saves and leaves.

    A signal that comes again later takes effect at once. Right after the first it is the same one: a terminal sends
    its SIGINT to every process, and torchrun passes its own on.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
            # A hang-up that was to be ignored (`nohup`) stays so.
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            signal.signal(number, self._note)

    @property
    def requested(self) -> bool:
        return self._since is not None

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._since is None:
            self._since = now
        elif now - self._since > _SAME_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def check_finite(step: int, loss: float, grad_norm: float) -> None:
    """Raise UserError where the loss or the gradient norm is not a finite number."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise UserError(
            f"step {step}: the loss is {loss} and the gradient norm {grad_norm}; lower --lr, lengthen "
            "--lr-warmup-iters or set --clip-grad, and go on from the last checkpoint with --load"
        )
