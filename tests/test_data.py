"""Shards, loaders and byte accounting."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_gpt as t
from data.shards import BOS, train_tokenizer, write_shard
from helpers.trainer import VALIDATION, replace, sentences


def damaged(path, **change):
    """Change one property of the shard at `path`."""
    data = bytearray(path.read_bytes())
    for word, name in enumerate(("magic", "version", "count")):
        if name in change:
            data[4 * word : 4 * word + 4] = np.int32(change[name]).tobytes()
    path.write_bytes(bytes(data[: change.get("size", len(data))]))


@pytest.mark.parametrize(
    "change",
    [{"magic": 1}, {"version": 2}, {"count": 7}, {"count": -1}, {"size": 5000}, {"size": 100}, {"size": 0}],
)
def test_a_damaged_shard_is_refused_by_name(dataset, tmp_path, change):
    path = tmp_path / "fineweb_train_000000.bin"
    shutil.copy(dataset / path.name, path)
    assert len(t.read_shard(path)) > 1000
    damaged(path, **change)
    with pytest.raises(t.Stop, match=r"fineweb_train_000000.bin: .*prepare or download"):
        t.read_shard(path)


def test_an_empty_folder_a_wrong_vocabulary_and_a_wrong_tokenizer_are_refused(config, dataset, tmp_path):
    with pytest.raises(t.Stop, match="DATASETS_DIR=.*no fineweb_val"):
        t.Dataset(replace(config, datasets_dir=str(tmp_path)))
    with pytest.raises(t.Stop, match=r"VOCAB_SIZE=8192: .*set VOCAB_SIZE=\d+"):
        t.Dataset(replace(config, vocab_size=8192))
    (tmp_path / "x.model").write_text("not a model")
    for path, words in (
        (tmp_path / "x.model", "not a SentencePiece model"),
        (tmp_path / "y.model", "no such file"),
    ):
        with pytest.raises(t.Stop, match=f"TOKENIZER_PATH=.*{words}"):
            t.Dataset(replace(config, tokenizer_path=str(path)))


def test_ids_outside_the_vocabulary_and_a_broken_manifest_are_refused(config, dataset, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(dataset, folder)
    write_shard(folder / "fineweb_val_000000.bin", np.array([BOS, 60_000], dtype="<u2"))
    changed = replace(config, datasets_dir=str(folder))
    with pytest.raises(t.Stop, match="holds token 60000"):
        t.load_validation(t.Dataset(changed))
    (folder / "manifest.json").write_text("{")
    with pytest.raises(t.Stop, match=r"manifest.json: cannot be read"):
        t.Dataset(changed)


def test_lut_bytes_are_the_bytes_of_the_text(config, dataset):
    data = t.Dataset(config)
    validation = t.load_validation(data)
    documents = np.split(validation.tokens, np.flatnonzero(validation.tokens == BOS)[1:])
    for text, tokens in zip(VALIDATION, documents, strict=True):
        assert data.pieces.decode(tokens[1:].tolist()) == text
    # No space is credited at the start of a document, and none is written there: the counts agree exactly.
    assert validation.source == "lut"
    assert validation.bytes.sum() == sum(len(text.encode()) for text in VALIDATION)


def test_the_fingerprint_reads_no_validation_token(config, dataset, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(dataset, folder)
    changed = replace(config, datasets_dir=str(folder))
    before = t.Dataset(changed).fingerprint["shards"]
    for name, same in (("val", True), ("train", False)):
        path = folder / f"fineweb_{name}_000000.bin"
        content = path.read_bytes()
        path.write_bytes(content[:1100] + bytes(value ^ 1 for value in content[1100:1200]) + content[1200:])
        assert (t.Dataset(changed).fingerprint["shards"] == before) is same


def test_a_sidecar_replaces_the_lut_and_must_cover_every_token(config, dataset, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(dataset, folder)
    count = len(t.read_shard(folder / "fineweb_val_000000.bin"))
    changed = replace(config, datasets_dir=str(folder))
    write_shard(folder / "fineweb_val_bytes_000000.bin", np.full(count, 3, dtype="<u2"))
    validation = t.load_validation(t.Dataset(changed))
    assert validation.source == "byte_sidecar" and validation.bytes.sum() == 3 * count
    assert len(validation.tokens) == count  # the sidecar is not taken for a validation shard
    write_shard(folder / "fineweb_val_bytes_000000.bin", np.full(count - 1, 3, dtype="<u2"))
    with pytest.raises(t.Stop, match=r"fineweb_val_bytes_000000.bin: the byte sidecar has"):
        t.load_validation(t.Dataset(changed))


def test_case_operators_without_a_sidecar_are_refused(config, dataset, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(dataset, folder)
    train_tokenizer(sentences(500, 0), folder / "tokenizer", 330, ["\ue001", "\ue002"])
    changed = replace(config, datasets_dir=str(folder))
    with pytest.raises(t.Stop) as stop:
        t.Dataset(changed)
    size = int(str(stop.value).split("set VOCAB_SIZE=")[1].split()[0])
    with pytest.raises(t.Stop, match=r"case operators \(ids \[4, 5\].*sidecar"):
        t.load_validation(t.Dataset(replace(changed, vocab_size=size)))


@pytest.mark.parametrize("files", [1, 2, 3, 8, 11])
def test_shuffled_streams_share_no_window_and_cover_an_epoch(config, files):
    length = config.train_seq_len
    data = t.Dataset(config)
    data.train = [np.arange(length * 50, dtype="<u2") for _ in range(files)]
    data.check_ids = lambda tokens, where: tokens
    loader = t.ShuffledLoader(config, data)
    seen, firsts = set(), set()
    for stream in range(t.STREAMS):
        windows = loader.window_order(stream, 0)
        firsts.add(tuple(windows[0]))
        for file, start in windows.tolist():
            assert start + length + 1 <= len(data.train[file])
            seen.add((file, start // length))
    # Every file's windows are dealt out completely (49 per file: one is lost to the random phase).
    assert len(seen) == 49 * files and len(firsts) == t.STREAMS


def test_shuffled_batches_do_not_depend_on_the_ones_before(config):
    data = t.Dataset(config)
    there = t.ShuffledLoader(config, data)
    batches = [there.get(step, 3) for step in range(200)]  # more than an epoch of this stream
    again = t.ShuffledLoader(config, data)
    for step in (199, 0, 57):
        assert torch.equal(again.get(step, 3).inputs, batches[step].inputs)
    inputs, targets, *_ = batches[0]
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_packed_batches_are_consecutive_and_segments_are_documents(config):
    packed = replace(config, loader="packed", train_seq_len=16)
    data = t.Dataset(packed)
    loader, width = t.PackedLoader(packed, data), packed.train_batch_tokens // t.STREAMS
    for step, stream in ((0, 0), (0, 1), (5, 7), (int(loader.ends[-1]) + 2, 3)):
        batch = loader.get(step, stream)
        row = batch.inputs[0].numpy()
        assert batch.inputs.shape == (1, width) and torch.equal(batch.inputs[0, 1:], batch.targets[0, :-1])
        assert len(batch.starts) % 64 == 0 and batch.starts[-1] == width
        starts = np.unique(batch.starts.numpy())
        assert set(np.flatnonzero(row == BOS)) <= set(starts.tolist()) and starts[0] == 0
        assert np.diff(starts).max() <= 16
        for a in starts[1:-1]:  # a segment starts at a document, or 16 tokens after the segment before it
            assert row[a] == BOS or a - 16 in starts
    first, second = loader.get(0, 0), loader.get(0, 1)
    assert data.train[0][first.inputs.shape[1] + 1] == second.inputs[0, 0]


def test_joined_micro_batches_hold_the_same_rows_and_segments(config):
    for loader_name in ("packed", "shuffled"):
        changed = replace(config, loader=loader_name, train_seq_len=16)
        loader = t.LOADERS[loader_name](changed, t.Dataset(changed))
        parts = [loader.get(2, stream) for stream in range(4)]
        whole = t.join_batches(parts)
        assert torch.equal(whole.targets.flatten(), torch.cat([p.targets.flatten() for p in parts]))
        if loader_name == "packed":
            width = parts[0].inputs.size(1)
            expected = [
                s + i * width for i, p in enumerate(parts) for s in torch.unique(p.starts)[:-1].tolist()
            ]
            assert torch.unique(whole.starts).tolist() == [*expected, 4 * width]


def test_too_little_data_is_refused(config):
    with pytest.raises(t.Stop, match="TRAIN_SEQ_LEN=8192"):
        big = replace(config, train_seq_len=8192, train_batch_tokens=65536, eval_seq_len=32)
        t.ShuffledLoader(big, t.Dataset(big))
    with pytest.raises(t.Stop, match="TRAIN_BATCH_TOKENS=800000"):
        big = replace(config, loader="packed", train_batch_tokens=800_000)
        t.PackedLoader(big, t.Dataset(big))


def test_the_feed_gives_every_rank_its_streams_of_the_same_step(config):
    def steps(world):
        out = []
        for rank in range(world):
            run = t.Run(replace(config, micro_batch_tokens=1))
            run.world_size, run.rank, run.streams = world, rank, range(rank, t.STREAMS, world)
            feed = t.Feed(run, t.ShuffledLoader(config, t.Dataset(config)))
            out += [row.tolist() for step in (0, 1) for batch in feed.get(step) for row in batch.inputs]
        return sorted(out)

    assert steps(1) == steps(2) == steps(8)


def test_a_space_inside_a_piece_is_one_byte():
    texts = ["<unk>", "<s>", "\u2581", "\u2581of\u2581the", "a\u2581b", "\u2581\u2581", "\u00e9"]
    pieces = SimpleNamespace(
        id_to_piece=texts.__getitem__,
        is_byte=lambda i: False,
        is_control=lambda i: i == 1,
        is_unknown=lambda i: i == 0,
        is_unused=lambda i: False,
    )
    tables = t.byte_tables(SimpleNamespace(pieces=pieces, vocab_size=len(texts), folder="x"))
    assert (tables.lengths + tables.spaced).tolist() == [0, 0, 1, len(" of the"), 3, 2, 2]
