"""Encodes prompts with the text encoders of a diffusers pipeline, and caches the latest ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from img2img_server.domain.prompt_syntax import (
    Fragment,
    Sections,
    parse,
    plain_text,
    without_breaks,
)
from img2img_server.engine.base import cut_warning
from img2img_server.engine.denoiser import Adapter, Conditioning, TextEmbedding, TextInput
from img2img_server.engine.diffusers.families.base import Family, LoadedModel
from img2img_server.engine.diffusers.placement import TextEncoderOffload
from img2img_server.engine.diffusers.windows import max_chunks, token_places
from img2img_server.engine.host_copy import to_device
from img2img_server.engine.options import TextEncoderPlacement

_CACHE_PROMPTS = 128
_CACHE_BYTES = 2**27  # a prompt of SD takes 0.2 MB, one of 512 tokens of T5-XXL in bfloat16 4 MB


class _Prompt(NamedTuple):
    text: str
    is_negative: bool
    adapters: tuple[Adapter, ...]
    chunks: int  # in how many chunks it is encoded
    sections: Sections  # the text with its weights
    clip_skip: int = 0  # how many layers of the CLIP encoders are skipped
    breaks: int = 0  # how many BREAKs have no effect
    fits: bool = True  # whether the stock pipeline reads all of it

    @property
    def is_plain(self) -> bool:
        """Whether the stock pipeline encodes it in the same way."""
        return self.fits and self.chunks == 1 and _is_unweighted(self.sections)


class _Cut(NamedTuple):
    """The number of tokens that an encoder reads, the number of all tokens, and the words that are
    not read.
    """

    kept: int
    tokens: int
    rest: str


class TextEncoder:
    """Encodes prompts in one batch. Recently encoded prompts come from a cache."""

    def __init__(self, model: LoadedModel, family: Family, placement: TextEncoderPlacement) -> None:
        self._model = model
        self._offload = TextEncoderOffload(model.pipeline, model.device, placement)
        self._family = family
        self._cache: OrderedDict[_Prompt, TextEmbedding] = OrderedDict()
        self.reload_tokenizers()

    def reload_tokenizers(self) -> None:
        """Reads the tokenizers of the pipeline again and drops the encoded prompts."""
        model, family = self._model, self._family
        parts = [getattr(model.pipeline, name) for name in family.tokenizers]
        self._tokenizers = [part for part in parts if part is not None]
        self._encoders = family.clip_encoders(model) if self._tokenizers else ()
        self._cache.clear()

    def encode(self, texts: Sequence[TextInput], forwards: Sequence[int]) -> list[Conditioning]:
        """Returns one conditioning a text; rows with two forwards get their negative prompt too."""
        pairs = [self._pair(text, count) for text, count in zip(texts, forwards, strict=True)]
        prompts, negatives = zip(*pairs, strict=True)
        known = self._look_up([*prompts, *(prompt for prompt in negatives if prompt)])
        return [
            self._condition(text, known[prompt], known[negative] if negative else None)
            for text, prompt, negative in zip(texts, prompts, negatives, strict=True)
        ]

    def _pair(self, text: TextInput, forwards: int) -> tuple[_Prompt, _Prompt | None]:
        """Returns the prompt and the negative prompt of a row, in equally many chunks, as in the
        stock pipelines.
        """
        prompts = [
            self._prompt(part, text, is_negative=is_negative)
            for part, is_negative in ((text.prompt, False), (text.negative_prompt, True))
        ][:forwards]
        chunks = max(prompt.chunks for prompt in prompts)
        prompt, *negatives = (prompt._replace(chunks=chunks) for prompt in prompts)
        return prompt, negatives[0] if negatives else None

    def _prompt(self, text: str, source: TextInput, *, is_negative: bool) -> _Prompt:
        sections: Sections = ((Fragment(text),),)
        breaks = 0
        if source.prompt_weights and self._family.takes_prompt_weights:
            sections = parse(text)
            text = plain_text(sections)
            if not self._encoders:
                breaks = len(sections) - 1
                sections = without_breaks(sections)
        chunks = [min(it.chunks(sections), max_chunks(it.window)) for it in self._encoders]
        # As in the stock pipelines, negative prompts use all layers.
        clip_skip = 0 if is_negative else source.clip_skip
        most = max(chunks, default=1)
        # Chunks have no start and end tokens of the text, which the stock pipeline counts.
        fits = all(it.fits(text) for it in self._encoders)
        return _Prompt(text, is_negative, source.adapters, most, sections, clip_skip, breaks, fits)

    def clear_cache(self) -> None:
        """Drops the encoded prompts."""
        self._cache.clear()

    def _look_up(self, prompts: Sequence[_Prompt]) -> dict[_Prompt, TextEmbedding]:
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cache]
        found = dict(zip(missing, self._encode(missing), strict=True)) if missing else {}
        for prompt in prompts:
            if prompt not in found:
                found[prompt] = self._cache[prompt]
            self._cache[prompt] = found[prompt]
            self._cache.move_to_end(prompt)
        while len(self._cache) > _CACHE_PROMPTS or (
            len(self._cache) > 1 and sum(map(_size, self._cache.values())) > _CACHE_BYTES
        ):
            self._cache.popitem(last=False)
        return found

    def _encode(self, prompts: Sequence[_Prompt]) -> list[TextEmbedding]:
        with self._offload.running():
            encoded = self._tensors(replace(self._model, device=self._offload.device), prompts)
        device = self._model.device
        return [
            TextEmbedding(
                {name: _moved(tensor, device) for name, tensor in tensors.items()},
                self._warning(prompt),
            )
            for prompt, tensors in zip(prompts, encoded, strict=True)
        ]

    def _tensors(
        self, model: LoadedModel, prompts: Sequence[_Prompt]
    ) -> list[Mapping[str, torch.Tensor]]:
        """Returns the tensors of each prompt. Those of one chunk without weights are encoded in one
        batch for each `clip_skip`.
        """
        found: dict[_Prompt, Mapping[str, torch.Tensor]] = {}
        short = [prompt for prompt in prompts if prompt.is_plain]
        for clip_skip in sorted({prompt.clip_skip for prompt in short}):
            alike = [prompt for prompt in short if prompt.clip_skip == clip_skip]
            found |= zip(alike, self._plain(model, alike, clip_skip), strict=True)
        for prompt in prompts:
            if prompt not in found:
                found[prompt] = self._family.encode_chunks(
                    model, prompt.sections, prompt.chunks, prompt.is_negative, prompt.clip_skip
                )
        return [found[prompt] for prompt in prompts]

    def _plain(
        self, model: LoadedModel, prompts: Sequence[_Prompt], clip_skip: int
    ) -> list[Mapping[str, torch.Tensor]]:
        """Encodes prompts of one chunk without weights."""
        texts = [prompt.text for prompt in prompts]
        if clip_skip:
            return self._family.encode_skipping(model, texts, clip_skip)
        are_negative = [prompt.is_negative for prompt in prompts]
        return self._family.encode_prompts(model, texts, are_negative)

    def _warning(self, prompt: _Prompt) -> str:
        """Returns sentences about the part of a prompt that no encoder reads, and about syntax
        without effect; "" if there is none.
        """
        name = "negative prompt" if prompt.is_negative else "prompt"
        found = [self._cut_warning(name, prompt), self._chunk_warning(name, prompt)]
        if prompt.breaks:
            found.append(f"BREAK in the {name} has no effect: the model reads it as one chunk.")
        return " ".join(filter(None, found))

    def _cut_warning(self, name: str, prompt: _Prompt) -> str:
        """Returns a sentence about the words after the last token that is read."""
        texts = [text for section in prompt.sections for text, _ in section] or [""]
        cuts = [
            _cut(tokenizer, texts, self._family.token_limit(tokenizer))
            for tokenizer in self._tokenizers
        ]
        if not cuts or None in cuts:
            return ""
        # Words have no effect if the encoder with the longest window does not read them.
        kept, tokens, rest = min((cut for cut in cuts if cut), key=lambda cut: len(cut.rest))
        return cut_warning(name, kept, tokens, rest)

    def _chunk_warning(self, name: str, prompt: _Prompt) -> str:
        """Returns a sentence about the chunks that no encoder reads; only BREAK can make so many
        of few words.
        """
        counts = [(it.chunks(prompt.sections), max_chunks(it.window)) for it in self._encoders]
        count, most = max(counts, default=(0, 0))
        return f"Of the {count} chunks of the {name}, the first {most} are read." * (count > most)

    def _condition(
        self, text: TextInput, prompt: TextEmbedding, negative: TextEmbedding | None
    ) -> Conditioning:
        scales = torch.tensor(
            [text.guidance_scale, self._family.cfg_scale(text)], dtype=torch.float32
        )
        guidance_scale, cfg_scale = to_device(scales, self._model.device)
        return Conditioning(
            prompt=prompt,
            negative=negative,
            guidance_scale=guidance_scale,
            cfg_scale=cfg_scale,
            adapters=text.adapters,
            extras=self._family.extras(self._model, text),
        )


def _is_unweighted(sections: Sections) -> bool:
    return len(sections) == 1 and all(weight == 1 for _, weight in sections[0])


def _size(embedding: TextEmbedding) -> int:
    return sum(tensor.nbytes for tensor in embedding.tensors.values())


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor if tensor.device.type == device.type else to_device(tensor, device)


def _cut(tokenizer: Any, texts: Sequence[str], limit: int) -> _Cut | None:
    """Returns the part of a prompt that the encoder does not read, or None.

    The beginning of a word that is cut in two is read.

    Args:
        texts: The fragments of the prompt, which are encoded one by one.
        limit: How many tokens the encoder reads, special ones included.
    """
    most = limit - tokenizer.num_special_tokens_to_add()
    tokens, rest = 0, ""
    for text in texts:
        count, unread = _unread(tokenizer, text, max(0, most - tokens))
        tokens, rest = tokens + count, rest + unread
    return _Cut(most, tokens, rest) if tokens > most else None


def _unread(tokenizer: Any, text: str, read: int) -> tuple[int, str]:
    """Returns the number of tokens of a text, and its words after the first `read` tokens."""
    if not tokenizer.is_fast:
        ids = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)[
            "input_ids"
        ]
        return len(ids), tokenizer.decode(ids[read:])
    places = token_places(tokenizer, text)
    if len(places) <= read:
        return len(places), ""
    return len(places), _whole_words(text, places[read] if read else 0)


def _whole_words(text: str, begin: int) -> str:
    """Returns the text from the first word that begins at or after `begin`."""
    rest = text[begin:]
    if begin and not text[begin - 1].isspace() and not rest[:1].isspace():
        # The part begins within a word.
        _, *words = rest.split(maxsplit=1)
        return words[0] if words else rest
    return rest
