"""Reads what the name of a model says: its words, and a number of steps.

Only the name of the model itself counts, the last part of a path or hub id. The folders above it
say nothing: `/data/turbo/dreamshaper` is no Turbo model. Words are whole ones: `SDXL-Turbo`,
`sd_xl_turbo_1.0` and `v21TurboDPMSDE` have the word `turbo`, `turbocharged` does not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from img2img_server.domain.hub_id import HubId

# A word ends at punctuation and before a capital: SDTurbo, v50Lightning. Digits stay with the
# letters before them, such as DMD2 and v50, unless they are a number of steps: Lightning4step.
_BOUNDARY: Final = re.compile(
    r"[\W_]+|(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z](?!v\d)[a-z])|(?<=[A-Za-z])(?=\d+[\W_]?[Ss]tep)"
)
_CACHED: Final = re.compile(r"models--(?:.+--)?([^/]+)/snapshots/[^/]+(/(unet|transformer))?")
_WEIGHTS: Final = re.compile(r"\.(safetensors|ckpt|bin|pth?|gguf|sft)$", re.IGNORECASE)
# Words that only the name of a checkpoint has: its architecture or version.
_ARCHITECTURE: Final = re.compile(
    r"\w*xl|sd\d*|ssd|sdv\d+|flux\d*|qwen|\w*image|chroma\d*|kolors|ernie|krea\d*|diffusion|pony|"
    r"illustrious|noobai|v\d+\w*"
)
# Names of architectures and versions that can come before a word without punctuation: sdxlturbo,
# v2turbo.
_BEFORE: Final = r"(?:sd\d*|\w*xl|\w*image|flux\d*|chroma\d*|qwen|v\d+|half)"
# Words that may follow the kind of checkpoint: formats, versions, steps, recommended samplers.
_DETAIL: Final = re.compile(
    r"\d+(st|k|b)?|\d*steps?|fp\d+|bf16|int\d+|nf4|gguf|q\d\w*|x|large|medium|mini|base|pruned|ema|"
    r"full|unet|transformer|lora|merged?|fused|distill(ed)?|\w*vae|diffusers|comfyui|hf|dpm\w*|"
    r"sde|euler|karras|heun|ddim|alpha|beta|hd|dev|turbo|lightning|hyper|flash|lcm|tcd|pcm|dmd2|\w*cfg"
)
# A number of steps in a name such as "sdxl_lightning_4step" or "Hyper-SDXL-8steps-CFG".
_STEPS: Final = re.compile(r"(?<!-epoch)-([1-9]|1[0-6])-?steps?(?=-)")
_REVERSED: Final = re.compile(
    r"-(?:de|un|non|not|no|anti)-?(?:turbo|lightning|hyper|flash|lcm|schnell|distill(?:ed)?)(?=-)"
    r"|-(?:turbo|lightning|hyper|flash|lcm|schnell)-free(?=-)"
    r"|-(?:open|libre)-?flux\d*(?=-)"
)


@dataclass(frozen=True, slots=True)
class ModelName:
    """The words of a name in lower case, with `-` around each."""

    words: str

    @classmethod
    def of(cls, source: str) -> ModelName:
        """Returns the name of a model from its path, hub id or title."""
        hub_id = HubId.parse(source)
        path = (hub_id.repo if hub_id else source).replace("\\", "/").rstrip("/")
        # A folder in the hub's cache has the name of a commit.
        cached = _CACHED.search(path)
        name = cached[1] if cached and cached.end() == len(path) else path.rpartition("/")[2]
        words = filter(None, _BOUNDARY.split(_WEIGHTS.sub("", name)))
        return cls(f"-{'-'.join(words).lower()}-")

    @property
    def num_steps(self) -> int | None:
        """The number of steps in the name; None: it has none."""
        found = _STEPS.search(self.words)
        return int(found[1]) if found else None

    @property
    def is_reversed(self) -> bool:
        """Whether the name says that a distillation was reversed, as Z-Image-De-Turbo does."""
        return bool(_REVERSED.search(self.words))

    def has(self, pattern: str) -> bool:
        """Returns whether the name has words, which are a pattern with `-` between them."""
        return bool(re.search(rf"-(?:{pattern})(?=-)", self.words))

    def describes(self, word: str, *, needs_detail: bool = False) -> bool:
        """Returns whether a word that is also an ordinary one is the kind of the checkpoint.

        It is at the end of the name, before a detail of checkpoints, and after a word that only
        checkpoints have: "lightning" in "RealVisXL_V5.0_Lightning_fp16", not in
        "lightning-strike-style".

        Args:
            needs_detail: Whether a word before it is not enough, as in "sdxl-hyper-realistic".
        """
        words = self.words.strip("-").split("-")
        for place, found in enumerate(words):
            if re.fullmatch(rf"{_BEFORE}{word}(?:v?\d+)?", found):
                return True
            if not re.fullmatch(rf"{word}(?:v?\d+)?", found):
                continue
            after = words[place + 1 : place + 2]
            if not after or _ARCHITECTURE.fullmatch(after[0]) or _DETAIL.fullmatch(after[0]):
                return True
            if not needs_detail and any(map(_ARCHITECTURE.fullmatch, words[:place])):
                return True
        return False
