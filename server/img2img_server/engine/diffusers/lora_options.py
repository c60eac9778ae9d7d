"""The options of peft that diffusers stores in the header of a LoRA file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from img2img_server.engine.diffusers.watched_folder import RefusedFileError

HEADER = "lora_adapter_metadata"  # diffusers stores peft's options under this name
# With these options of peft, training changes the weights of the model too, which no file has.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class LoraError(RefusedFileError):
    """A file is no LoRA that the model can use. The text says why."""


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """The options of peft for one part of a pipeline."""

    values: Mapping[str, Any]

    def alpha(self, name: str) -> float | None:
        """Returns the alpha of a layer; None: the file does not say it."""
        pattern = self.values.get("alpha_pattern") or {}
        for key, alpha in pattern.items():
            if re.match(rf"(.*\.)?({key})$", name):  # the rule of peft
                return float(alpha)
        default = self.values.get("lora_alpha")
        return None if default is None else float(default)

    @property
    def is_rank_stabilised(self) -> bool:
        return bool(self.values.get("use_rslora"))

    def check(self) -> None:
        """Checks that the file alone defines the change, and that its values can be used.

        Raises:
            LoraError: It does not, or one of them is of another kind.
        """
        patterns = self.values.get("alpha_pattern") or {}
        alphas = [self.values.get("lora_alpha")]
        try:
            alphas += patterns.values()
            for pattern in patterns:
                re.compile(pattern)
            [float(alpha) for alpha in alphas if alpha is not None]
        except (AttributeError, TypeError, ValueError, re.error) as error:
            raise LoraError(f"its header {HEADER} has a wrong alpha: {error}") from error
        start = str(self.values.get("init_lora_weights", "")).lower()
        if start.startswith(_CHANGES_BASE):
            raise LoraError(
                f"it was trained with init_lora_weights {start}, which also changes the weights of "
                "the model: convert it to a plain LoRA with peft"
            )
