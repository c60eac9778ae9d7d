"""Job.warning: full sentences for people, as one text."""

from __future__ import annotations

from typing import Final

# An init image whose sides are enlarged more than this has few details, so the job has a warning.
MOST_ENLARGED: Final = 4.0


def join_warnings(*warnings: str) -> str:
    """Joins warnings to one text: every sentence once, in order, separated by a space."""
    return " ".join(dict.fromkeys(filter(None, warnings)))


def no_preview(interval: int, steps: int, *, is_exact: bool = True) -> str:
    """Returns a warning if the last step comes before the first preview, else "".

    Args:
        interval: Number of steps from one preview to the next; 0: no preview is wanted.
        steps: How many times the model runs for a sample.
        is_exact: Whether the warning has the number of steps. Without it, the warnings of the api,
            which may know only the largest possible number, and of the engine are equal.
    """
    if not interval >= steps > 0:
        return ""
    if not is_exact:
        reason = f"no step before the last one reaches preview_interval_steps {interval}"
        return f"No preview is sent: {reason}."
    run = "1 step runs" if steps == 1 else f"{steps} steps run"
    return f"No preview is sent: preview_interval_steps is {interval} and {run}."


def enlarged(own_size: tuple[int, int], size: tuple[int, int]) -> str:
    """Returns a warning if the init image is much smaller than the requested image, else "".

    Args:
        own_size: Width and height of the init image; `size`: of the requested image.
    """
    if max(side / own for side, own in zip(size, own_size, strict=True)) <= MOST_ENLARGED:
        return ""
    own, requested = (f"{width}x{height}" for width, height in (own_size, size))
    return (
        f"init_image has only {own} pixels and was enlarged to {requested}: send a larger one for "
        "more details."
    )
