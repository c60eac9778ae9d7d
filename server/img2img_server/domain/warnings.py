"""Job.warning: full sentences for people, as one text."""

from __future__ import annotations


def join_warnings(*warnings: str) -> str:
    """Joins warnings to one text: every sentence once, in order, separated by a space."""
    return " ".join(dict.fromkeys(filter(None, warnings)))


def no_preview(interval: int, steps: int) -> str:
    """Returns a warning if the last step comes before the first preview, else "".

    Args:
        interval: Number of steps from one preview to the next; 0: no preview is wanted.
        steps: How many times the model runs for a sample.
    """
    if not interval >= steps > 0:
        return ""
    run = "1 step runs" if steps == 1 else f"{steps} steps run"
    return f"No preview is sent: preview_interval_steps is {interval} and {run}."
