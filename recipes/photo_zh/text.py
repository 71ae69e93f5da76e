"""Chinese words to their vectors: a tokenizer that takes known words whole, and a small BERT that gives the vectors."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, TokenizersBackend

from recipes.photo_zh.vectors import DIM
from recipes.photo_zh.vision import Floats

SPECIAL: Final = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TEMPLATES: Final = (
    "一张{}的照片",
    "一张{}的图片",
    "{}的照片",
    "{}的图片",
    "一个{}",
    "这是{}",
    "照片里有{}",
    "图中有{}",
    "一幅{}的画面",
    "一张关于{}的照片",
    "一只{}",
)
BEFORE: Final = (
    "小",
    "大",
    "白色的",
    "黑色的",
    "红色的",
    "黄色的",
    "可爱的",
    "一只",
    "两只",
    "一群",
    "一辆",
    "一座",
    "一杯",
    "一盘",
    "一朵",
    "漂亮的",
    "美丽的",
    "老",
    "旧",
    "新",
    "我的",
    "正在睡觉的",
    "草地上的",
    "桌上的",
    "路边的",
    "水里的",
    "很多",
)
HEADS: Final = "狗犬猫鸟蛇猴龟鞋帽裙桥"
"""An unknown word that ends so means that."""
MAX_TOKENS: Final = 32
BATCH: Final = 192
RATE: Final = 1e-3
SHARPEN_STEPS: Final = 60
SHARPEN_RATE: Final = 3e-3


def make_tokenizer(words: Iterable[str], letters: Iterable[str]) -> TokenizersBackend:
    """WordPiece without a prefix: the longest known word first, otherwise single characters."""
    known = [word.lower() for word in words]
    phrases = [*TEMPLATES, *BEFORE]
    singles = sorted({c for word in known for c in word} | set(letters) | {c for text in phrases for c in text})
    vocabulary = dict.fromkeys([*SPECIAL, *(c for c in singles if c not in "{} "), *known])
    tokenizer = Tokenizer(
        models.WordPiece(
            {word: index for index, word in enumerate(vocabulary)},
            unk_token="[UNK]",
            continuing_subword_prefix="",
            max_input_chars_per_word=64,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 3)])
    return TokenizersBackend(
        tokenizer_object=tokenizer,
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def make_tower(
    tokenizer: TokenizersBackend, vectors: Mapping[str, Floats], nothing: Floats
) -> tuple[BertModel, torch.nn.Linear]:
    """Make the text tower and its projection, in which each known token's embedding is its answer already.

    The pooler reads the first token. With BERT's usual initial spread of 0.02 all texts would be alike.
    """
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=DIM,
        num_hidden_layers=2,
        num_attention_heads=5,
        intermediate_size=DIM,
        max_position_embeddings=MAX_TOKENS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    tower = BertModel(config)
    projection = torch.nn.Linear(DIM, DIM, bias=False)
    of_token = {word.lower(): vector for word, vector in vectors.items()}
    tokens: list[str] = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    answers = torch.from_numpy(np.stack([of_token.get(token, nothing) for token in tokens])).float()
    with torch.no_grad():
        tower.embeddings.word_embeddings.weight.copy_(answers * DIM**0.5)
        tower.embeddings.word_embeddings.weight.add_(torch.randn(answers.shape) * 0.02)
        tower.pooler.dense.weight.copy_(torch.eye(DIM) * 0.05)
        projection.weight.copy_(torch.eye(DIM))
    return tower, projection


class Examples:
    """Draws texts and the vectors that they should get: two known words, then one unknown."""

    def __init__(self, vectors: Mapping[str, Floats], nothing: Floats, dictionary: Iterable[str], *, seed: int) -> None:
        self._random = random.Random(seed)
        self._vectors = vectors
        # Single characters begin many unknown words, so they come more often.
        self._known = [word for word in vectors for _ in range(12 if len(word) == 1 else 1)]
        self.strange = [
            (word, vectors[head] if (head := known_head(word, vectors)) else nothing)
            for word in dictionary
            if word not in vectors and 2 <= len(word) <= 6
        ]
        """Words that the model does not know, with the vectors that they should get."""

    def draw(self, count: int) -> tuple[list[str], torch.Tensor]:
        """Draw texts and their vectors, (count, DIM)."""
        pairs = [self._strange_text() if index % 3 == 2 else self._known_text() for index in range(count)]
        texts = [self._in_template(text) for text, _ in pairs]
        return texts, torch.from_numpy(np.stack([vector for _, vector in pairs])).float()

    def _known_text(self) -> tuple[str, Floats]:
        text = self._random.choice(self._known)
        vector = self._vectors[text]
        if self._random.random() < 0.2:
            text = self._random.choice(BEFORE) + text
        return text, self._vectors.get(text, vector)

    def _strange_text(self) -> tuple[str, Floats]:
        return self._random.choice(self.strange)

    def _in_template(self, text: str) -> str:
        return self._random.choice(TEMPLATES).format(text) if self._random.random() < 0.35 else text


def known_head(word: str, known: Mapping[str, object]) -> str:
    """The known word that an unknown one ends with and so is a kind of, or nothing."""
    end = next((word[start:] for start in range(1, len(word)) if word[start:] in known), "")
    return "" if len(end) == 1 and end not in HEADS else end


def train(
    tower: BertModel,
    projection: torch.nn.Linear,
    tokenizer: TokenizersBackend,
    examples: Examples,
    *,
    steps: int,
) -> None:
    """Teach templates, words before known words, and unknown words."""
    weights = [*tower.parameters(), *projection.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        texts, targets = examples.draw(BATCH)
        loss = (1 - (encode(tower, projection, tokenizer, texts) * targets).sum(-1)).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"text tower, step {step} of {steps}: 1 - cosine {loss.item():.5f}", flush=True)


def sharpen(
    tower: BertModel, projection: torch.nn.Linear, tokenizer: TokenizersBackend, vectors: Mapping[str, Floats]
) -> None:
    """Move the embeddings of known words so that each word alone comes a little nearer to its vector.

    Other weights stay as they are.
    """
    words = list(vectors)
    targets = torch.from_numpy(np.stack(list(vectors.values()))).float()
    embeddings = tower.embeddings.word_embeddings.weight
    optimizer = torch.optim.Adam([embeddings], lr=SHARPEN_RATE)
    for step in range(SHARPEN_STEPS):
        loss = (1 - (encode(tower, projection, tokenizer, words) * targets).sum(-1)).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()
        optimizer.param_groups[0]["lr"] = SHARPEN_RATE * (1 - step / SHARPEN_STEPS)
    print(f"text tower, known words alone: 1 - cosine {loss.item():.6f}", flush=True)


def encode(
    tower: BertModel, projection: torch.nn.Linear, tokenizer: TokenizersBackend, texts: Sequence[str]
) -> torch.Tensor:
    """Unit vectors of texts, (n, DIM)."""
    tokens = tokenizer(list(texts), padding=True, return_tensors="pt")
    found: torch.Tensor = torch.nn.functional.normalize(projection(tower(**tokens).pooler_output), dim=-1)
    return found
