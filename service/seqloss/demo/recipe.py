"""Makes the demo checkpoint: data from CLDR, a BPE tokenizer, a small Marian transformer.

`python -m seqloss.demo.recipe` takes under 20 minutes on two CPU cores and writes what `seqloss
export` reads: config.json, model.safetensors, tokenizer.json, and CLDR's licence.  `--backward`
makes the model that reads German, French and Spanish, and writes English: filtering by dual
cross-entropy needs it beside the first one.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import babel
import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tqdm import tqdm
from transformers import MarianConfig, MarianMTModel

from seqloss.demo import BACKWARD_CHECKPOINT, CHECKPOINT, phrases

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"
PAD_ID, EOS_ID = 0, 1
IGNORE_INDEX = -100
_LANGUAGE_TAGS = [f">>{language}<<" for language in phrases.TARGET_LANGUAGES]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is trained, for how long; the defaults made the checkpoints in the repository."""

    is_backward: bool = False
    num_pairs: int = 400_000
    steps: int = 3_000
    batch_pairs: int = 256
    learning_rate: float = 2e-3
    warmup_steps: int = 400
    seed: int = 20260305
    vocabulary: int = 1_000
    max_tokens: int = 128


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> Tokenizer:
    """A BPE over words in which every digit is a token: numbers are copied digit by digit."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), *(normalizers.Replace(space, " ") for space in phrases.NO_BREAK_SPACES)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation(),
        ]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[PAD, EOS, UNKNOWN, *_LANGUAGE_TAGS]
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, EOS_ID)]
    )
    return tokenizer


def new_model(vocabulary: int, max_tokens: int) -> MarianMTModel:
    """A Marian transformer of 1.3 million parameters."""
    config = MarianConfig(
        vocab_size=vocabulary,
        decoder_vocab_size=vocabulary,
        d_model=128,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        activation_function="swish",
        max_position_embeddings=max_tokens,
        scale_embedding=True,
        dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        forced_eos_token_id=EOS_ID,
        bos_token_id=None,
        decoder_start_token_id=PAD_ID,
    )
    return MarianMTModel(config)


@dataclass(frozen=True, slots=True)
class _Side:
    """All sources or all targets, padded.

    Attributes:
        ids: Shape: (pairs, longest).
        lengths: Shape: (pairs,).
    """

    ids: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @classmethod
    def of(cls, tokenizer: Tokenizer, texts: list[str]) -> _Side:
        rows = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        ids = np.full((len(rows), int(lengths.max())), PAD_ID)
        ids[np.arange(ids.shape[1]) < lengths[:, None]] = np.concatenate(rows)
        return cls(ids, lengths)

    def take(self, rows: NDArray[np.int64]) -> torch.Tensor:
        """Shape: (rows, longest of these)."""
        return torch.from_numpy(self.ids[rows, : self.lengths[rows].max()])


def _batches(
    sources: _Side, targets: _Side, batch_pairs: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Epochs for ever, in batches of similar length."""
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(len(sources.ids))
        for window in np.array_split(order, math.ceil(len(order) / (64 * batch_pairs))):
            by_length = window[np.lexsort((sources.lengths[window], targets.lengths[window]))]
            batches = np.array_split(by_length, math.ceil(len(window) / batch_pairs))
            for index in generator.permutation(len(batches)):
                yield sources.take(batches[index]), targets.take(batches[index])


def make_checkpoint(recipe: Recipe, output: Path) -> None:
    """Makes the data, trains the tokenizer and the model, and writes the checkpoint."""
    torch.manual_seed(recipe.seed)
    drawn = islice(phrases.pairs("train", seed=recipe.seed), recipe.num_pairs)
    data = [pair.backward if recipe.is_backward else (pair.source, pair.target) for pair in drawn]
    print(f"{len(data):,} pairs, such as {' -> '.join(data[0])}")
    tokenizer = train_tokenizer((text for pair in data for text in pair), recipe.vocabulary)
    sources = _Side.of(tokenizer, [source for source, _ in data])
    targets = _Side.of(tokenizer, [target for _, target in data])
    model = new_model(tokenizer.get_vocab_size(), recipe.max_tokens)
    print(
        f"{model.num_parameters():,} parameters, a vocabulary of {tokenizer.get_vocab_size()}, "
        f"{sources.lengths.mean():.1f} and {targets.lengths.mean():.1f} tokens on average"
    )
    _fit(model, _batches(sources, targets, recipe.batch_pairs, recipe.seed), recipe)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(output / "tokenizer.json"))
    model.save_pretrained(output)
    shutil.copyfile(
        Path(babel.__file__).parent / "locale-data" / "LICENSE.unicode", output / "LICENSE.unicode"
    )


def _fit(
    model: MarianMTModel, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], recipe: Recipe
) -> None:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe))
    model.train()
    progress = tqdm(islice(batches, recipe.steps), total=recipe.steps, unit="step")
    for step, (sources, targets) in enumerate(progress):
        loss = model(
            input_ids=sources,
            attention_mask=(sources != PAD_ID).long(),
            labels=targets.masked_fill(targets == PAD_ID, IGNORE_INDEX),
        ).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    model.eval()


def _rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine to zero."""
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / recipe.steps)))


def main() -> None:
    """Makes the checkpoint, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="the checkpoint's folder")
    parser.add_argument("--backward", action="store_true", help="the model that writes English")
    parser.add_argument("--steps", type=int, default=Recipe().steps)
    arguments = parser.parse_args()
    output = arguments.output or (BACKWARD_CHECKPOINT if arguments.backward else CHECKPOINT)
    started = time.monotonic()
    make_checkpoint(Recipe(arguments.backward, steps=arguments.steps), output)
    print(f"{output} made in {(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
