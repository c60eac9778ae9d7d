"""Names of schedulers: the service's own, the classes in diffusers, and spellings of user
interfaces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Final

# The service's name of each scheduler, and other accepted spellings. Case, spaces, punctuation and
# the endings "Scheduler" and "Discrete" make no difference, and "+" equals "p".
SPELLINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "ddim": ("DDIMScheduler",),
    "euler": ("EulerDiscreteScheduler", "K_EULER"),
    "euler_a": (
        "EulerAncestralDiscreteScheduler",
        "Euler a",
        "euler_ancestral",
        "K_EULER_ANCESTRAL",
        "k_euler_a",
    ),
    "lcm": ("LCMScheduler",),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", "DPM++ 2M"),
    "dpmpp_2m_karras": ("DPM++ 2M Karras", "KarrasDPM"),
    "dpmpp_2m_sde": ("DPM++ 2M SDE",),
    "dpmpp_2m_sde_karras": ("DPM++ 2M SDE Karras",),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", "DPM++ 2S"),
    "heun": ("HeunDiscreteScheduler", "K_HEUN"),
    "pndm": ("PNDMScheduler", "PLMS"),
    "tcd": ("TCDScheduler",),
    "unipc": ("UniPCMultistepScheduler", "UniPC", "uni_pc"),
    "edm_euler": ("EDMEulerScheduler",),
    "edm_dpmpp_2m": ("EDMDPMSolverMultistepScheduler",),
    "flow_match_euler": ("FlowMatchEulerDiscreteScheduler",),
    "flow_match_euler_stochastic": (),
    "scm": ("SCMScheduler",),
}

# User interfaces call the samplers of all kinds of models by the names of Stable Diffusion's.
_OF_OTHER_KINDS: Final[Mapping[str, tuple[str, ...]]] = {
    "euler": ("flow_match_euler", "edm_euler"),
    "dpmpp_2m": ("edm_dpmpp_2m",),
}

# Schedulers that run the model more than once in some steps: number of runs by number of steps.
_MODEL_RUNS: Final[Mapping[str, Callable[[int], int]]] = {
    "heun": lambda steps: 2 * steps - 1,
    "pndm": lambda steps: steps + 1,
}


def scheduler_name(text: str) -> str:
    """Returns the service's name for a spelling. Any other text is returned unchanged."""
    return _NAMES.get(_plain(text), text)


def offered_name(text: str, offered: Collection[str]) -> str:
    """Returns the name of the scheduler that a spelling means for a model.

    Args:
        offered: The names of the model's schedulers.
    """
    name = scheduler_name(text)
    others = () if name in offered else _OF_OTHER_KINDS.get(name, ())
    return next((other for other in others if other in offered), name)


def model_runs(scheduler: str, steps: int) -> int:
    """Returns the number of times that a scheduler runs the model in this number of steps."""
    runs = _MODEL_RUNS.get(scheduler)
    return runs(steps) if runs and steps else steps


def _plain(text: str) -> str:
    letters = re.sub(r"[\W_]", "", text.lower().replace("+", "p"))
    return letters.removesuffix("scheduler").removesuffix("discrete")


_NAMES: Final = {
    _plain(spelling): name for name, others in SPELLINGS.items() for spelling in (name, *others)
}
