"""The names of tensors in model files: those that no part needs, and how sentences list names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

IGNORED: Final = "model_tensors_ignored"  # the log event
_MOST_NAMES: Final = 4

# The beginning of the names of the denoiser in a single file.
DENOISER: Final = "model.diffusion_model."
_SHORT_DENOISER: Final = "diffusion_model."
_UNET: Final = re.compile(r"(time_embed|label_emb|input_blocks|middle_block|output_blocks|out)\.\d")

# Constants that are calculated, and constants of the training.
_EVERYWHERE: Final = "position_ids|logit_scale"

# In a single file: constants of the training, EMA copies and state of the optimiser.
HARMLESS_IN_CHECKPOINT: Final = re.compile(
    # Z-Image does not use its last norm.
    r"^(model\.diffusion_model\.)?norm_final\.weight$"
    r"|^(model_ema\.|optimizer|lr_scheduler|callbacks|first_stage_model\.loss\.)"
    r"|^(betas|alphas_cumprod(_prev)?|logvar|lvlb_weights|scale_factor|global_step|epoch)$"
    r"|^(sqrt_|log_one_minus_|posterior_)|^denoiser\.sigmas$|^(v_pred|ztsnr)$"
    rf"|(^|\.)({_EVERYWHERE}|attn_mask)$"
)
# In the file of a part: buffers that are calculated, copies and state of a training, and heads of
# encoders.
HARMLESS_IN_PART: Final = re.compile(
    rf"(^|\.)({_EVERYWHERE}|logit_bias)$"
    r"|(^|\.)(inv_freq|num_batches_tracked|attention_bias_mask)$"
    r"|(^|\.)(model_ema|ema_model|ema|optimizer|optimizer_states|lr_schedulers|loss|discriminator)\."
    r"|^(lm_head|vision_model|visual_projection)\."
    r"|^text_projection\.(weight|bias)$"
)


def full_name(name: str) -> str:
    """Returns the name of a tensor of a single file with the beginning that files with several
    parts have. Files of a denoiser alone may leave out all of it or a part.
    """
    if name.startswith(_SHORT_DENOISER):
        return f"model.{name}"
    return f"{DENOISER}{name}" if _UNET.match(name) else name


def first_names(names: Iterable[str]) -> str:
    """Returns the first names and how many more there are."""
    found = sorted(names)
    rest = f" and {len(found) - _MOST_NAMES} more" if len(found) > _MOST_NAMES else ""
    return ", ".join(found[:_MOST_NAMES]) + rest
