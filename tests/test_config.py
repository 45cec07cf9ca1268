"""Settings: declared once, typed, range-checked, and a wrong one stops the run at once."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import time

import pytest

import train_gpt as t
from conftest import ROOT, environment

NOT_TYPOS = """OMP_NUM_THREADS CUDA_VISIBLE_DEVICES NCCL_DEBUG NCCL_IB_DISABLE TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC
    TORCH_LOGS
    TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR TRITON_INTERPRET HF_HOME HF_TOKEN HF_HUB_OFFLINE WANDB_PROJECT WANDB_MODE
    MASTER_ADDR MASTER_PORT RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK TORCHELASTIC_RUN_ID
    RUNPOD_POD_ID PATH HOME LANG SHELL PWD USER TERM EDITOR PYTHONPATH LD_LIBRARY_PATH VIRTUAL_ENV SSH_CONNECTION
    LS_COLORS DISPLAY XDG_RUNTIME_DIR TMPDIR LOGNAME HOSTNAME""".split()


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("MATRX_LR", "0.1", "did you mean MATRIX_LR"),
        ("NUM_HEAD", "8", "did you mean NUM_HEADS"),
        ("NUM_HEADS", "7", "must divide MODEL_DIM"),
        ("NUM_HEADS", "8.5", "whole number"),
        ("NUM_HEADS", "many", "whole number"),
        ("NUM_KV_HEADS", "3", "must divide NUM_HEADS"),
        ("MATRIX_LR", "-1", "greater than 0"),
        ("MATRIX_LR", "nan", "finite"),
        ("MATRIX_LR", "fast", "a number"),
        ("WARMDOWN_FRAC", "1.5", "between 0 and 1"),
        ("MATRIX_BITS", "4", "5, 6, 7 or 8"),
        ("LN_SCALE", "maybe", "0 or 1"),
        ("LOADER", "random", "packed, shuffled"),
        ("RUN_ID", "../x", "letters"),
        ("LOOP_START", "7", "LOOP_START <= LOOP_END"),
        ("ROPE_DIMS", "15", "even"),
        ("EVAL_STRIDE", "4096", "EVAL_SEQ_LEN"),
        ("TRAIN_BATCH_TOKENS", "1001", "multiple of 8"),
        ("GPTQ_RESERVE_SECONDS", "700", "MAX_WALLCLOCK_SECONDS"),
        ("MLP_MULT", "0.3001", "whole number"),
        ("ARTIFACT", "x.ptz", "STAGE=evaluate"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it_and_its_value(name, value, words):
    with pytest.raises(t.Stop) as stop:
        t.Config.from_env({name: value})
    message = str(stop.value)
    assert (
        name in message
        and value.rstrip("0").rstrip(".") in message
        and words in message
        and "\n" not in message
    )


def test_a_misspelt_name_stops_the_program_within_a_second_and_leaves_nothing(tmp_path):
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, str(ROOT / "train_gpt.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment({"MATRX_LR": "0.1"}),
        check=False,
    )
    assert time.monotonic() - start < 1.0
    assert result.returncode != 0 and result.stdout == "" and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_names_of_other_programs_are_left_alone():
    assert t.Config.from_env(dict.fromkeys(NOT_TYPOS, "1")) == t.Config()


@pytest.mark.parametrize("text, value", [("1e4", 10_000), ("524_288", 524_288), ("8", 8), ("8.0", 8)])
def test_integers_may_be_written_as_people_write_them(text, value):
    assert t.Config.from_env({"ITERATIONS": text}).iterations == value


@pytest.mark.parametrize(
    "text, value", [("1", True), ("true", True), ("ON", True), ("0", False), ("no", False)]
)
def test_switches(text, value):
    assert t.Config.from_env({"LN_SCALE": text}).ln_scale is value


def test_print_config_can_be_read_back_and_overrides_name_only_what_differs():
    config = t.Config.from_env({"NUM_LAYERS": "9", "LN_SCALE": "0"})
    assert config.overrides() == {"NUM_LAYERS": 9, "LN_SCALE": False}
    result = subprocess.run(
        [sys.executable, str(ROOT / "train_gpt.py"), "--print-config"],
        capture_output=True,
        text=True,
        env=environment({"NUM_LAYERS": "9", "LN_SCALE": "0"}),
        check=True,
    )
    pairs = dict(line.split("=", 1) for line in result.stdout.splitlines())
    assert t.Config.from_env(pairs) == config and len(pairs) == len(dataclasses.fields(t.Config))


def test_help_shows_every_setting_and_other_arguments_are_refused():
    shown = subprocess.run(
        [sys.executable, str(ROOT / "train_gpt.py"), "--help"],
        capture_output=True,
        text=True,
        env=environment({}),
        check=True,
    ).stdout
    assert all(re.search(rf"^  {f.name.upper()} ", shown, re.M) for f in dataclasses.fields(t.Config))
    with pytest.raises(t.Stop, match="environment variables"):
        t.command_line(["--lr=3"])


def test_every_setting_has_a_meaning_a_section_and_a_reader():
    source = (ROOT / "train_gpt.py").read_text()
    listed = [f.name for _, fields in t.Config.sections() for f in fields]
    assert listed == [f.name for f in dataclasses.fields(t.Config)]
    for field in dataclasses.fields(t.Config):
        assert len(field.metadata["meaning"]) > 10
        assert re.search(rf"\.{field.name}\b", source), f"{field.name} is declared but no line reads it"
