"""Prompts to conditionings, by the text encoders of a diffusers pipeline."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from img2img_server.engine.base import cut_warning
from img2img_server.engine.denoiser import Adapter, Conditioning, TextEmbedding, TextInput
from img2img_server.engine.host_copy import to_device

_CACHE_PROMPTS = 128


class _Prompt(NamedTuple):
    text: str
    is_negative: bool
    adapter: Adapter | None


class _Cut(NamedTuple):
    """Counts of the tokens that an encoder reads and of all, and the words it does not read."""

    kept: int
    tokens: int
    rest: str


class TextEncoder:
    """Encodes what it has not seen lately, all in one batch.

    Args:
        pipeline: of the Stable Diffusion family, or of SDXL with its two encoders and size inputs.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._device, self._dtype = pipeline.unet.device, pipeline.unet.dtype
        self._guidance_width: int | None = pipeline.unet.config.time_cond_proj_dim
        self._is_xl = getattr(pipeline, "text_encoder_2", None) is not None
        names = ("tokenizer", "tokenizer_2") if self._is_xl else ("tokenizer",)
        self._tokenizers = [getattr(pipeline, name) for name in names]
        self._cache: OrderedDict[_Prompt, TextEmbedding] = OrderedDict()

    def encode(self, texts: Sequence[TextInput], forwards: Sequence[int]) -> list[Conditioning]:
        """One conditioning a text; those with two slots get their negative prompt too."""
        prompts = [_Prompt(text.prompt, False, text.adapter) for text in texts]
        negatives = [
            _Prompt(text.negative_prompt, True, text.adapter) if slot == 2 else None
            for text, slot in zip(texts, forwards, strict=True)
        ]
        known = self._look_up([*prompts, *(prompt for prompt in negatives if prompt)])
        return [
            self._condition(text, known[prompt], known[negative] if negative else None)
            for text, prompt, negative in zip(texts, prompts, negatives, strict=True)
        ]

    def clear_cache(self) -> None:
        """Forgets what it has seen."""
        self._cache.clear()

    def added_conditions(
        self, forwards: Sequence[tuple[TextEmbedding, Conditioning]]
    ) -> dict[str, Tensor] | None:
        """SDXL's further inputs, one line a forward."""
        if not self._is_xl:
            return None
        pooled = [text.pooled for text, _ in forwards]
        ids = [row.time_ids for _, row in forwards]
        return {
            "text_embeds": torch.stack([tensor for tensor in pooled if tensor is not None]),
            "time_ids": torch.cat([tensor for tensor in ids if tensor is not None]),
        }

    def _look_up(self, prompts: Sequence[_Prompt]) -> dict[_Prompt, TextEmbedding]:
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cache]
        found = dict(zip(missing, self._encode(missing), strict=True)) if missing else {}
        for prompt in prompts:
            if prompt not in found:
                found[prompt] = self._cache[prompt]
            self._cache[prompt] = found[prompt]
            self._cache.move_to_end(prompt)
        while len(self._cache) > _CACHE_PROMPTS:
            self._cache.popitem(last=False)
        return found

    def _encode(self, prompts: Sequence[_Prompt]) -> list[TextEmbedding]:
        encoded = self._pipeline.encode_prompt(
            [prompt.text for prompt in prompts],
            device=self._device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        warnings = [self._warning(prompt) for prompt in prompts]
        if not self._is_xl:
            return [
                TextEmbedding(tokens.clone(), warning=warning)
                for tokens, warning in zip(encoded[0].to(self._dtype), warnings, strict=True)
            ]
        tokens, pooled = encoded[0].to(self._dtype), encoded[2].to(self._dtype)
        zeros_for_empty = self._pipeline.config.force_zeros_for_empty_prompt
        found = []
        for i, prompt in enumerate(prompts):
            # SDXL was trained with zeros, not with the encoding of "", where nothing is said.
            keep = 0.0 if zeros_for_empty and prompt.is_negative and not prompt.text else 1.0
            found.append(TextEmbedding(tokens[i] * keep, pooled[i] * keep, warnings[i]))
        return found

    def _warning(self, prompt: _Prompt) -> str:
        """Says what of a prompt the encoders do not read; empty when they read all of it."""
        cuts = [_cut(tokenizer, prompt.text) for tokenizer in self._tokenizers]
        if None in cuts:  # an encoder reads all of it
            return ""
        # Words have no effect at all if the encoder with the longest window does not read them.
        kept, tokens, rest = min((cut for cut in cuts if cut), key=lambda cut: len(cut.rest))
        return cut_warning(
            "negative prompt" if prompt.is_negative else "prompt", kept, tokens, rest
        )

    def _condition(
        self, text: TextInput, prompt: TextEmbedding, negative: TextEmbedding | None
    ) -> Conditioning:
        scale = to_device(torch.tensor(text.guidance_scale), self._device)
        return Conditioning(
            prompt=prompt,
            negative=negative,
            guidance_scale=scale,
            adapter=text.adapter,
            guidance_embedding=self._guidance_embedding(text.guidance_scale),
            time_ids=self._time_ids(text) if self._is_xl else None,
        )

    def _guidance_embedding(self, guidance_scale: float) -> Tensor | None:
        if self._guidance_width is None:
            return None
        embedding: Tensor = self._pipeline.get_guidance_scale_embedding(
            torch.tensor([guidance_scale - 1]), embedding_dim=self._guidance_width
        )
        return to_device(embedding, self._device)

    def _time_ids(self, text: TextInput) -> Tensor:
        """The defaults of diffusers: original size = target size, no crop."""
        size = (text.height, text.width)
        ids = torch.tensor([[*size, 0, 0, *size]], dtype=self._dtype)
        return to_device(ids, self._device)


def _cut(tokenizer: Any, text: str) -> _Cut | None:
    """Returns the part of the text that the tokenizer cuts off, as in the pipeline; None: nothing.

    The beginning of a word that is cut in two is read.
    """
    most = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
    fast = tokenizer.is_fast
    coded = tokenizer(
        text,
        add_special_tokens=False,
        truncation=False,
        return_offsets_mapping=fast,
        verbose=False,
    )
    ids = coded["input_ids"]
    if len(ids) <= most:
        return None
    if not fast:
        return _Cut(most, len(ids), tokenizer.decode(ids[most:]))
    begin = coded["offset_mapping"][most][0]
    return _Cut(most, len(ids), _whole_words(text, begin))


def _whole_words(text: str, begin: int) -> str:
    """The text from the first word that begins there or behind it; all of it where none does."""
    rest = text[begin:]
    if begin and not text[begin - 1].isspace() and not rest[:1].isspace():  # within a word
        return rest.partition(" ")[2].strip() or rest
    return rest
