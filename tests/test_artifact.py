"""The container on disk and the packed script."""

from __future__ import annotations

import ast
import lzma
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import train_gpt as t
from data.shards import write_shard
from helpers import ROOT
from helpers.trainer import environment, launch, replace


def legal(integers, states=64):
    """int32 with the parities that the trellis path of each column gives."""
    after = t.trellis(states)[0]
    state = np.zeros(integers.size(1), np.int64)
    out = integers.numpy().astype(np.int32)
    for row in out:
        row[:] = row & ~1 | (state & 1)
        state = after[state, row >> 1 & 1]
    return torch.from_numpy(out)


def tensors(seed=0, trellised=False):
    """Something like the contents of an artifact."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows, columns):
        if trellised:
            values = legal(torch.randint(-9, 9, (rows, columns), generator=generator))
            exponents = torch.randint(-20, 20, (rows + columns,), generator=generator).int()
            return t.Quantized(values, exponents, torch.tensor([0.1]))
        values = torch.randint(-31, 32, (rows, columns), generator=generator).to(torch.int8)
        return t.Quantized(values, torch.rand(rows, generator=generator).half())

    return {
        "tok_emb.weight": matrix(40, 16),
        "blocks.0.attn.c_q.weight": matrix(16, 16),
        "blocks.1.attn.c_q.weight": matrix(16, 16),
        "blocks.10.mlp.fc.weight": matrix(64, 16),
        "q_gain": t.Quantized(torch.randn(2, 4, generator=generator).half()),
        "scalar": t.Quantized(torch.tensor(1.5).half()),
    }


def equal(a, b):
    """Whether two sets of tensors are the same in names, order, dtypes and every value."""
    return list(a) == list(b) and all(
        x.values.dtype == y.values.dtype
        and torch.equal(x.values, y.values)
        and all(p is q is None or torch.equal(p, q) for p, q in zip(x[1:], y[1:], strict=True))
        for x, y in zip(a.values(), b.values(), strict=True)
    )


@pytest.mark.parametrize("trellised", [False, True])
@pytest.mark.parametrize("compressor", ["brotli", "lzma"])
def test_an_artifact_comes_back_bit_for_bit(tmp_path, compressor, trellised):
    path = tmp_path / "a.ptz"
    config = t.Config(compressor=compressor)
    path.write_bytes(t.encode_artifact(config, tensors(trellised=trellised), looped=True))
    manifest, again, digest = t.decode_artifact(path)
    assert equal(tensors(trellised=trellised), again) and len(digest) == 64
    assert manifest["looped"] is True and manifest["model"] == t.model_settings(config)
    assert t.encode_artifact(config, again, looped=True) == path.read_bytes()
    assert b"pickle" not in path.read_bytes() and b"PK\x03\x04" not in path.read_bytes()


def test_every_flipped_byte_and_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "a.ptz"
    data = t.encode_artifact(t.Config(), tensors(trellised=True), looped=False)
    source = random.Random(0)
    for place in {*range(t.ARTIFACT_HEADER.size + 8), *source.choices(range(len(data)), k=1000)}:
        changed = bytearray(data)
        changed[place] ^= 1 << source.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(t.Stop, match=r"a.ptz: .*STAGE=quantize"):
            t.decode_artifact(path)
    for size in {0, 1, 8, t.ARTIFACT_HEADER.size, *source.sample(range(len(data)), 100)}:
        path.write_bytes(data[:size])
        with pytest.raises(t.Stop, match=r"a.ptz: .*STAGE=quantize"):
            t.decode_artifact(path)
    path.write_bytes(data + b"x")
    with pytest.raises(t.Stop, match="truncated or damaged"):
        t.decode_artifact(path)
    with pytest.raises(t.Stop, match="missing.ptz: cannot be read"):
        t.decode_artifact(tmp_path / "missing.ptz")


def test_values_that_do_not_fit_fp16_are_not_packed():
    bad = tensors() | {"q_gain": t.Quantized(torch.tensor([1e9]).half())}
    with pytest.raises(t.Stop, match="q_gain: a value does not fit"):
        t.encode_artifact(t.Config(), bad, looped=False)


def test_what_is_written_is_read_back_and_compared(config, tmp_path, monkeypatch):
    run = t.Run(config)
    run.folder = tmp_path
    size, digest = t.seal_artifact(run, tensors(), looped=False)
    assert size == (tmp_path / "final_model.ptz").stat().st_size
    assert equal(t.decode_artifact(tmp_path / "final_model.ptz")[1], tensors())
    monkeypatch.setattr(t, "decode_artifact", lambda path: ({}, tensors(seed=1), digest))
    with pytest.raises(t.Stop, match="reads back differently"):
        t.seal_artifact(run, tensors(), looped=False)


@pytest.mark.parametrize("compressor", ["brotli", "lzma"])
def test_streams_of_any_shape_come_back(compressor):
    shapes = ((), (1,), (3, 5), (0,), (2, 1, 7))
    for dtype in ("float16", "int8", "float32"):
        numbers = [np.random.default_rng(0).integers(-99, 99, shape) for shape in shapes]
        parts = [torch.from_numpy(np.asarray(n).astype(dtype)) for n in numbers]
        again = [torch.empty_like(part) for part in parts]
        t.code_stream(again, compressor, 64, t.code_stream(parts, compressor, 64))
        assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


def test_the_packed_script_is_small_and_packing_it_again_changes_nothing():
    source = (ROOT / "train_gpt.py").read_bytes()
    packed, how = t.pack_source(source)
    assert how == "minified" and len(packed) < 0.25 * len(source)
    assert t.pack_source(packed) == (packed, "already packed")


def test_the_packed_script_has_the_help_but_no_docstrings(tmp_path):
    packed = tmp_path / "packed.py"
    packed.write_bytes(t.pack_source((ROOT / "train_gpt.py").read_bytes())[0])
    printed = []
    for script in (packed, ROOT / "train_gpt.py"):
        done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
        printed.append(done.stdout)
    assert printed[0] == printed[1] and "torchrun" in printed[0]
    constants = [
        node.value for node in ast.walk(ast.parse(packed.read_bytes())) if isinstance(node, ast.Constant)
    ]
    literal = max((value for value in constants if isinstance(value, str)), key=len)
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]
    tree = ast.parse(lzma.decompress(literal.encode("latin-1"), lzma.FORMAT_RAW, None, filters))
    kinds = (ast.ClassDef, ast.FunctionDef)
    assert not [node.name for node in ast.walk(tree) if isinstance(node, kinds) and ast.get_docstring(node)]


def test_the_packed_script_runs_alone_with_a_triton_kernel(settings, tmp_path):
    """From an empty folder, in a process of its own, through every stage, with an interpreted kernel."""
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "train_gpt.py").write_bytes(t.pack_source((ROOT / "train_gpt.py").read_bytes())[0])
    dataset = tmp_path / "dataset"  # a short validation text: the interpreter takes a millisecond per row
    shutil.copytree(settings["DATASETS_DIR"], dataset)
    write_shard(
        dataset / "fineweb_val_000000.bin", t.read_shard(dataset / "fineweb_val_000000.bin")[:200].copy()
    )
    short = settings | {
        "DATASETS_DIR": str(dataset),
        "GPTQ_RESERVE_SECONDS": "1",
        "ITERATIONS": "1",
        "NUM_LAYERS": "1",
        "NUM_LOOPS": "0",
        "GPTQ_CALIBRATION_BATCHES": "1",
        "TRAIN_BATCH_TOKENS": "64",
        "TRAIN_SEQ_LEN": "8",
        "WARMUP_STEPS": "0",
        "EVAL_PREQUANT": "0",
        "SLIDING_WINDOW_ENABLED": "0",
        "TTT_ENABLED": "0",
        "VAL_BATCH_TOKENS": "2048",
    }
    triton = {"KERNELS": "triton", "TRITON_INTERPRET": "1", "RUN_ID": "packed"}
    variables = environment(short | triton) | {"NUMBA_OPT": "0"}  # what is compiled runs once
    variables.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "train_gpt.py"],
        cwd=empty,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "kernels: triton (interpreted)" in done.stdout and "code already packed" in done.stdout
    loss = float(done.stdout.split("final val_loss:")[1].split()[0])
    # The same run with the reference instead of the kernel ends at the same loss.
    other = launch(short | {"RUN_ID": "plain", "KERNELS": "reference"})
    assert float(other.stdout.split("final val_loss:")[1].split()[0]) == pytest.approx(loss, rel=1e-4)


def test_kernels_that_cannot_run_are_refused(config, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(t.Stop, match="KERNELS=triton: there is no GPU"):
        t.pick_kernels(replace(config, kernels="triton"), t.Run(config))
