"""The card of a dataset: what it holds, what it was made of and what is proved of it.

data/prepare.py writes `card.md`, and verify_bytes.py --card again with the proof, whose report is
`proof.json` beside it, bound to the manifest that it is about. On the hub the card is README.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from data.shards import checksum, read_json_object, sha256_file, write_json, write_text

CARD, PROOF, MANIFEST = "card.md", "proof.json", "manifest.json"
FORMAT, PROOF_FORMAT = "parameter-golf-dataset/1", "parameter-golf-proof/1"
# What a report must say for others to rely on it; the rest of it is about one machine.
REPORTED = ("verdict", "proved", "not_proved", "counts", "overlap", "documents")
OVERLAP = {
    "equal": "training documents equal to a validation document",
    "same_opening": "training documents with the opening of one",
    "found_inside": "validation documents inside training text",
    "share_a_passage": "validation documents that share a passage with it",
}


class ProofError(ValueError):
    """A dataset that is not proved; the message is one line with the remedy."""


def write_proof(folder: Path, report: dict) -> None:
    """Write what verify_bytes.py found of the manifest in `folder`, and the card with it."""
    proof = {"format": PROOF_FORMAT, "manifest_sha256": sha256_file(folder / MANIFEST)}
    proof |= {name: report[name] for name in REPORTED if name in report}
    proof["checksum"] = checksum(proof)
    write_json(folder / PROOF, proof)
    write_card(folder, read_json_object(folder / MANIFEST), proof)


def read_proof(folder: Path) -> dict:
    """The proof of the manifest in `folder`; ProofError if there is none, or one of something else."""
    remedy = f"./verify_bytes.py {folder} --card makes one"
    try:
        proof = read_json_object(folder / PROOF)
    except FileNotFoundError:
        raise ProofError(f"{folder}: has no {PROOF}; {remedy}") from None
    except (OSError, ValueError) as error:
        raise ProofError(f"{folder / PROOF}: cannot be read ({error}); {remedy}") from None
    if proof.get("format") != PROOF_FORMAT or proof.get("checksum") != checksum(proof):
        raise ProofError(f"{folder / PROOF}: was changed, or is of another format; {remedy}")
    if proof.get("manifest_sha256") != sha256_file(folder / MANIFEST):
        raise ProofError(f"{folder / PROOF}: is about another {MANIFEST}; {remedy}")
    if proof.get("verdict") != "proved":
        raise ProofError(f"{folder / PROOF}: says {proof.get('verdict')!r}; make the dataset again")
    return proof


def changed_or_foreign(manifest: dict) -> str:
    """Why nothing in a manifest can be relied on; empty if it is as one of the builders wrote it."""
    from verify_bytes import manifest_problem  # not at the top: it imports this module

    if manifest.get("format") != FORMAT:
        return "is of another format"
    if manifest.get("checksum") != checksum(manifest):
        return "was changed after it was written"
    return manifest_problem(manifest)


def write_card(folder: Path, manifest: dict, proof: dict | None = None) -> None:
    """Write the card of a dataset into its folder."""
    write_text(folder / CARD, card(manifest, proof))


def card(manifest: dict, proof: dict | None = None) -> str:
    """The card of the dataset that `manifest` describes, as Markdown with the front matter of the hub."""
    name = str(manifest.get("name") or "dataset")
    quoted = json.dumps(name, ensure_ascii=False)
    head = f"---\npretty_name: {quoted}\ntags:\n- parameter-golf\n---\n\n# {name}\n"
    parts = [head, _summary(manifest), _splits(manifest), _tokenizer(manifest), _proof(proof)]
    parts += [_sources(manifest), _files(manifest)]
    return "\n".join(part for part in parts if part)


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else "–"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _summary(manifest: dict) -> str:
    lossless = "lossless" if manifest.get("lossless") else "lossy"
    standard = manifest.get("validation", {}).get("standard")
    lines = [f"Token shards for Parameter Golf; text transform `{manifest.get('transform')}` ({lossless})."]
    if standard is not None:
        lines.append(
            "The validation set is the contest's: the first 50,000 documents."
            if standard
            else "The validation set is **not** the contest's; scores on it compare with nothing published."
        )
    return "\n".join(lines) + "\n"


def _splits(manifest: dict) -> str:
    rows = []
    for split, title in (("val", "validation"), ("train", "training")):
        tokens, size = manifest.get(f"{split}_tokens"), manifest.get(f"{split}_bytes")
        ratio = f"{tokens / size:.5f}" if tokens and size else "–"
        rows.append((title, _number(manifest.get(f"docs_{split}")), _number(tokens), _number(size), ratio))
    text = _table(("split", "documents", "tokens", "bytes of text", "tokens per byte"), rows)
    left_out = manifest.get("left_out", {})
    if any(left_out.values()):
        text += (
            f"\nLeft out of training: {_number(left_out.get('same_text'))} documents equal to a validation "
            f"document, {_number(left_out.get('same_tokens'))} with equal tokens, "
            f"{_number(left_out.get('same_opening'))} with an equal opening.\n"
        )
    return text


def _tokenizer(manifest: dict) -> str:
    tokenizer = manifest.get("tokenizer", {})
    text = f"Tokenizer: {_number(tokenizer.get('vocab_size'))} entries, sha256 `{tokenizer.get('sha256')}`.\n"
    if manifest.get("val_sidecar"):
        counted = f"{_number(manifest.get('val_sidecar_bytes'))} bytes of validation text"
        return text + f"The sidecar says how many of the {counted} each token stands for.\n"
    if isinstance(manifest.get("val_lut_bytes"), int):
        text += f"The pieces credit {_number(manifest['val_lut_bytes'])} bytes of validation text.\n"
    return text


def _proof(proof: dict | None) -> str:
    if proof is None:
        return "## Proof\n\nNot proved yet: `./verify_bytes.py FOLDER --documents FILES --card` does.\n"
    overlap = proof.get("overlap", {})
    rows = [(text, _number(overlap.get(name))) for name, text in OVERLAP.items()]
    lines = [f"* proved: {text}" for text in proof["proved"]]
    lines += [f"* not proved: {text}" for text in proof["not_proved"]]
    text = f"## Proof\n\nOf the manifest with sha256 `{proof['manifest_sha256']}`:\n\n"
    text += "".join(f"{line}\n" for line in lines)
    return text + ("\n" + _table(("overlap of training and validation", "found"), rows) if overlap else "")


def _sources(manifest: dict) -> str:
    rows = [
        (
            f"`{facts['name']}`",
            facts["role"],
            _number(facts.get("records")),
            _number(facts["size"]),
            facts["sha256"],
        )
        for facts in manifest.get("recipe", {}).get("sources", [])
    ]
    if not rows:
        origin = manifest.get("source", {})
        return f"Source: `{origin['repository']}` at `{origin['commit']}`.\n" if origin else ""
    return "## Sources\n\n" + _table(("file", "role", "records", "bytes", "sha256"), rows)


def _files(manifest: dict) -> str:
    rows = [
        (f"`{name}`", _number(facts.get("tokens")), _number(facts["size"]), facts["sha256"])
        for name, facts in sorted(manifest.get("files", {}).items())
    ]
    return "## Files\n\n" + _table(("file", "tokens", "bytes", "sha256"), rows)
