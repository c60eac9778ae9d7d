"""Encodes prompts that are weighted or longer than the window of a CLIP text encoder.

compel splits a prompt into chunks, at the end of a sentence where it can. The encoder reads each
chunk alone, with its own start and end tokens, and the network gets all chunks one after another.
T5 reads one chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from compel import EmbeddingsProvider, ReturnedEmbeddingsType, SplitLongTextMode
from compel.embeddings_provider import BaseTextualInversionManager
from torch import Tensor

from img2img_server.domain.prompt_syntax import Fragment, Sections
from img2img_server.engine.host_copy import to_device

# The most tokens of a prompt that are read: eight windows of CLIP, about 450 words.
MAX_TOKENS = 600
SPECIAL_TOKENS = 2  # start and end of a chunk


def max_chunks(window: int) -> int:
    """Returns the most chunks of a prompt. Two neighbouring chunks have more tokens than one
    window, so a prompt has at most twice as many chunks as it fills windows.
    """
    return 2 * -(-MAX_TOKENS // (window - SPECIAL_TOKENS))


@dataclass(frozen=True, slots=True, eq=False)
class ClipEncoder:
    """A CLIP text encoder with its tokenizer.

    Attributes:
        is_normalized: Whether the network takes the normalised output of the last layer; otherwise
            it takes the output of the layer before, as in Stable Diffusion XL.
    """

    tokenizer: Any
    text_encoder: Any
    is_normalized: bool

    @property
    def window(self) -> int:
        """The number of tokens that the encoder reads at once, special ones included."""
        return int(self.tokenizer.model_max_length)

    def chunks(self, sections: Sections) -> int:
        """Returns the number of chunks of a prompt, also of those beyond `max_chunks`."""
        provider = self._provider("cpu")
        found = 0
        for texts, weights in self._read_part(sections):
            ids, _, _ = provider.get_token_ids_and_expand_weights(texts, weights, device="cpu")
            found += len(ids) // self.window
        return found

    def fits(self, text: str) -> bool:
        """Returns whether one window has room for all tokens of a text, also for start and end
        tokens in it.
        """
        return len(token_places(self.tokenizer, text)) <= self.window - SPECIAL_TOKENS

    def encode(
        self, sections: Sections, chunks: int, device: torch.device, clip_skip: int = 0
    ) -> Tensor:
        """Returns the embeddings of a prompt, tokens x width.

        Args:
            chunks: The number of chunks of the result. The embeddings of an empty prompt are
                appended up to it, as compel does if a prompt and its negative prompt have different
                lengths.
            clip_skip: How many of the encoder's last layers are skipped.
        """
        provider = self._provider(device, clip_skip)
        encode = provider.get_embeddings_for_weighted_prompt_fragments
        parts: list[Tensor] = []
        most = max_chunks(self.window) * self.window
        for texts, weights in self._read_part(sections):
            if sum(map(len, parts)) < most:
                parts.append(encode([texts], [weights], device=device)[0])
        found = torch.cat(parts)[:most]
        missing = chunks - len(found) // self.window
        empty = [provider.empty_z[0].to(found.dtype)] * missing if missing > 0 else []
        return torch.cat([found, *empty])

    def encode_windows(
        self, prompts: Sequence[str], clip_skip: int, device: torch.device
    ) -> Tensor:
        """Encodes the first window of each prompt without the last layers, as the stock pipeline
        does; returns prompts x tokens x width.
        """
        coded = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.window,
            truncation=True,
            return_tensors="pt",
        ).to(device)
        uses_mask = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = coded.attention_mask if uses_mask else None
        found: Tensor = _ShorterEncoder(self.text_encoder, clip_skip)(
            coded.input_ids, mask
        ).last_hidden_state
        return found

    def _read_part(self, sections: Sections) -> list[tuple[list[str], list[float]]]:
        """Returns the texts and weights of each section, as far as its tokens are read."""
        found, left = [], MAX_TOKENS
        for section in sections:
            texts, weights = [], []
            for text, weight in section:
                part, tokens = self._beginning(text, left)
                if tokens:
                    texts.append(part)
                    weights.append(weight)
                left -= tokens
            if texts:
                found.append((texts, weights))
        return found or [([""], [1.0])]

    def _beginning(self, text: str, most: int) -> tuple[str, int]:
        """Returns the beginning of a text with at most this number of tokens, and their number.

        Start and end tokens in the text would end its chunk, so they are removed.
        """
        for token in (self.tokenizer.bos_token, self.tokenizer.eos_token):
            text = text.replace(token, " ")
        places = token_places(self.tokenizer, text)
        if len(places) <= most:
            return text, len(places)
        return text[: places[most]], most

    def _provider(self, device: torch.device | str, clip_skip: int = 0) -> Any:
        """Returns compel's encoder. It caches the embedding of an empty prompt, which a LoRA may
        change, so each prompt needs a new one.
        """
        kinds = ReturnedEmbeddingsType
        return EmbeddingsProvider(
            self.tokenizer,
            _ShorterEncoder(self.text_encoder, clip_skip) if clip_skip else self.text_encoder,
            _MultiVectorTokens(self.tokenizer),
            truncate=False,
            returned_embeddings_type=(
                kinds.LAST_HIDDEN_STATES_NORMALIZED
                if self.is_normalized
                else kinds.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
            ),
            device=device,
            split_long_text_mode=SplitLongTextMode.SENTENCES,
        )


def encode_weighted(
    tokenizer: Any,
    text_encoder: Any,
    fragments: Sequence[Fragment],
    limit: int,
    device: torch.device,
) -> Tensor:
    """Returns the embeddings of a prompt by an encoder that reads one chunk, tokens x width.

    Args:
        limit: The number of tokens of the chunk, special ones included; later ones are not read.
    """
    # compel cannot weight fragments without tokens.
    read = [it for it in fragments if tokenizer(it.text, add_special_tokens=False)["input_ids"]]
    provider = EmbeddingsProvider(
        tokenizer, text_encoder, truncate=True, model_max_length=limit, device=device
    )
    found: Tensor = provider.get_embeddings_for_weighted_prompt_fragments(
        [[text for text, _ in read]], [[weight for _, weight in read]], device=device
    )[0]
    return found


class _MultiVectorTokens(BaseTextualInversionManager):  # type: ignore[misc]
    """Replaces the token of an embedding of several vectors by the tokens of all of them."""

    def __init__(self, tokenizer: Any) -> None:
        self._runs = runs_of(tokenizer)

    def expand_textual_inversion_token_ids_if_necessary(self, token_ids: list[int]) -> list[int]:
        return [each for number in token_ids for each in self._runs.get(number, [number])]


def token_places(tokenizer: Any, text: str) -> list[int]:
    """Returns the place in the text where each of its tokens begins. Each vector of an embedding is
    a token.
    """
    coded = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
    )
    runs = runs_of(tokenizer)
    return [
        begin
        for number, (begin, _) in zip(coded["input_ids"], coded["offset_mapping"], strict=True)
        for _ in runs.get(number, [number])
    ]


def runs_of(tokenizer: Any) -> dict[int, list[int]]:
    """Returns the tokens of each embedding of several vectors, by the first one."""
    added = tokenizer.added_tokens_encoder
    runs: dict[int, list[int]] = {}
    for token, number in added.items():
        run = [number]
        while (following := added.get(f"{token}_{len(run)}")) is not None:
            run.append(following)
        if len(run) > 1:
            runs[number] = run
    return runs


@dataclass(frozen=True, slots=True, eq=False)
class _ShorterEncoder:
    """A CLIP text encoder without its last layers, as compel calls it."""

    text_encoder: Any
    clip_skip: int

    @property
    def device(self) -> torch.device:
        return torch.device(self.text_encoder.device)

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self.text_encoder.dtype
        return found

    def __call__(
        self, token_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> SimpleNamespace:
        output = self.text_encoder(
            token_ids, attention_mask, output_hidden_states=True, return_dict=True
        )
        states = output.hidden_states[: len(output.hidden_states) - self.clip_skip]
        norm = getattr(self.text_encoder, "text_model", self.text_encoder).final_layer_norm
        return SimpleNamespace(hidden_states=states, last_hidden_state=norm(states[-1]))


def pad_chunks(
    rows: Sequence[Tensor], window: int, is_compiled: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns the embeddings of prompts in one tensor, and the mask of their tokens; None: they
    have the same number of tokens, and all count.

    Args:
        rows: Tokens x width each.
    """
    lengths = [len(row) for row in rows]
    most = max(lengths)
    if is_compiled and most > window:
        most = window * max_chunks(window)  # one more shape to compile, not one a length
    elif min(lengths) == most:
        return torch.stack(list(rows)), None
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    padded = torch.nn.functional.pad(padded, (0, 0, 0, most - padded.shape[1]))
    places = torch.arange(most, device=padded.device)
    ends = to_device(torch.tensor(lengths), padded.device)
    return padded, places[None] < ends[:, None]
