"""What a bundle says of itself."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from seqloss.records import BoolArray

SCHEMA_VERSION: Literal[2] = 2
MANIFEST_NAME = "manifest.json"
WEIGHTS_NAME = "weights.safetensors"
BODY_GRAPH = "body.pt2"
ONNX_GRAPH = "loss.onnx"
ONNX_WEIGHTS = "loss.onnx.data"
TOKENIZER_FOLDER = "tokenizer"

EngineName = Literal["torch", "onnx"]
Precision = Literal["float32", "bfloat16", "float16", "int8"]


def _safe_path(text: str) -> str:
    path = PurePosixPath(text)
    unsafe = path.is_absolute() or ".." in path.parts or "\\" in text or str(path) != text
    if unsafe or not path.parts or text == MANIFEST_NAME:
        raise ValueError(f"{text!r} is not a path inside the bundle")
    return text


NumIds = Annotated[int, Field(gt=0, lt=2**31)]  # ids are of 32 bits
SafePath = Annotated[str, AfterValidator(_safe_path)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Checkpoint(_Strict):
    """Where the weights came from; the digest is over the weight files' SHA-256 in name order."""

    name: str
    digest: str


class Vocabulary(_Strict):
    """Sizes: rows of the source and target embeddings, and classes of the output projection."""

    source: NumIds
    target: NumIds
    classes: NumIds
    excluded_classes: list[tuple[NonNegativeInt, NonNegativeInt]] = []
    """First and last of each range of classes that is kept out of the softmax."""

    @property
    def excluded(self) -> BoolArray:
        """Which classes are kept out of the softmax. Shape: (classes,)."""
        mask = np.zeros(self.classes, np.bool_)
        for first, last in self.excluded_classes:
            mask[first : last + 1] = True
        return mask

    @property
    def num_classes(self) -> int:
        """V: the classes of the softmax."""
        return self.classes - int(self.excluded.sum())


class SpecialIds(_Strict):
    """Ids with a meaning, as the checkpoint's configuration names them."""

    decoder_start: NonNegativeInt
    pad: NonNegativeInt
    bos: NonNegativeInt | None = None
    eos: NonNegativeInt | None = None
    forced_bos: NonNegativeInt | None = None
    forced_eos: NonNegativeInt | None = None


class Languages(_Strict):
    """How a multilingual model is told the languages of a pair.

    Requests with ids carry these as the model was trained with them; for requests with texts the
    service puts them there.
    """

    ids: dict[str, NonNegativeInt] = Field(min_length=1)
    """Token id by language, named as the checkpoint's tokenizer names it."""
    source: Literal["first", "last", "none"]
    """Where the id of the source's language stands in the source."""
    target: Literal["first", "decoder_start", "first_of_source"]
    """Where the id of the target's language goes: first in the target, fed and not to be counted
    (`prefix_length` 1); the decoder's start (`decoder_start_token_id`); or first in the source."""


class Pieces(_Strict):
    """How ids come out of a SentencePiece model whose pieces are looked up in another vocabulary.

    The tokenizer's own ids are those of the model up to `num_ids`. What the vocabulary has and the
    SentencePiece model has not is there under its name behind a space, which no text can match: a
    text that the SentencePiece model does not know is looked up by it.
    """

    num_ids: NumIds
    """Ids from here on are of pieces that the vocabulary has not: they become `unknown`."""
    unknown: NonNegativeInt
    """Id of what neither the SentencePiece model nor the vocabulary has."""
    has_tags: bool
    """Whether a text may begin with a tag, such as `>>deu<<`, which is one token."""
    composes: bool
    """Whether characters are composed (Unicode's form C) first: the SentencePiece model does it,
    and the library `tokenizers`, with the same rules, only within characters of few bytes."""


class Tokenizer(_Strict):
    """One side's tokenizer, in the format of the library `tokenizers`.

    It adds what belongs to every text, such as `</s>`, but no language.
    """

    path: SafePath
    """Of its file, inside the bundle."""
    pieces: Pieces | None = None


class Text(_Strict):
    """What makes ids of texts; held against transformers' when the bundle was made."""

    source: Tokenizer
    target: Tokenizer


class Graph(_Strict):
    """One exported graph, with the error that losses were measured to have.

    A Torch graph ends at the hidden states, and takes its weights from the file that all of them
    share; an ONNX graph has the loss head inside, and a file of weights of its own.

    Errors are absolute differences of token nlls, in nats, against the self-test's.
    """

    engine: EngineName
    precision: Precision
    layout: Literal["padded", "packed"]
    """How batches are laid out: rows of one length, or sequences one after the other."""
    source_multiple: PositiveInt = 1
    """Sources are padded to a multiple of this and, where it is not 1, to two of them at least."""
    folder: SafePath
    exported_with: str
    opset: PositiveInt | None = None
    """Of an ONNX graph: the version of the standard operators."""
    ir_version: PositiveInt | None = None
    """Of an ONNX graph: the version of the format."""
    makes_logits: bool = False
    """Whether the logits of a whole batch exist while it runs, so that its memory grows with target
    tokens times classes; imported graphs make them, exported ones a block of classes at a time."""
    max_error: float = Field(ge=0)
    mean_error: float = Field(ge=0)
    tolerance: float = Field(gt=0, le=1)
    """The largest error of a token at which a device may call itself ready."""
    mean_tolerance: float = Field(gt=0, le=1)
    """And the largest mean error, which in 16 bits tells more: it hardly varies."""

    @property
    def path(self) -> str:
        """Of the graph itself, inside the bundle."""
        return f"{self.folder}/{BODY_GRAPH if self.engine == 'torch' else ONNX_GRAPH}"

    @property
    def weights_path(self) -> str:
        """Of the weights that it reads, inside the bundle."""
        return WEIGHTS_NAME if self.engine == "torch" else f"{self.folder}/{ONNX_WEIGHTS}"


class SelfTest(_Strict):
    """Pairs with their token nlls, in nats, by whatever the bundle was made of, one at a time."""

    reference: Literal["transformers", "imported"] = "transformers"
    """Whose numbers they are: transformers' in float32, or those of imported ONNX files."""

    source_ids: list[list[NonNegativeInt]] = Field(min_length=1)
    source_index: list[NonNegativeInt] = Field(min_length=1)
    target_ids: list[list[NonNegativeInt]] = Field(min_length=1)
    token_nlls: list[list[float]] = Field(min_length=1)

    @property
    def described(self) -> str:
        """The reference in words."""
        is_imported = self.reference == "imported"
        return "the imported files" if is_imported else "transformers in float32"


class File(_Strict):
    """One file of the bundle."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    num_bytes: NonNegativeInt


class Manifest(_Strict):
    """The whole of manifest.json."""

    schema_version: Literal[2]
    seqloss_version: str
    family: str
    checkpoint: Checkpoint
    vocabulary: Vocabulary
    special_ids: SpecialIds
    languages: Languages | None = None
    text: Text | None = None
    """None where the checkpoint has no tokenizer that could be stored: ids only are taken then."""
    max_source_tokens: PositiveInt | None
    max_target_tokens: PositiveInt | None
    softcap: float | None = Field(None, gt=0)
    """The bound that the model squashes its logits to, by `softcap * tanh(logits / softcap)`."""
    weight_aliases: dict[str, str]
    """Names that share a stored tensor, such as tied embeddings: alias to stored name."""
    graphs: list[Graph] = Field(min_length=1)
    self_test: SelfTest
    files: dict[SafePath, File]

    def graph(self, engine: EngineName, precision: Precision) -> Graph:
        """The graph of an engine and a precision that the bundle has."""
        return next(
            graph for graph in self.graphs if (graph.engine, graph.precision) == (engine, precision)
        )


def sha256_of(path: Path) -> str:
    """The file's digest in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
