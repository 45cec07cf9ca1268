"""The shard format, and the tokenizer settings, shared by everything
under data/ (the trainer has its own reader).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

MAGIC, VERSION, HEADER_WORDS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_WORDS
# This file says that the shards beside it are not all there yet.
UNFINISHED = "download.unfinished"
PAD, BOS, EOS, UNKNOWN = 0, 1, 2, 3
# SentencePiece's kinds of model.
BPE, UNIGRAM = "bpe", "unigram"
# The logarithms of a unigram model are rounded to whole numbers of 1 / SCORE_UNITS.
SCORE_UNITS = 8


class ShardError(ValueError):
    """A shard file that must not be read; the message names the file, what is wrong and the remedy."""


def write_shard(path: Path, values: np.ndarray) -> None:
    """Write uint16 `values` as one shard: a header of 256 int32 words
    (magic, version, count), then the values.

    The file appears under its name only once it is complete and on disk.
    """
    if values.dtype != np.dtype("<u2"):
        raise TypeError(f"{path}: shard values must be little-endian uint16, got {values.dtype}")
    header = np.zeros(HEADER_WORDS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(values)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(header.tobytes())
        file.write(values.tobytes())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_shard(path: Path) -> np.ndarray:
    """Map one shard's values (uint16, read-only); ShardError if
    magic, version or size are not what they must be.
    """
    remedy = "delete it and make or download it again"
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise ShardError(f"{path}: {size} bytes, shorter than the {HEADER_BYTES}-byte header; {remedy}")
    magic, version, count = (int(word) for word in np.fromfile(path, dtype="<i4", count=3))
    if magic != MAGIC:
        raise ShardError(f"{path}: magic number {magic}, expected {MAGIC}: not a token shard; {remedy}")
    if version != VERSION:
        raise ShardError(f"{path}: format version {version}, expected {VERSION}; {remedy}")
    if count < 0 or size != HEADER_BYTES + 2 * count:
        raise ShardError(
            f"{path}: {size} bytes, but {count} values need {HEADER_BYTES + 2 * count}; {remedy}"
        )
    return (
        np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))
        if count
        else np.zeros(0, "<u2")
    )


def read_json_object(path: Path) -> dict:
    """The JSON object in a file; OSError if it cannot be read, ValueError if it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"not a JSON object but {type(content).__name__}")
    return content


def checksum(content: dict) -> str:
    """The sha256 that a JSON object carries of itself (of everything but this entry)."""
    body = {name: value for name, value in content.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write text so that the file is either the old or the new one, whatever happens."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: dict) -> None:
    """Write JSON so that the file is either the old or the new one, whatever happens."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in blocks."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class _Sentences:
    """Training sentences; keeps what their source raises, which SentencePiece hides in its own error."""

    def __init__(self, texts: Iterable[str]):
        self.texts = texts
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self.texts:
                sentence = text.replace("\0", " ").strip()
                if sentence:
                    yield sentence
        except GeneratorExit:
            raise
        except BaseException as error:
            self.error = error
            raise


def with_whole_scores(content: bytes, operators: Sequence[str]) -> bytes:
    """The unigram model `content` with scores of round(SCORE_UNITS * log p), and 0 for `operators`.

    SentencePiece adds scores up in float32 from the start of the text. Sums of whole numbers are exact, so
    that of two ways to split a word the same one wins wherever it stands: data/fast_tokenizer.py and the mask
    of train_gpt.py build on it. A user-defined symbol would add a fraction of its own (-0.1), so operators
    become ordinary pieces, of a score that no other piece has. They stand in no other piece, and are taken
    wherever they occur.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(content)
    for piece in model.pieces:
        if piece.type == piece.NORMAL:
            piece.score = min(-1, round(SCORE_UNITS * piece.score))
        elif piece.piece in operators:
            piece.type = piece.NORMAL
            piece.score = 0
    model.trainer_spec.ClearField("user_defined_symbols")
    return model.SerializeToString(deterministic=True)


def train_tokenizer(
    texts: Iterable[str],
    prefix: Path,
    vocab_size: int,
    operators: Sequence[str] = (),
    split_digits: bool = True,
    model_type: str = BPE,
    split_by_whitespace: bool = True,
) -> Path:
    """Train a SentencePiece model (BPE as the contest's, or UNIGRAM) on `texts`; the path `prefix`.model.

    The settings are those of the public SP8192 and CaseOps tokenizers: character coverage 0.999, byte
    fallback, split digits, nmt_nfkc normalisation, no dummy prefix, ids pad/bos/eos/unk = 0/1/2/3.
    With `split_digits=False` a piece may hold several digits, with `split_by_whitespace=False` several words.
    `operators` become user-defined symbols (ids 4, 5, ...), but see with_whole_scores for a unigram model. A
    text is one training sentence, NUL replaced by a space, stripped. What `texts` raises is raised here;
    RuntimeError if SentencePiece itself refuses.
    """
    import sentencepiece

    sentences = _Sentences(texts)
    # A file written by SentencePiece itself would hold its own path, and differ between folders.
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            split_by_whitespace=split_by_whitespace,
            character_coverage=0.999,
            byte_fallback=True,
            split_digits=split_digits,
            normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False,
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNKNOWN,
            hard_vocab_limit=False,
            user_defined_symbols=list(operators),
            minloglevel=1,
        )
    except RuntimeError as error:
        raise (sentences.error or error) from None
    if sentences.error is not None:
        raise sentences.error
    content = model.getvalue()
    if model_type == UNIGRAM:
        content = with_whole_scores(content, operators)
    path = prefix.with_name(prefix.name + ".model")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
