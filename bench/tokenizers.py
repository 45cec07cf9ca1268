#!/usr/bin/env python3
"""Which tokenizer earns its place: tokens per byte of held-out text and, with --mini, bits per byte.

    python bench/tokenizers.py [--work FOLDER] [--only NAME ...] [--mb 53.6] [--quick]
    python bench/tokenizers.py --mini --seeds 1 2 --only words superwords_words --work FOLDER

Every tokenizer of VARIANTS is trained on the same text and counted on the same held-out text, whose tokens
must decode to it and account for each of its bytes. --mini makes each with a quarter of its entries, and
trains the model of the mini contest (docs/mini.md) with it, at equal operations. What is done is kept in
--work and not done again. Tokenizers of the library `tokenizers` are left out where it is not installed.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder: bench/data.py would hide the package data
import environment

environment.enter()
import argparse
import importlib.util
import json
import resource
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice

import recipes
from bench.texts import SHARED, TRAINING_MB, embedded_texts, lines_of, size, table_texts
from bench.trainings import train
from data import prepare
from data.card import MANIFEST
from data.fast_tokenizer import FastTokenizer, load_model
from data.shards import checksum, read_json_object, train_tokenizer, write_json
from data.sidecar import encode_with_bytes
from data.superword_training import KINDS, LONGEST_PIECE, OPERATORS, TEXT, WORDS, train_with_superwords
from lossless_caps import LOWER, TRANSFORMS

TRANSFORM = "caseops_v3"
QUICK_MB = 3
MINI = ROOT / "records" / "recipes" / "mini.env"
# Its model is about so much narrower than the contest's, and reads less text than this at its operations.
MINI_SHARE, MINI_TRAINING_MB, MINI_VALIDATION_MB = 4, 8, 0.5
# Without words SentencePiece holds every pair of letters of the text: about 100 bytes for each byte.
ONE_STAGE_LINES = 40_000
PIECE_OF_SPACE = "\u2581"


@dataclass(frozen=True)
class Variant:
    """One way to make a tokenizer of `entries` pieces for CaseOps v3."""

    entries: int = 8192
    trainer: str = "bpe"  # of SentencePiece, or "unigram", or "huggingface" for the library tokenizers
    superwords: int = 0
    kind: str = ""
    longest: int = LONGEST_PIECE
    split_digits: bool = True
    cross_whitespace: bool = False  # split_by_whitespace=false: all merges in one stage
    lines: int | None = None  # train on the first lines alone


VARIANTS = {
    "words": Variant(),
    "digits": Variant(split_digits=False),
    "unigram": Variant(trainer="unigram"),
    "huggingface": Variant(trainer="huggingface"),
    "one_stage": Variant(cross_whitespace=True, lines=ONE_STAGE_LINES),
    **{f"superwords_{kind}": Variant(superwords=1024, kind=kind) for kind in KINDS},
    "superwords_words_2048": Variant(superwords=2048, kind=WORDS),
    "superwords_operators_512": Variant(superwords=512, kind=OPERATORS),
    "superwords_operators_2048": Variant(superwords=2048, kind=OPERATORS),
    "superwords_operators_3072": Variant(superwords=3072, kind=OPERATORS),
    "superwords_operators_24": Variant(superwords=1024, kind=OPERATORS, longest=24),
    "superwords_text_digits": Variant(superwords=1024, kind=TEXT, split_digits=False),
    **{
        f"superwords_words_{count}_digits": Variant(superwords=count, kind=WORDS, split_digits=False)
        for count in (32, 128)
    },
    **{f"words_{entries}": Variant(entries) for entries in (12288, 16384, 24576)},
    **{
        f"superwords_operators_of_{entries}": Variant(entries, superwords=entries // 8, kind=OPERATORS)
        for entries in (12288, 16384, 24576)
    },
}


# === TRAINERS ===


def train_huggingface(lines: Iterable[str], path: Path, variant: Variant) -> None:
    """BPE of the library `tokenizers` on words, as a SentencePiece model: pieces are ranked by their merges,
    characters and everything else are those of a small model that SentencePiece trains.
    """
    from tokenizers import Tokenizer, models, trainers

    lines = list(lines)
    small = train_tokenizer(lines, path.with_suffix(""), 1000, TRANSFORMS[TRANSFORM].operators)
    processor, model = load_model(small)
    normal = type(model.pieces[0]).NORMAL
    letters = [piece for piece in model.pieces if piece.type == normal and len(piece.piece) == 1]
    known = {piece.piece for piece in letters}
    words: Counter[str] = Counter()
    for line in lines:
        for word in processor.normalize(line).replace(PIECE_OF_SPACE, " " + PIECE_OF_SPACE).split(" "):
            words.update(_runs(word, known))
    tokenizer = Tokenizer(models.BPE())
    others = [piece for piece in model.pieces if piece.type != normal]
    trainer = trainers.BpeTrainer(
        vocab_size=variant.entries - len(others),
        show_progress=False,
        initial_alphabet=sorted(known),
        limit_alphabet=len(known),
        max_token_length=LONGEST_PIECE,
    )
    tokenizer.train_from_iterator(
        (word for word, count in words.items() for _ in range(count)), trainer, length=words.total()
    )
    merged = [first + second for first, second in json.loads(tokenizer.to_str())["model"]["merges"]]
    pieces = list(dict.fromkeys(merged))
    del model.pieces[:]
    model.pieces.extend(others)
    for rank, text in enumerate([*pieces, *sorted(known)]):
        model.pieces.add(piece=text, score=-rank, type=normal)
    path.write_bytes(model.SerializeToString(deterministic=True))


def _runs(word: str, known: set[str]) -> Iterator[str]:
    """The parts of a word that one piece may hold: letters, or one other character; a space leads either."""
    run = ""
    for letter in word:
        alike = letter.isalpha() and run.removeprefix(PIECE_OF_SPACE).isalpha()
        if run and (letter not in known or not (alike or run == PIECE_OF_SPACE)):
            yield run
            run = ""
        run = run + letter if letter in known else ""
    if run:
        yield run


def make_model(variant: Variant, training: list[str], path: Path) -> None:
    """Train the tokenizer of a variant into `path`."""
    encode, _, operators, _ = TRANSFORMS[TRANSFORM]
    lines = islice(lines_of(training, encode), variant.lines)
    if variant.trainer == "huggingface":
        train_huggingface(lines, path, variant)
    elif variant.trainer != "bpe" or variant.cross_whitespace:
        train_tokenizer(
            lines,
            path.with_suffix(""),
            variant.entries,
            operators,
            split_digits=variant.split_digits,
            model_type=variant.trainer,
            split_by_whitespace=not variant.cross_whitespace,
        )
    else:
        train_with_superwords(
            lines,
            path.with_suffix(""),
            variant.entries,
            operators,
            variant.superwords,
            variant.kind,
            variant.split_digits,
            variant.longest,
        )


# === MEASURE ===


def processor_seconds() -> float:
    """Seconds of processor time that this process has used."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def measure(variant: Variant, training: list[str], held_out: list[str], path: Path) -> dict:
    """The figures of a tokenizer, which is trained unless `path` holds it."""
    began = processor_seconds()
    if not path.exists():
        unfinished = path.with_name(f"unfinished_{path.name}")
        make_model(variant, training, unfinished)
        unfinished.replace(path)
    trained = processor_seconds() - began
    tokenizer = FastTokenizer(path)
    codes = [TRANSFORMS[TRANSFORM].encode(text) for text in held_out]
    ids, counts = tokenizer.encode_batch(codes)
    processor, place, lossless, uncounted = tokenizer.processor, 0, True, 0
    for text, code, count in zip(held_out, codes, counts.tolist(), strict=True):
        of_text, _, dropped = encode_with_bytes(processor, TRANSFORM, text)  # CountError if it miscounts
        here = ids[place : place + count]
        place += count
        uncounted += dropped
        normalised = processor.normalize(code).replace(PIECE_OF_SPACE, " ")
        lossless &= bool((here == of_text).all()) and processor.decode(here.tolist()) == normalised
    return {
        "entries": tokenizer.vocab_size,
        "tokens": len(ids),
        "tokens_per_byte": round(len(ids) / size(held_out), 5),
        "lower_operators": sum(code.count(LOWER) for code in codes),
        "lossless": lossless,
        "uncounted_bytes": uncounted,
        "word_table": not tokenizer.refused,
        "training_processor_seconds": round(trained, 1),
    }


def mini_variant(variant: Variant) -> Variant:
    """The same kind of tokenizer at the size of the mini contest's model."""
    return replace(
        variant, entries=variant.entries // MINI_SHARE, superwords=variant.superwords // MINI_SHARE
    )


def write_documents(path: Path, texts: list[str], megabytes: float) -> Path:
    """The first texts, so many MB or less, as JSON lines."""
    with open(path, "w", encoding="utf-8") as file:
        left = megabytes * 1e6
        for text in texts:
            left -= len(text.encode())
            if left < 0:
                break
            file.write(json.dumps({"text": text}) + "\n")
    return path


def mini_dataset(training: list[str], held_out: list[str], tokenizer: Path, work: Path) -> Path:
    """The dataset of a tokenizer for the mini contest; a finished one is used again."""
    folder = work / f"data_{tokenizer.stem}"
    if not (folder / MANIFEST).exists():
        documents = write_documents(work / "training.jsonl", training, MINI_TRAINING_MB)
        validation = write_documents(work / "validation.jsonl", held_out, MINI_VALIDATION_MB)
        prepare.prepare(
            prepare.Settings(
                [documents], folder, transform=TRANSFORM, tokenizer=tokenizer, val=[validation], workers=1
            )
        )
    return folder


def bits_per_byte(folder: Path, entries: int, seed: int, operations: float, work: Path) -> float:
    """Bits per byte of the unquantised model of the mini contest, trained at so many operations."""
    name = f"{folder.name}-{operations / 1e9:.0f}G-seed{seed}"
    own = {
        "SEED": str(seed),
        "DATASETS_DIR": str(folder),
        "VOCAB_SIZE": str(entries),
        "TRAIN_OPERATIONS": f"{operations:g}",
        "TTT_ENABLED": "0",
    }
    return train(work / "runs", name, recipes.read(MINI) | own)["bpb"]["prequant"]


def document_flag(held_out: list[str]) -> dict:
    """What a flag for documents without a capital would save: LOWER at all their sentences but one."""
    codes = [TRANSFORMS[TRANSFORM].encode(text) for text in held_out if text == text.lower()]
    saved = sum(max(0, code.count(LOWER) - 1) for code in codes)
    return {"documents_without_capitals": len(codes), "tokens_a_document_flag_saves": saved}


def known_figures(path: Path, settings: dict) -> dict:
    """The figures that an earlier run has left for the same settings, or none."""
    try:
        found = read_json_object(path)
    except (OSError, ValueError):
        return {}
    return found if found.get("settings") == settings else {}


def row(name: str, figures: dict) -> str:
    """One line of the table."""
    bits = figures.get("bpb", {})
    score = f"{statistics.mean(bits.values()):.4f} ({len(bits)})" if bits else "not measured"
    return (
        f"{name:<34}{figures['entries']:>8,}{figures['tokens']:>11,}{figures['tokens_per_byte']:>9.5f}"
        f"{'yes' if figures['lossless'] else 'NO':>9}{'yes' if figures['word_table'] else 'no':>6}"
        f"{figures['training_processor_seconds']:>8.1f}  {score}"
    )


def run_all(options: argparse.Namespace, work: Path) -> dict:
    """Print the table of all wanted variants and give their figures."""
    if SHARED.is_dir():
        training, held_out = table_texts(QUICK_MB if options.quick else options.mb)
    else:
        print(f"{SHARED}: no such folder; the embedded corpus is measured instead")
        training, held_out = embedded_texts()
    text = {"training": checksum({"texts": training}), "held_out": checksum({"texts": held_out})}
    print(f"trained on {size(training) / 1e6:.1f} MB, counted on {size(held_out) / 1e6:.2f} MB of other text")
    print(
        f"{'tokenizer':<34}{'entries':>8}{'tokens':>11}{'per byte':>9}{'lossless':>9}{'table':>6}{'CPU s':>8}"
        "  BPB (seeds)"
    )
    figures = {}
    for name in options.only or VARIANTS:
        variant = mini_variant(VARIANTS[name]) if options.mini else VARIANTS[name]
        if variant.trainer == "huggingface" and importlib.util.find_spec("tokenizers") is None:
            print(f"{name:<34} the library tokenizers is not installed")
            continue
        settings = asdict(variant) | text
        path = work / f"{name}_{checksum(settings)[:8]}"
        record, model = path.with_suffix(".json"), path.with_suffix(".model")
        found = known_figures(record, settings) or measure(variant, training, held_out, model)
        if options.mini:
            folder, bits = mini_dataset(training, held_out, model, work), {}
            for seed in options.seeds:
                bits[str(seed)] = bits_per_byte(folder, found["entries"], seed, options.operations, work)
            found |= {"bpb": bits, "operations": options.operations}
        write_json(record, found | {"settings": settings})
        figures[name] = found
        print(row(name, found), flush=True)
    return figures | {"document_flag": document_flag(held_out)}


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="folder for what is made, kept; default: a temporary one")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, help="of these tokenizers alone")
    parser.add_argument("--mb", type=float, default=TRAINING_MB, help="training text (default %(default)s)")
    parser.add_argument("--mini", action="store_true", help="a quarter of the entries, and the mini contest")
    parser.add_argument(
        "--operations",
        type=float,
        default=float(recipes.read(MINI)["TRAIN_OPERATIONS"]),
        help="of the training of its models (default: that of the mini contest, %(default)g)",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1], help="of its models (default %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_MB} MB of training text beside the web")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        figures = run_all(options, work)
    print(f"{time.monotonic() - began:.0f} s")
    print("RESULT " + json.dumps(figures))
    return 0 if all(found.get("lossless", True) for found in figures.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
