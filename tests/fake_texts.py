"""The fake model with a tokenizer, for tests of texts that need no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors

from fakes import EOS, VOCABULARY_SIZE, fake_bundle
from seqloss.bundle.manifest import File, Text, sha256_of
from seqloss.bundle.manifest import Tokenizer as StoredTokenizer
from seqloss.bundle.reader import Bundle

TOKENIZER_PATH = "tokenizer/tokenizer.json"
UNKNOWN, GERMAN = 48, 40


def fake_text_bundle(folder: Path, *, ends: bool = True, **changes: Any) -> Bundle:
    """Words are tokens: `w7` has the id 7, `>>de<<` 40, others are unknown; texts end in `</s>`.

    The tokenizer has two words more than the model has ids.
    """
    words = {f"w{index}": index for index in range(VOCABULARY_SIZE + 2)}
    for name, index in (("</s>", EOS), ("<unk>", UNKNOWN), (">>de<<", GERMAN)):
        words[name] = words.pop(f"w{index}")
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", EOS)]
        )
    path = folder / TOKENIZER_PATH
    path.parent.mkdir(exist_ok=True)
    tokenizer.save(str(path))
    side = StoredTokenizer(path=TOKENIZER_PATH)
    files = {TOKENIZER_PATH: File(sha256=sha256_of(path), num_bytes=path.stat().st_size)}
    bundle = fake_bundle(text=Text(source=side, target=side), files=files, **changes)
    return Bundle(folder, bundle.manifest, bundle.digest)
