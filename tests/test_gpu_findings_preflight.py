"""What is said of the machine before a run: one line each, with or without GPU, driver and nvidia-smi."""

from __future__ import annotations

import os
import re
import types
import warnings
from pathlib import Path

import pytest
import torch

import environment as environment_tool
import train_gpt as t
from helpers.processes import run_python
from helpers.trainer import TRAINER, environment, launch, replace

# What --preflight does.
REPORT = """
import os, train_gpt as t
t.SAMPLE_SECONDS = 0.5
t.report_machine(t.Config.from_env(os.environ))
"""
# A step so short that its sample, of 50 steps at most, is, too.
SMALL = {
    "NUM_LAYERS": "2",
    "LOOP_START": "0",
    "LOOP_END": "0",
    "PARALLEL_START_LAYER": "1",
    "XSA_LAST_N": "1",
    "TRAIN_BATCH_TOKENS": "256",
    "GPTQ_CALIBRATION_BATCHES": "1",
}


@pytest.fixture
def run(config):
    """A Run on the CPU that remembers its log."""
    run = t.Run(config)
    run.lines = []
    run.log = lambda line, console=True: run.lines.append(line)
    return run


def fake_smi(folder: Path, monkeypatch, answer: str, status: int = 0) -> None:
    """Puts an nvidia-smi on the PATH that prints `answer`, which may hold any bytes."""
    path = folder / "bin" / "nvidia-smi"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(f"#!/bin/sh\necho '{answer}'\nexit {status}\n".encode(errors="surrogateescape"))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    "answer, status, build, state, remedy",
    [
        ("570.86.10, NVIDIA H100 80GB HBM3", 0, None, "1 x NVIDIA H100 80GB HBM3, driver 570", "PYTHON="),
        ("535.54.03, NVIDIA A100-SXM4", 0, "13.0", "driver 535", "CUDA 13.0 needs driver 580 or later"),
        ("535.54.03, NVIDIA A100-SXM4", 0, "12.8", "driver 535", "check CUDA_VISIBLE_DEVICES (7)"),
        ("[N/A], NVIDIA A100-SXM4", 0, "12.8", "driver [N/A]", "check CUDA_VISIBLE_DEVICES (7)"),
        ("\udcff", 0, None, "none, the CPU trains (nvidia-smi answers '\ufffd'", "install the driver"),
        ("NVIDIA-SMI has failed", 9, "12.8", "answers 'NVIDIA-SMI has failed'", "install the driver"),
        ("nonsense", 0, None, "none, the CPU trains (nvidia-smi answers 'nonsense'", "install the driver"),
        ("", 0, None, "none, the CPU trains", "install the driver"),
    ],
)
def test_what_nvidia_smi_says_becomes_one_line(
    run, tmp_path, monkeypatch, answer, status, build, state, remedy
):
    fake_smi(tmp_path, monkeypatch, answer, status)
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    try:
        t.inspect_machine(run, whole=False)
    except t.Stop as stop:  # GPUs are there: a run must not leave them idle
        assert answer.split(", ")[-1].startswith("NVIDIA ") and str(stop).startswith("GPU: ")
        assert str(stop).endswith("; or train on the CPU: CUDA_VISIBLE_DEVICES=") and run.lines == []
        run.lines.append(f"preflight {stop}")
    (line,) = run.lines
    assert line.startswith("preflight GPU: ") and "\n" not in line
    assert state in line.split("; ")[0] and remedy in line


@pytest.mark.parametrize("hidden", ["", "-1", " -1,0"])
def test_gpus_that_torch_cannot_use_are_left_idle_if_asked_for(run, tmp_path, monkeypatch, hidden):
    fake_smi(tmp_path, monkeypatch, "535.54.03, NVIDIA A100-SXM4")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    t.inspect_machine(run, whole=False)
    assert run.lines[0].startswith("preflight GPU: 1 x NVIDIA A100-SXM4")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    t.inspect_driver(run, whole=True)
    assert run.lines[1] == run.lines[0]
    with pytest.raises(t.Stop, match="GPU: 1 x NVIDIA A100-SXM4"):
        t.inspect_machine(run, whole=False)


def test_gpus_for_which_torch_is_too_new_do_not_count(monkeypatch, capsys):
    """The driver lists them, so they are counted; CUDA does not start."""
    monkeypatch.setattr(environment_tool, "gpus", lambda: ["0", "1"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: warnings.warn("old driver", stacklevel=1))
    assert environment_tool.count_gpus() == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("2 GPUs are listed, but torch ") and "use 0;" in shown.err
    assert shown.err.count("\n") == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not t.finds_cuda()


def test_without_a_compiler_a_compiled_run_is_one_line(config, monkeypatch):
    def compile_nothing(function, **options):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(torch, "compile", compile_nothing)
    monkeypatch.setattr(t, "set_compiler_options", lambda: None)  # loads the compiler for seconds
    with pytest.raises(t.Stop) as stop:
        t.build(t.Run(replace(config, compile="on")))
    said = str(stop.value)
    assert said.startswith(
        "COMPILE=on: nothing can be compiled here (RuntimeError: Failed to find C compiler.)"
    )
    assert "install gcc" in said and "\n" not in said


def test_without_a_compiler_the_kernels_are_not_used_and_the_log_says_why(run, monkeypatch):
    def launcher():
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    driver = types.SimpleNamespace(active=types.SimpleNamespace(get_current_target=launcher))
    monkeypatch.setattr(t, "triton", types.SimpleNamespace(runtime=types.SimpleNamespace(driver=driver)))
    monkeypatch.delenv("TRITON_INTERPRET")
    run.is_cuda = True
    assert not t.pick_kernels(run.config, run)
    assert run.lines == ["kernels: reference (RuntimeError: Failed to find C compiler.)"]
    with pytest.raises(t.Stop, match="KERNELS=triton: RuntimeError: Failed to find C compiler"):
        t.pick_kernels(replace(run.config, kernels="triton"), run)


def test_a_machine_without_gpu_and_nvidia_smi_gets_one_line_and_no_remedy(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    t.inspect_machine(run, whole=False)
    assert run.lines == [
        f"preflight GPU: none, the CPU trains (no nvidia-smi; torch {torch.__version__}, built for the CPU)"
    ]
    run.is_main = False  # the other ranks do not ask
    t.inspect_machine(run, whole=False)
    assert len(run.lines) == 1


def test_a_run_with_a_broken_nvidia_smi_goes_on(settings, tmp_path, monkeypatch):
    fake_smi(tmp_path, monkeypatch, "no driver", 9)
    done = launch(settings | {"STAGE": "train", "ITERATIONS": "1", "WARMUP_STEPS": "0"})
    assert done.returncode == 0, done.stderr
    assert "preflight GPU: none, the CPU trains (nvidia-smi answers 'no driver'" in done.stdout


def test_the_whole_report_is_made_and_nothing_is_kept(settings, tmp_path):
    cache = tmp_path / "cache"
    values = environment(settings | SMALL | {"COMPILE_CACHE": str(cache), "MAX_WALLCLOCK_SECONDS": "100"})
    done = run_python([TRAINER, "--preflight"], values, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("preflight ")]
    assert [line.split(":")[0].removeprefix("preflight ") for line in lines] == [
        "GPU",
        "matmul",
        "disk",
        "shared memory",
        "steps",
    ]
    budget = re.search(r"steps: \d+ in (\d+)s \(.*looped\)", lines[-1])
    assert budget and 0 < int(budget[1]) < 100, lines[-1]  # the reserve for calibration is measured
    assert "compile cache: 0 files before, 0 after" in done.stdout
    assert sorted(path.name for path in cache.iterdir()) == ["inductor", "numba", "triton"]
    assert list((tmp_path / "runs").iterdir()) == []


def test_two_ranks_report_once_and_stop_their_sample_together(settings, tmp_path):
    done = run_python(["-c", REPORT], environment(settings | SMALL), ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("preflight all-reduce: ") == 1 and " GB/s over 2 ranks" in done.stdout
    assert done.stdout.count("preflight steps: ") == 1


def test_a_step_that_would_take_too_long_is_not_tried(run, monkeypatch):
    monkeypatch.setattr(t, "sample_steps", lambda *_: pytest.fail("tried"))
    flops = t.step_operations(run.config, 1, run.config.train_batch_tokens, 0)
    finding = t.find_steps(run, None, flops / 100)
    assert "not tried: a step takes 100s or more" in finding.state and finding.remedy


def test_the_forecast_counts_loops_as_the_schedule_does(run, monkeypatch):
    config = replace(
        run.config,
        schedule="time",
        enable_looping_at=0.25,
        max_wallclock_seconds=108.0,
    )
    run.config = config
    monkeypatch.setattr(t, "sample_steps", lambda *_: ({0: 0.1, 1: 0.2}, 8.0))
    assert t.find_steps(run, None, 1e15).state.startswith("625 in 100s (100.0ms, 200.0ms looped)")
    run.config = replace(config, schedule="steps")
    assert t.find_steps(run, None, 1e15).state.startswith("571 in 100s")
    run.is_cuda = True
    assert "slow" in t.find_steps(run, None, 1e15).remedy
    assert not t.find_steps(run, None, 4 * t.step_operations(config, 1, config.train_batch_tokens, 0)).remedy


def test_a_disk_that_cannot_be_written_is_a_finding(run, tmp_path):
    run.config = replace(run.config, out_dir=str(tmp_path / "missing"))
    finding = t.find_disk(run)
    assert "No such file" in finding.state and finding.remedy == "set OUT_DIR elsewhere"


def test_little_shared_memory_matters_to_several_ranks_only(run, tmp_path, monkeypatch):
    monkeypatch.setattr(t.shutil, "disk_usage", lambda _: type("Usage", (), {"total": 2**26}))
    assert t.find_shared_memory(run, str(tmp_path)) == t.Finding("shared memory", f"64 MiB in {tmp_path}")
    run.world_size = 2
    assert "--shm-size" in t.find_shared_memory(run, str(tmp_path)).remedy
    assert t.find_shared_memory(run, str(tmp_path / "none")).state == f"no {tmp_path / 'none'}"


def test_the_compile_cache_is_set_before_its_readers_are_loaded(tmp_path, monkeypatch):
    source = Path(t.__file__).read_text()
    assert source.index("    use_compile_cache(CONFIG") < source.index("\nimport numba\n")
    for variable in t.COMPILE_CACHES:
        monkeypatch.setenv(variable, "elsewhere")
    t.use_compile_cache("")
    assert {os.environ[variable] for variable in t.COMPILE_CACHES} == {"elsewhere"}
    t.use_compile_cache(str(tmp_path / "cache"))
    for variable, name in t.COMPILE_CACHES.items():
        assert os.environ[variable] == str(tmp_path / "cache" / name)
    (tmp_path / "file").write_text("")
    wrong = "COMPILE_CACHE=.*: cannot be written .*; choose another folder"
    for folder in (str(tmp_path / "file"), "~nobody-has-this-name/cache"):
        with pytest.raises(t.Stop, match=wrong):
            t.use_compile_cache(folder)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # on a disk that is mounted to be read
    with pytest.raises(t.Stop, match=wrong):
        t.use_compile_cache(str(tmp_path / "cache"))


def test_an_unknown_argument_names_those_there_are():
    with pytest.raises(t.Stop, match="--help, --print-config and --preflight"):
        t.command_line(["--prefligth"])
