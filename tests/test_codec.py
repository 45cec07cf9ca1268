"""codec.py: what goes in comes out, in as many bytes as the score says; whoever cheats cannot be decoded."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import codec
import compliance
import train_gpt as t
from data.shards import read_shard, write_shard
from helpers.run_folders import edit, original
from helpers.trainer import VALIDATION, launch, tiny_settings
from results import Run, Stop

SHORT = {"TTT_LORA_LR": 0.01, "TTT_BATCH_SIZE": 2, "TTT_CHUNK_SIZE": 8}
MODES = {
    "sliding": {"TTT_ENABLED": False, "LOADER": "packed"},
    "chunk_sgd": {"TTT_ENABLED": True, "TTT_MODE": "chunk_sgd", "TTT_CHUNK_TOKENS": 32, "TTT_LR": 0.05},
    "doc_lora": {"TTT_ENABLED": True, "TTT_MODE": "doc_lora", "CANONICAL_MASK": True, **SHORT},
    "mixture": {"TTT_ENABLED": True, "TTT_MODE": "mixture", "TTT_MIXTURE_RATES": "0,4", **SHORT},
}
TEXTS = {
    "one": b"the loss falls, the loss",
    "two": b"a bank, a bank",
    "three": "ein  Wort\n\u00fc".encode(),
}


@pytest.fixture(scope="session")
def finished(dataset, tmp_path_factory) -> Path:
    """A run that has scored four documents of a dozen tokens in sliding windows."""
    short = tmp_path_factory.mktemp("short")
    shutil.copy(dataset / "tokenizer.model", short)
    stream = read_shard(dataset / "fineweb_val_000000.bin")
    parts = [stream[first : first + 12] for first in np.flatnonzero(stream == t.BOS)[:4]]
    write_shard(short / "fineweb_val_000000.bin", np.concatenate(parts))
    source = original(dataset)
    changes = {"STAGE": "evaluate", "ARTIFACT": str(source / "final_model.ptz"), "TTT_ENABLED": "0"}
    done = launch(tiny_settings(short, short) | changes | {"RUN_ID": "run"})
    assert done.returncode == 0, done.stderr
    for name in ("final_model.ptz", codec.SCRIPT, "train.log"):
        shutil.copy(source / name, short / "run")
    return short / "run"


@pytest.fixture
def folder(finished, tmp_path, monkeypatch) -> Path:
    """A copy of that run, whose script is the one that is loaded already."""
    monkeypatch.setattr(codec, "load_trainer", lambda *given: t)
    return Path(shutil.copytree(finished, tmp_path / "run"))


def opened(folder: Path, mode: str) -> tuple[codec.Artifact, codec.TextCodec]:
    """The artifact of a run whose evaluation is set to a mode, and its tokenizer."""
    edit(folder / "config.json", lambda config: config.update(MODES[mode]))
    artifact = codec.open_artifact(folder / "final_model.ptz")
    return artifact, codec.load_texts(artifact)


def compressed(folder: Path, mode: str, contents: dict[str, bytes]) -> tuple[Path, codec.Coded]:
    """The container of some files, and how their tokens were coded."""
    artifact, text_codec = opened(folder, mode)
    parts = codec.tokenize_files(text_codec, contents)
    container, coded = codec.compress_files(artifact, text_codec, contents, parts, codec.CodingOptions())
    path = folder / "texts.golf"
    path.write_bytes(container)
    return path, coded


# === CODER AND WAVEFRONTS ===


def test_the_coder_takes_as_many_bytes_as_the_probabilities_say():
    random = np.random.default_rng(0)
    log_p = np.log(random.dirichlet(np.full(300, 0.03), 2000) + 1e-30)
    log_p[:9] = np.log(1e-30)  # of nothing but one token
    log_p[:9, 5] = 0
    tables = [codec.quantise_distribution(row) for row in log_p]
    assert all(counts.sum() == 1 << codec.COUNT_BITS and counts.min() >= 1 for counts in tables)
    tokens = [int(random.choice(300, p=counts / counts.sum())) for counts in tables]
    tokens[:3] = [299, 5, 0]  # at the price of the rarest
    encoder = codec.constriction.stream.queue.RangeEncoder()
    for counts, token in zip(tables, tokens, strict=True):
        encoder.encode(token, codec.entropy_model(counts))
    stream = encoder.get_compressed().astype("<u4").tobytes()
    decoder = codec.open_stream(stream)
    assert [codec.decode_token(decoder, codec.entropy_model(counts)) for counts in tables] == tokens
    assert decoder.maybe_exhausted()
    shares = [counts[token] / counts.sum() for counts, token in zip(tables, tokens, strict=True)]
    assert 0 <= len(stream) + np.log2(shares).sum() / 8 <= codec.WORD_BYTES + 1
    with pytest.raises(Stop, match="not a number"):
        codec.quantise_distribution(np.full(4, np.nan))
    with pytest.raises(Stop, match="does not fit"):
        codec.decode_token(codec.open_stream(b"\xff" * 8), codec.entropy_model(tables[0]))


@pytest.mark.parametrize("size", [300, 65536])
def test_the_library_codes_with_exactly_our_counts(size):
    """Its interval is (2^64 - 1) // 2^24 of each count; another version that rounds otherwise fails here."""
    log_p = np.log(np.random.default_rng(1).dirichlet(np.full(size, 0.02)) + 1e-30)
    counts = codec.quantise_distribution(log_p)
    before = counts.cumsum() - counts
    for token in (0, size // 2, int(counts.argmax()), size - 1):
        encoder = codec.constriction.stream.queue.RangeEncoder()
        encoder.encode(token, codec.entropy_model(counts))
        low, span = (
            int(part) * ((1 << 64) - 1 >> codec.COUNT_BITS) for part in (before[token], counts[token])
        )
        while span < 1 << 32:
            low, span = low << 32 & (1 << 64) - 1, span << 32
        assert encoder.pos()[1] == (low, span)


def test_windows_that_overlap_wait_for_each_other_and_documents_do_not():
    def order(first, count, scored, side=()):
        known = np.zeros(12, bool)
        known[0] = True
        mask = np.isin(np.arange(12), side)
        found = codec.plan_wavefronts(np.array(first), np.array(count), np.array(scored, bool), known, mask)
        parts = [(wavefront.side, [target[0] for target in wavefront.targets]) for wavefront in found]
        return [part for part in parts if any(part)]

    overlapping = [[1, 1, 1, 0], [0, 0, 1, 1]]
    assert order([1, 2], [3, 4], overlapping) == [([], [1]), ([], [2]), ([], [3]), ([], [4]), ([], [5])]
    assert order([1, 2], [3, 4], overlapping, side=[2, 5]) == [([], [1]), ([2], [3]), ([], [4]), ([5], [])]
    assert order([1, 7], [2, 2], [[1, 1], [1, 1]]) == [([], [1, 7]), ([], [2, 8])]
    with pytest.raises(Stop, match="target 2 is read before it is scored"):
        order([1], [3], [[1, 0, 1]])


# === FILES ===


@pytest.mark.parametrize("mode", MODES)
def test_files_come_back_from_as_many_bytes_as_the_score_says(folder, mode):
    path, coded = compressed(folder, mode, TEXTS)
    artifact, text_codec = opened(folder, mode)
    assert codec.decompress_files(artifact, text_codec, path) == TEXTS
    recorded = coded.recorded.sum() / np.log(2) / 8
    assert len(coded.stream) <= 1.001 * recorded + codec.WORD_BYTES + 1
    # A share is a whole number of 2^24ths, and of these none goes below 1.
    share = np.exp(-coded.recorded)
    assert (np.abs(np.exp(-coded.nats) - share) <= 2 / (1 << codec.COUNT_BITS) + 2e-4 * share).all()


def test_any_bytes_come_back(folder):
    _, text_codec = opened(folder, "sliding")
    contents = {
        "empty": b"",
        "binary": bytes(range(256)) * 3,
        "latin": ("Gr\u00fc\u00dfe " + " ".join(VALIDATION[:3])).encode("latin-1"),
        "operators": "a \ue001b \ue004 \u2581 \ufb01".encode(),
        "spaces": b"def f():\n    return  1\r\n",
        "only spaces": b" \n\n ",
    }
    parts = codec.tokenize_files(text_codec, contents)
    kinds = {name: part.kind for name, part in parts.items()}
    assert kinds["empty"] == kinds["binary"] == "raw" and kinds["spaces"] == "spaces"
    assert kinds["latin"] == "delta"
    assert {name: text_codec.restore(part) for name, part in parts.items()} == contents


def test_what_cannot_be_decoded_is_one_line(folder, tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(TEXTS["two"])
    (tmp_path / "none").write_bytes(b"")
    artifact = str(folder / "final_model.ptz")
    container = tmp_path / "a.golf"
    words = ["compress", artifact, str(tmp_path / "a.txt"), str(tmp_path / "none"), "-o", str(container)]
    codec.main([*words, "--stage", "quantized", "--threads", "1"])
    assert "14 bytes in 2 files" in capsys.readouterr().out
    whole = container.read_bytes()

    def stops(match: str, data: bytes = whole) -> None:
        container.write_bytes(data)
        with pytest.raises(SystemExit, match=match) as stop:
            codec.main(["decompress", artifact, str(container), "-o", str(tmp_path / "out")])
        assert "\n" not in str(stop.value) and not (tmp_path / "out").exists()

    for place in (0, 9, 20, 40, 60, len(whole) - 1):
        stops("texts?|byte|made", whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    stops("truncated", whole[:-1])
    stops("not made by codec.py", b"")
    other = bytearray(whole)
    other[codec.CHECKED_FROM] ^= 1  # of the artifact's hash
    other[16 : codec.CHECKED_FROM] = hashlib.sha256(other[codec.CHECKED_FROM :]).digest()[
        : codec.DIGEST_BYTES
    ]
    stops("give the artifact that it was made with", bytes(other))
    edit(folder / "config.json", lambda config: config.update(LOGIT_SOFTCAP=29.0))
    stops("config.json: the settings are not those")
    edit(folder / "config.json", lambda config: config.update(LOGIT_SOFTCAP=30.0))
    codec.main(["decompress", artifact, str(container), "-o", str(tmp_path / "out")])
    assert (tmp_path / "out" / "a.txt").read_bytes() == TEXTS["two"]
    with pytest.raises(SystemExit, match="is there already"):
        codec.main(["decompress", artifact, str(container), "-o", str(tmp_path / "out")])


WRONG_USES = {
    "decompress lacking.ptz a.golf": "lacking.ptz: no such file; give the final_model.ptz of a finished run",
    "decompress ARTIFACT lacking.golf": "lacking.golf: no such file; give a file",
    "decompress ARTIFACT ARTIFACT -o ARTIFACT": "-o .*final_model.ptz: not a folder; give the folder",
    "compress ARTIFACT . -o a.golf": "a folder; give a file",
    "compress ARTIFACT ARTIFACT -o lacking/a.golf": "-o lacking/a.golf: there is no folder lacking; give",
    "compress ARTIFACT ARTIFACT -o a.golf --threads 0": "--threads 0: give a number from 1 to 1024",
    "sample ARTIFACT --tokenizer ARTIFACT": "final_model.ptz: not a SentencePiece model of 320 entries; give",
    "sample ARTIFACT --tokenizer lacking.model": "lacking.model: no such file; give the tokenizer of the run",
    "sample ARTIFACT --prompt caf\udce9": r"--prompt 'caf\\udce9': not UTF-8; give text in UTF-8",
    "sample ARTIFACT --top-p 0": "--top-p 0.0: give a number from 1e-06 to 1",
    "sample ARTIFACT --temperature nan": "--temperature nan: give a number from 0 to 100",
    "export ARTIFACT --to hf ARTIFACT": "final_model.ptz: is not an empty folder; give a new one",
}


def test_wrong_use_is_one_line(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for words, match in WRONG_USES.items():
        with pytest.raises(SystemExit, match=match) as stop:
            codec.main(words.replace("ARTIFACT", str(folder / "final_model.ptz")).split())
        assert "\n" not in str(stop.value)
    assert not (folder / "a.golf").exists()


# === PROOF BY DECODING ===


def proved(folder: Path, mode: str, monkeypatch: pytest.MonkeyPatch, count: int = 2) -> dict[str, str]:
    """The probes that do not hold, with their evidence; what would be a fresh process is this one."""

    def decode_alone(run, tokenizer, container, place):
        path = folder / "proof.golf"
        path.write_bytes(container)
        artifact = codec.open_artifact(folder / "final_model.ptz")
        try:
            return codec.decompress_files(artifact, codec.load_texts(artifact, tokenizer), path), ""
        except SystemExit as stop:
            return {}, str(stop)

    monkeypatch.setattr(compliance, "decode_alone", decode_alone)
    edit(folder / "config.json", lambda config: config.update(MODES[mode]))
    run = Run.read(folder)
    data = t.Dataset(compliance.config_of(t, run), need_training=False)
    report = compliance.Report(folder)
    compliance.probe_decode(report, run, t, data, count, folder)
    return {row.probe: row.evidence for row in report.rows if not row.holds}


def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The documents are scored by themselves, and may cost a byte more each than is recorded."""
    monkeypatch.setattr(compliance, "WHOLE_WORK", {"cpu": 0, "cuda": 0})
    monkeypatch.setattr(compliance, "EXCESS_BYTES", 1 + compliance.LENGTH_BYTES)


def test_documents_are_decoded_from_as_many_bytes_as_were_recorded(folder, monkeypatch):
    """Within the whole validation set, whose other documents are side information; a word for the two."""
    monkeypatch.setitem(MODES, "plain", {"TTT_ENABLED": False})
    monkeypatch.setattr(compliance, "EXCESS_BYTES", codec.WORD_BYTES / 2 + compliance.LENGTH_BYTES)
    assert proved(folder, "plain", monkeypatch) == {}
    with np.load(folder / "documents.npz") as arrays:
        content = {name: arrays[name] for name in arrays.files}
    wrong = {"bytes": content["bytes"] + 1, "nats": content["nats"] * 0.8}
    np.savez(folder / "documents.npz", **content | wrong)
    assert proved(folder, "plain", monkeypatch).keys() == {"code length", "bytes of the text"}


def test_a_copy_that_has_seen_its_target_cannot_be_decoded(folder, monkeypatch):
    def find(copies, *where):
        for first, end in where[0] if len(where) == 1 else [where]:
            copies.tokens[0, first + 1 : end] = copies.text[first + 1 : end]
            copies.lengths[0, first + 1 : end] = 32

    monkeypatch.setattr(t.Copies, "find", find)
    alone(monkeypatch)
    assert "text from the code" in proved(folder, "mixture", monkeypatch)


def test_a_mixture_that_does_not_sum_to_one_needs_more_bytes_than_recorded(folder, monkeypatch):
    real = t.softcapped_ce_reference

    def too_good(logits, targets, cap):
        return -torch.log((-real(logits, targets, cap)).exp() + 0.05)

    monkeypatch.setattr(t, "softcapped_ce_reference", too_good)
    alone(monkeypatch)
    assert "code length" in proved(folder, "sliding", monkeypatch)


def test_what_is_scored_after_it_was_learnt_needs_more_bytes_than_recorded(folder, monkeypatch):
    def learn_first(run, model, forward, tally):
        optimizer = torch.optim.SGD(model.parameters())
        learner = t.Learner(run, model, optimizer, 1.0, 32)
        learner.learn(tally.validation.tokens, 0, 32, 0.5, 8)
        t.score_sliding(run, forward, run.config.eval_stride, tally)

    monkeypatch.setattr(t, "chunk_sgd", learn_first)
    alone(monkeypatch)
    assert "code length" in proved(folder, "chunk_sgd", monkeypatch, 4)


def test_a_look_at_the_next_token_is_caught_by_the_decoder(folder, monkeypatch):
    real = t.attend_sdpa

    def both_ways(q, k, v, starts, longest):
        y = real(q, k, v, starts, longest)
        return y + 0.1 * torch.nn.functional.pad(y[:, 1:], (0, 0, 0, 0, 0, 1))

    monkeypatch.setattr(t, "pick_attention", lambda config, run: both_ways)
    alone(monkeypatch)
    assert "text from the code" in proved(folder, "sliding", monkeypatch)


# === SAMPLE AND EXPORT ===


def test_kept_keys_give_the_distributions_of_a_window_and_a_seed_its_text(folder):
    artifact, text_codec = opened(folder, "sliding")
    config = codec.coding_config(artifact, {"TTT_ENABLED": False})
    generator = codec.TextGenerator(artifact, config, text_codec.path, config.eval_seq_len)
    tokens = text_codec.encode("the loss falls with every step")
    rows = torch.tensor([[t.BOS, *tokens.tolist()]])
    with torch.no_grad(), codec.capture_logits(t, generator.model) as captured:
        generator.model(t.Batch(rows, rows))
    window = captured.log_softmax(captured.logits)
    kept = torch.stack([generator.next_log_p(token) for token in rows[0].tolist()])
    assert (kept - window).abs().max() < 1e-4

    def text(seed: int, stop: str = "", most: int = 6) -> str:
        parts: list[str] = []
        generated = generator.generate(tokens, codec.Sampling(1.0, 0.9), seed)
        codec.stream_text(text_codec, tokens, generated, most, stop, parts.append)
        return "".join(parts)

    first = text(1)
    assert first == text(1) != text(2)
    assert text(1, stop=first[3:5]) == first[: first.index(first[3:5])]
    assert codec.choose_token(torch.tensor([0.1, 0.7, 0.2]).log(), codec.Sampling(0, 1), None) == 1


def stand_in_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its base classes, and nothing that they do."""

    class Base(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config

        def post_init(self):
            pass

    class PretrainedConfig:
        def __init__(self, **others):
            vars(self).update(others)

    parts = {
        "transformers": {"PretrainedConfig": PretrainedConfig, "PreTrainedModel": Base},
        "transformers.generation": {"GenerationMixin": object},
        "transformers.modeling_outputs": {"CausalLMOutput": types.SimpleNamespace},
    }
    for name, content in parts.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


def test_the_export_has_the_logits_of_the_artifact(folder, tmp_path, monkeypatch):
    stand_in_transformers(monkeypatch)
    (folder / codec.SCRIPT).write_text(Path(t.__file__).read_text())
    artifact, text_codec = opened(folder, "sliding")
    out = tmp_path / "exported"
    codec.main(["export", str(artifact.path), "--to", "hf", str(out)])
    source = (out / "golf_trainer.py").read_text()
    assert source.replace("__name__.replace('.', '_')", "__name__") == Path(t.__file__).read_text() != source
    with pytest.raises(SystemExit, match="is not an empty folder"):
        codec.main(["export", str(artifact.path), "--to", "hf", str(out)])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "exported.golf_trainer", t)  # the same, and loaded already
    modeling = importlib.import_module("exported.modeling_golf")
    facts = json.loads((out / "config.json").read_text())
    model = modeling.GolfForCausalLM(modeling.GolfConfig(**facts))
    model.load_state_dict(safetensors.torch.load_file(out / "model.safetensors"))

    config = codec.coding_config(artifact, {"TTT_ENABLED": False})
    generator = codec.TextGenerator(artifact, config, text_codec.path, config.eval_seq_len)
    rows = torch.arange(2, 34)[None]
    with torch.no_grad(), codec.capture_logits(t, generator.model) as captured:
        losses = generator.model(t.Batch(rows[:, :-1], rows[:, 1:]))
        ours = model(rows, labels=rows)
    theirs = captured.cap * torch.tanh(captured.logits / captured.cap)
    assert (ours.logits[0, :-1] - theirs).abs().max() < 1e-4
    assert ours.loss.item() == pytest.approx(losses.mean().item(), abs=1e-4)
    card = (out / "README.md").read_text()
    assert f"{artifact.run.summary['val_bpb']}" in card and "AutoModelForCausalLM" in card
