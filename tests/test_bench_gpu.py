"""bench/gpu.py where there is no GPU: all of it at a small shape, its messages, its count of operations."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train_gpt as t
from bench import gpu_meter as m
from helpers import ROOT
from helpers.processes import run_python
from helpers.trainer import TINY

KEYS = {
    "head",
    "device",
    "quick",
    "tiny",
    "ceilings",
    "kernels",
    "step",
    "optimiser",
    "evaluate",
    "quantiser",
    "recompilations",
    "against",
    "skipped",
    "failed",
    "seconds",
}
STEP = """
import torch
def build(config_environment, device):
    weight = torch.zeros(int(config_environment["VOCAB_SIZE"]), device=device, requires_grad=True)
    def step(inputs, targets):
        loss = -torch.log_softmax(weight, 0)[targets].mean()
        loss.backward()
        with torch.no_grad():
            weight.sub_(weight.grad)
        return loss.detach()
    return step
"""

# The script, whose timer takes one call instead of as many as fill a time.
ONE_CALL = """
import runpy, sys
from torch.utils.benchmark import Timer
Timer.blocked_autorange = lambda timer, **_: timer.timeit(1)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def gpu(monkeypatch) -> ModuleType:
    """The script as a module; it may change the path and the environment."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    spec = importlib.util.spec_from_file_location("bench_gpu", ROOT / "bench" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_gpu", module)
    spec.loader.exec_module(module)
    return module


def test_the_whole_script_runs_without_a_gpu_and_times_another_step(tmp_path):
    (tmp_path / "other.py").write_text(STEP)
    words = ["-c", ONE_CALL, ROOT / "bench" / "gpu.py", "--device", "cpu", "--tiny", "--quick"]
    words += ["--against", tmp_path / "other.py"]
    done = run_python(words, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    result = json.loads(last.removeprefix("RESULT "))
    assert last.startswith("RESULT ") and set(result) == KEYS and not result["failed"]
    assert "CPU: these times say nothing about a GPU" in done.stdout and "CPU: Training step" in done.stdout
    step = result["step"]["flagship looped"]
    assert step["ms"] > 0 and step["recompilations"] == 0 and set(step["rivals"]) == {"other.py"}
    assert set(step["parts_ms"]) == {"forward", "backward", "optimiser"} and step["classes_ms"]["matmul"] > 0
    assert result["against"]["ms"] > 0 and result["optimiser"]["step_of_8_ms_projected"] > 0
    assert set(result["evaluate"]) == {"plain", "document adapters", "chunk SGD"}
    assert set(result["kernels"]) == set(m.KERNELS)
    assert "step: pr1693 looped" in result["skipped"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "there is no GPU here"),
        (["--device", "cpu"], "--device cpu: add --tiny"),
        (["--device", "cpu", "--tiny", "--record"], "--record: only figures of a GPU"),
        (["--device", "cpu", "--tiny", "--parts", "step,speed"], "--parts step,speed: speed is none of"),
        (["--device", "cpu", "--tiny", "--budget", "0"], "--budget 0: must be greater than 0"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_wrong_arguments_are_one_line_and_status_2(gpu, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        gpu.main(arguments)
    error = capsys.readouterr().err
    assert (
        stopped.value.code == 2
        and error.startswith("gpu.py: ")
        and message in error
        and error.count("\n") == 1
    )


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "no such Python file"),
        ("x = 1\n", "it has no function build"),
        ("import no_such_module\n", "No module named 'no_such_module'"),
        (
            "def build(config_environment, device):\n    raise ValueError('needs\\nanother GPU')\n",
            "needs another GPU",
        ),
    ],
)
def test_a_broken_step_is_one_line_before_anything_is_measured(gpu, tmp_path, capsys, text, message):
    path = tmp_path / "broken.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--device", "cpu", "--tiny", "--against", str(path)])
    said = capsys.readouterr()
    assert stopped.value.code == 2 and message in said.err and said.err.count("\n") == 1 and not said.out


def test_a_part_that_fails_or_has_no_time_leaves_the_others(gpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu.Bench, "ceilings", lambda self: 1 / 0)
    monkeypatch.setattr(gpu.Bench, "quantiser", lambda self: None)
    status = gpu.main(
        ["--device", "cpu", "--tiny", "--parts", "ceilings,quantiser,evaluate", "--budget", "2"]
    )
    result = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))
    assert status == 1 and result["failed"] == {"ceilings": "ZeroDivisionError: division by zero"}
    late = [reason for name, reason in result["skipped"].items() if name.startswith("evaluate")]
    assert late and all("are left of 2s" in reason for reason in late) and set(result) == KEYS


def test_a_record_is_appended_to_those_before(gpu, tmp_path):
    path = tmp_path / "gpu_checks.md"
    path.write_bytes((ROOT / "records" / "gpu_checks.md").read_bytes())
    bench = gpu.Bench(gpu.parse(["--device", "cpu", "--tiny"]))
    bench.tables = [
        gpu.Table("Times", ("what", "ms"), [("step", "1.00")]),
        gpu.Table("Empty", ("", "why"), []),
    ]
    bench.skipped["quantiser"] = "no time"
    for date in ("2026-01-01", "2026-01-02"):
        gpu.record(
            path, bench, {"device": "H100", "date": date, "torch": "2.13"}, "python bench/gpu.py --record"
        )
    text = path.read_text()
    assert text.startswith("# GPU checks\n") and "Empty" not in text
    assert text.index("## H100, 2026-01-01") < text.index("## H100, 2026-01-02")
    assert "| what | ms |\n|---|---|\n| step | 1.00 |" in text and "* skipped: quantiser (no time)" in text


def test_recipes_that_take_the_same_step_are_measured_once(gpu):
    bench = gpu.Bench(gpu.parse(["--device", "cpu", "--tiny"]))
    assert next(iter(gpu.recipes())) == "flagship" and {"pr1585", "pr1738", "pr1755", "pr1693"} < set(
        gpu.recipes()
    )
    keys = {name: bench.same_step(bench.settings(name)) for name in gpu.recipes()}
    assert keys["pr1738"] == keys["pr1755"] and len(set(keys.values())) == len(keys) - 1


@pytest.mark.parametrize("looped", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"HEAD_GATE": "none", "SMEAR_GATE": "0", "PARALLEL_RESIDUAL": "gptj"}]
)
def test_the_count_of_operations_is_that_of_torch(looped, changes):
    """torch counts what the CPU's attention computes: all pairs of positions, not the causal half."""
    config = t.Config.from_env(TINY | {"VOCAB_SIZE": "320"} | changes)
    model = t.GPT(config)
    model.looped = looped
    ids = torch.randint(2, 320, (3, 33), generator=torch.Generator().manual_seed(0))
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        loss = model(t.Batch(ids[:, :-1], ids[:, 1:])).mean()
        forward = counter.get_total_flops()
        loss.backward()
    ours = m.forward_flops(config, looped, tokens=96, pairs=3 * 32 * 32)
    assert forward == pytest.approx(ours, rel=1e-3)
    assert counter.get_total_flops() == pytest.approx(3 * ours, rel=1e-3)


def test_pairs_of_positions_are_those_of_causal_segments():
    tokens = torch.tensor([[1, 5, 6, 1, 7, 8, 9, 9]])
    packed = t.Batch(tokens, tokens, t.segment_starts(tokens[0].numpy(), 4), 4)
    assert m.causal_pairs(packed) == 6 + 10 + 1 and m.causal_pairs(t.Batch(tokens, tokens)) == 36


def test_synthetic_text_has_the_length_of_fineweb_documents_and_every_loader_reads_it(config):
    lengths = m.document_lengths(20_000, seed=0)
    assert abs(lengths.mean() / m.MEAN_LENGTH - 1) < 0.03 and lengths.min() >= 8
    text = m.random_text(lengths[:50], 320, seed=0)
    assert (text == t.BOS).sum() == 50 and text.max() < 320 and len(t.find_documents(text)) == 50
    data = m.Synthetic(config, 20_000)
    assert len(data.train[0]) == 20_000
    for loader in t.LOADERS.values():
        assert loader(config, data).get(0, 7).inputs.numel() == config.train_batch_tokens // t.STREAMS
