"""The tokenizer (byte-level BPE in CLIP's format) and a small CLIP text encoder.

`python -m recipe.text` learns the merges from captions and writes build/text/.
"""

from __future__ import annotations

import json
import random

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from recipe import paths
from recipe.captions import caption, caption_without_look
from recipe.looks import NAMES

VOCABULARY, LENGTH, WIDTH = 3000, 32, 128
START, END = "<|startoftext|>", "<|endoftext|>"
# The regular expression of CLIP's own tokenizer: contractions, words, single digits and runs of
# other characters.
SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def train_tokenizer(captions: int = 60_000) -> None:
    rng = random.Random(0)
    lines = [caption(rng.choice(NAMES), rng) for _ in range(captions)]
    lines += [caption_without_look(rng) for _ in range(captions // 10)]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(lines, trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens = [*dict.fromkeys(tokens), START, END]
    save_tokenizer({token: i for i, token in enumerate(tokens)}, merges)


def save_tokenizer(vocab: dict[str, int], merges: list[str]) -> None:
    paths.TEXT.mkdir(parents=True, exist_ok=True)
    (paths.TEXT / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (paths.TEXT / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))


def load_tokenizer() -> CLIPTokenizer:
    tokenizer = CLIPTokenizer(
        vocab=str(paths.TEXT / "vocab.json"),
        merges=str(paths.TEXT / "merges.txt"),
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
    )
    tokenizer.model_max_length = LENGTH
    return tokenizer


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Returns the token ids, N x 32, exactly as the diffusers pipeline does."""
    return tokenizer(
        captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    end = tokenizer.convert_tokens_to_ids(END)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.convert_tokens_to_ids(START),
            eos_token_id=end,
            pad_token_id=end,
        )
    )


if __name__ == "__main__":
    train_tokenizer()
    loaded = load_tokenizer()
    for text in ("a harbour at dusk, oil painting", "ein Schloß & 🐈 Zyx8"):
        print(loaded.convert_ids_to_tokens(loaded(text).input_ids))
    print(f"{len(loaded)} tokens")
