"""Which rewriter a role has. Rules run in the api, so that the first answer has the text already; a
language model runs in the worker, which has torch, when it takes the job.
"""

from __future__ import annotations

from img2img_server.prompts.base import AsSent, PromptRewriter
from img2img_server.prompts.rules import RuleRewriter
from img2img_server.settings import Settings, SettingsError

NO_REWRITER = "enhance_prompt has no effect: this service has no prompt rewriter."


def api_rewriter(settings: Settings) -> PromptRewriter:
    """Rewrites on the event loop."""
    if settings.prompt_rewriter == "rules":
        return RuleRewriter()
    return AsSent(NO_REWRITER if settings.prompt_rewriter == "off" else "")


def worker_rewriter(settings: Settings) -> PromptRewriter:
    """Loads the language model, if that is what rewrites: takes seconds. Raises SettingsError."""
    if settings.prompt_rewriter != "model":
        return AsSent()
    from img2img_server.prompts.language_model import LanguageModelRewriter  # imports torch

    try:
        return LanguageModelRewriter(settings.prompt_model, settings.prompt_template)
    except Exception as error:  # of the libraries, which have many
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SettingsError(
            f"IMG2IMG_PROMPT_MODEL: cannot load {settings.prompt_model}: {reason}"
        ) from error
