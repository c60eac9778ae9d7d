"""Offers textual inversion embeddings from a folder: tokens of prompts with vectors of their own.

The tokenizers and the weights of the model are not changed: each change of the folder gives the
pipeline new copies of its tokenizers, and the encoders look up the numbers above their own
vocabulary in the vectors of the files.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin
from safetensors.torch import load
from torch import Tensor

from img2img_server.engine.denoiser import Embeddings
from img2img_server.engine.diffusers.families.base import Family, LoadedModel
from img2img_server.engine.diffusers.watched_folder import (
    IMAGES,
    OTHER_FORMATS,
    RefusedFileError,
    WatchedFolder,
    fingerprint_of,
)
from img2img_server.engine.diffusers.windows import runs_of
from img2img_server.engine.family import ModelAccessError, ModelError
from img2img_server.engine.file_kinds import kind_of_addition
from img2img_server.engine.tensor_names import first_names
from img2img_server.engine.weight_files import read_header

# Keys of files that do not name their token, with the encoder; None: the one of the same width.
_ENCODERS: Final[Mapping[str, str | None]] = {
    "emb_params": None,
    "*": None,
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
}

_MAX_BYTES: Final = 2**26  # 75 vectors of two encoders need about a megabyte.

_log = logging.getLogger(__name__)


class EmbeddingError(RefusedFileError):
    """A file does not fit the model; the sentence says why."""


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """The content of a file.

    Attributes:
        token: The text in prompts that stands for the vectors.
        vectors: Vectors x width, by the name of the encoder.
    """

    token: str
    vectors: Mapping[str, Tensor]

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens of all vectors, with the names that diffusers gives them."""
        count = max(len(each) for each in self.vectors.values())
        return (self.token, *(f"{self.token}_{place}" for place in range(1, count)))


@dataclass(frozen=True, slots=True)
class _Offered(Embeddings):
    """Embeddings with their contents, by their tokens."""

    by_token: Mapping[str, Embedding] = field(default_factory=dict, compare=False)


class EmbeddingSet:
    """The embeddings that prompts may name.

    A file that does not fit the model is logged with its reason and is not offered.

    Args:
        folder: Every .safetensors file in it is an embedding; None for none.
    """

    def __init__(self, model: LoadedModel, family: Family, folder: Path | None) -> None:
        self._pipeline = model.pipeline
        can_use = isinstance(model.pipeline, TextualInversionLoaderMixin)
        self._encoders = _encoders(model, family) if can_use else {}
        if self._encoders:
            model.pipeline.maybe_convert_prompt = all_vectors
        if folder is not None and not self._encoders:
            _log.warning(
                "embeddings_without_effect: models of the family %s take none", family.name
            )
            folder = None
        self._files = WatchedFolder("embedding", folder, self._read, (*OTHER_FORMATS, *IMAGES))
        self._offered = self._applied = _Offered()
        self._choose()

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens that prompts may have."""
        return tuple(self._offered.by_token)

    @property
    def current(self) -> Embeddings:
        """The embeddings of the present files. Its key is a hash of their names and bytes."""
        return self._offered

    def refresh(self) -> bool:
        """Reads the folder again; any thread may call it. Returns whether anything has changed."""
        has_changed = self._files.refresh()
        if has_changed:
            self._choose()
        return has_changed

    def apply(self, wanted: Embeddings) -> bool:
        """Gives tokens to the model, on the engine's thread. Returns whether they have changed
        since the last call.

        Args:
            wanted: A former or the present value of `current`.
        """
        assert isinstance(wanted, _Offered)
        if wanted == self._applied:
            return False
        for name, encoder in self._encoders.items():
            encoder.offer(self._pipeline, name, wanted.by_token.values())
        self._applied = wanted
        return True

    def _choose(self) -> None:
        """Offers the files, each token once."""
        found: dict[str, Embedding] = {}
        owners: dict[str, str] = {}
        files = self._files.seen
        for name, seen in files.items():
            assert seen.content is not None
            # The name after the last vector would be read as one more vector.
            names = (*seen.content.tokens, f"{seen.content.token}_{len(seen.content.tokens)}")
            taken = [token for token in names if token in owners]
            if taken:
                owner = owners[taken[0]]
                _log.warning(
                    "embedding_refused: %s: its token %s is that of %s: remove one of them",
                    *(name, taken[0], owner),
                )
                continue
            owners |= dict.fromkeys(names, name)
            found[seen.content.token] = seen.content
        self._offered = _Offered(fingerprint_of(files), found)

    def _read(self, file: Path) -> Embedding:
        """Returns the content of a file. Raises EmbeddingError if it does not fit."""
        found = self._embedding(file)
        _log.info("embedding_offered: %s has the token %s", file.name, found.token)
        return found

    def _embedding(self, file: Path) -> Embedding:
        try:
            names = list(read_header(file))
        except ModelAccessError as error:
            raise OSError(str(error)) from error
        except ModelError as error:
            raise EmbeddingError(str(error).replace(f"{file} ", "it ", 1)) from error
        vectors: dict[str, Tensor] = {}
        if set(names) <= _ENCODERS.keys():
            token = file.stem
        elif len(names) == 1:
            (token,) = names
        else:
            kind = kind_of_addition(names)
            raise EmbeddingError(
                f"it is no textual inversion embedding, by its tensors {first_names(names)}"
                f"{f': it {kind}' if kind else ''}"
            )
        if (size := file.stat().st_size) > _MAX_BYTES:
            raise EmbeddingError(f"it has {size} bytes, more than the {_MAX_BYTES} that are read")
        # Tensors that are mapped from the file would change with it.
        for key, tensor in load(file.read_bytes()).items():
            name = _ENCODERS.get(key) or self._encoder_of(tensor)
            if name not in self._encoders:
                raise EmbeddingError(f"{key} is for {name}, which the model does not have")
            vectors[name] = self._encoders[name].checked(key, tensor)
        for encoder in self._encoders.values():
            encoder.check_token(token)
        return Embedding(token, vectors)

    def _encoder_of(self, tensor: Tensor) -> str:
        """Returns the first encoder whose embeddings have the width of a tensor."""
        width = tensor.shape[-1] if tensor.ndim else 0
        for name, encoder in self._encoders.items():
            if encoder.width == width:
                return name
        widths = " or ".join(str(each.width) for each in self._encoders.values())
        raise EmbeddingError(
            f"its vectors have {width} numbers instead of {widths}: it belongs to another family"
        )


def all_vectors(prompt: str | list[str], tokenizer: Any) -> str | list[str]:
    """Returns prompts with the tokens of all vectors of each embedding, by the tokens in them.

    The method of diffusers with this signature looks for the letters of a name, so that it changes
    longer names with the same beginning, and misses names in capitals.
    """
    if not isinstance(prompt, str):
        return [str(all_vectors(text, tokenizer)) for text in prompt]
    if not (runs := runs_of(tokenizer)):
        return prompt
    coded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    texts, end = [], 0
    for number, (begin, after) in zip(coded["input_ids"], coded["offset_mapping"], strict=True):
        if number in runs:
            texts += [prompt[end:begin], *tokenizer.convert_ids_to_tokens(runs[number])]
            end = after
    return " ".join([*texts, prompt[end:]]) if texts else prompt


class _Encoder:
    """One text encoder, whose vocabulary the vectors of files extend."""

    def __init__(self, tokenizer_name: str, tokenizer: Any, text_encoder: Any) -> None:
        self._tokenizer_name = tokenizer_name
        self._tokenizer = tokenizer  # without the tokens of files
        self._vocabulary = tokenizer.get_vocab()
        self._table = text_encoder.get_input_embeddings()
        self._look_up: Callable[[Tensor], Tensor] | None = None

    @property
    def width(self) -> int:
        return int(self._table.weight.shape[1])

    def checked(self, key: str, tensor: Tensor) -> Tensor:
        """Returns the vectors of a tensor. Raises EmbeddingError if they do not fit."""
        vectors = tensor.float()[None] if tensor.ndim == 1 else tensor.float()
        most = int(self._tokenizer.model_max_length) - 2
        if vectors.ndim != 2 or vectors.shape[1] != self.width or not len(vectors):
            raise EmbeddingError(
                f"{key} has the shape {list(tensor.shape)} instead of vectors of {self.width}"
                " numbers: it belongs to another family"
            )
        if len(vectors) > most:
            raise EmbeddingError(f"{key} has {len(vectors)} vectors, but {most} tokens are read")
        if not torch.isfinite(vectors).all():
            raise EmbeddingError(f"{key} has values that are not finite: fetch the file again")
        return vectors

    def check_token(self, token: str) -> None:
        """Raises EmbeddingError for a token that the model has already."""
        if token in self._vocabulary or not token.strip():
            raise EmbeddingError(
                f"its token {token!r} is one of the model's own: rename the file, or the key in it"
            )
        if f"{token.lower()}</w>" in self._vocabulary:
            _log.warning("embedding_replaces_word: %s is in the vocabulary, too", token)

    def offer(self, pipeline: Any, name: str, embeddings: Any) -> None:
        """Gives the pipeline a tokenizer with these tokens, and their vectors to the encoder."""
        tokenizer, rows = copy.deepcopy(self._tokenizer), []
        size = len(tokenizer)
        for embedding in embeddings:
            vectors = embedding.vectors.get(name)
            if vectors is not None:
                tokenizer.add_tokens(list(embedding.tokens[: len(vectors)]))
                rows.append(vectors)
        setattr(pipeline, self._tokenizer_name, tokenizer if rows else self._tokenizer)
        if self._look_up is None:
            self._look_up = self._table.forward
        extended = _extended(self._look_up, size, torch.cat(rows)) if rows else self._look_up
        self._table.forward = extended


def _extended(
    look_up: Callable[[Tensor], Tensor], size: int, vectors: Tensor
) -> Callable[[Tensor], Tensor]:
    """Returns the look-up of a table with more rows.

    Args:
        size: The number of the first row of `vectors`.
    """

    def forward(numbers: Tensor) -> Tensor:
        found = look_up(numbers.clamp(max=size - 1))
        own = vectors.to(found)[(numbers - size).clamp(min=0)]
        return torch.where((numbers >= size)[..., None], own, found)

    return forward


def _encoders(model: LoadedModel, family: Family) -> dict[str, _Encoder]:
    """Returns the text encoders that read prompts, by name."""
    found = {}
    for tokenizer_name in family.tokenizers if family.clip_encoders(model) else ():
        name = tokenizer_name.replace("tokenizer", "text_encoder")
        tokenizer = getattr(model.pipeline, tokenizer_name)
        text_encoder = getattr(model.pipeline, name)
        if tokenizer is not None and text_encoder is not None:
            found[name] = _Encoder(tokenizer_name, tokenizer, text_encoder)
    return found
