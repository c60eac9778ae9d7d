"""A rewriter that asks a local language model through transformers. Imports torch: workers only."""

from __future__ import annotations

import threading
from typing import Any

import structlog

from img2img_server.prompts.base import MAX_CHARACTERS, is_elaborate

PLACE = "{prompt}"  # of the prompt in the template
_NEW_TOKENS = 60
_TOP = 50  # only the likeliest tokens are drawn from
_TEMPERATURE = 0.8

log = structlog.get_logger()


class LanguageModelRewriter:
    """A PromptRewriter on the CPU: a text-to-text model writes anew, a causal one goes on.

    Sampled from the job's seed and from nothing else, so that a job that runs again says the same.
    """

    warning = ""

    def __init__(self, directory: str, template: str = PLACE) -> None:
        """Loads the model; takes seconds.

        Args:
            directory: a transformers model with its tokenizer. Nothing is downloaded.
            template: what the model is asked, with "{prompt}" in it.

        Raises:
            OSError, ValueError: there is no such model, or transformers cannot read it.
        """
        from transformers import (
            AutoConfig,
            AutoModelForCausalLM,
            AutoModelForSeq2SeqLM,
            AutoTokenizer,
        )

        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        self._goes_on = not config.is_encoder_decoder
        kind = AutoModelForCausalLM if self._goes_on else AutoModelForSeq2SeqLM
        self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        self._model = kind.from_pretrained(directory, local_files_only=True).eval()
        self._template = template
        self._turn = threading.Lock()

    def rewrite(self, prompt: str, seed: int) -> str:
        if not prompt.strip() or is_elaborate(prompt):
            return prompt
        with self._turn:
            written = " ".join(self._write(prompt, seed).split()).strip(" \"'")
        if self._goes_on and written:
            written = f"{prompt.rstrip()} {written}"
        return written if 0 < len(written) <= MAX_CHARACTERS else prompt

    def _write(self, prompt: str, seed: int) -> str:
        import torch
        from transformers import LogitsProcessorList

        asked = self._tokenizer(self._template.replace(PLACE, prompt), return_tensors="pt")
        tokens = asked["input_ids"]
        with torch.inference_mode():
            written = self._model.generate(
                input_ids=tokens,
                attention_mask=asked["attention_mask"],
                max_new_tokens=_NEW_TOKENS,
                do_sample=False,
                num_beams=1,
                logits_processor=LogitsProcessorList([_draw(torch, seed)]),
                pad_token_id=self._pad(),
            )
        new = written[0][tokens.shape[1] :] if self._goes_on else written[0]
        return str(self._tokenizer.decode(new, skip_special_tokens=True))

    def _pad(self) -> int | None:
        tokenizer = self._tokenizer
        token = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return None if token is None else int(token)


def _draw(torch: Any, seed: int) -> Any:
    """Makes the greedy choice a drawn one (Gumbel-max), with a generator of its own.

    `generate` itself samples from torch's global generator, which other threads use too.
    """
    from transformers import LogitsProcessor

    generator = torch.Generator().manual_seed(seed)

    class Draw(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            best, places = scores.topk(min(_TOP, scores.shape[-1]))
            noise = torch.empty_like(best).exponential_(generator=generator).log().neg()
            drawn = torch.full_like(scores, -torch.inf)
            return drawn.scatter(-1, places, best / _TEMPERATURE + noise)

    return Draw()
