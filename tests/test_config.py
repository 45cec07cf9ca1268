"""Settings: declared once, typed, range-checked, and a wrong one stops the run at once."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

import train_gpt as t
from helpers import ROOT
from helpers.processes import run_python
from helpers.trainer import environment

NOT_TYPOS = """
    OMP_NUM_THREADS CUDA_VISIBLE_DEVICES NCCL_DEBUG NCCL_IB_DISABLE TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC
    TORCH_LOGS TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR TRITON_INTERPRET
    HF_HOME HF_TOKEN HF_HUB_OFFLINE WANDB_PROJECT WANDB_MODE
    MASTER_ADDR MASTER_PORT RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK
    TORCHELASTIC_RUN_ID RUNPOD_POD_ID PATH HOME LANG SHELL PWD USER TERM EDITOR PYTHONPATH
    LD_LIBRARY_PATH VIRTUAL_ENV SSH_CONNECTION LS_COLORS DISPLAY XDG_RUNTIME_DIR TMPDIR LOGNAME HOSTNAME
""".split()


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
        ("GPTQ_RESERVE_SECONDS", "-2", "must not be negative (or -1)"),
        ("SEED", "9223372036854775808", "less than 2^63 = 9223372036854775808"),
        ("SEED", "1e9999999999", "less than 2^63"),
        ("SEED", "inf", "whole number"),
        ("TTT_ENABLE", "1", "did you mean TTT_ENABLED"),
        ("MLP_MULT", "0.3001", "whole number"),
        ("ARTIFACT", "x.ptz", "STAGE=evaluate"),
        ("GATE_WIDTH", "513", "must not exceed MODEL_DIM=512"),
        ("TTT_OPTIMIZER", "sgd", "not an optimiser of TTT_MODE=doc_lora"),
        ("VOCAB_SIZE", "4", "5 to 65536"),
        ("ROPE_BASE", "1", "greater than 1"),
        ("SWA_ENABLED", "1", "read by no code; unset SWA_ENABLED"),
        ("LBFGS_SLOT_LR", "0.1", "not legal; unset LBFGS_SLOT_LR"),
        ("GPTQ_BLOCKSIZE", "64", "every published run has 128"),
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


@pytest.fixture
def without_packages(tmp_path, monkeypatch) -> Callable[..., subprocess.CompletedProcess]:
    """Starts the trainer where loading a package outside the standard library ends the process."""
    packages = tmp_path / "packages"
    for name in ("numba", "numpy", "torch", "tqdm", "triton"):
        (packages / name).mkdir(parents=True)
        (packages / name / "__init__.py").write_text(f"raise SystemExit('{name} is loaded')\n")
    folder = tmp_path / "folder"
    folder.mkdir()

    def start(settings: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
        result = subprocess.run(
            [sys.executable, str(ROOT / "train_gpt.py"), *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            env=environment(settings | {"PYTHONPATH": str(packages)}),
            check=False,
        )
        assert list(folder.iterdir()) == []
        return result

    return start


def test_a_misspelt_name_stops_the_program_before_torch_is_loaded_and_leaves_nothing(without_packages):
    refused = without_packages({"MATRX_LR": "0.1"})
    assert refused.returncode == 1 and refused.stdout == ""
    assert "did you mean MATRIX_LR" in refused.stderr and refused.stderr.count("\n") == 1
    assert "is loaded" in without_packages({"MATRIX_LR": "0.1"}).stderr, "the packages were not replaced"


@pytest.mark.parametrize("argument", ["--help", "--print-config"])
def test_settings_are_shown_without_loading_torch(without_packages, argument):
    shown = without_packages({}, argument)
    assert shown.returncode == 0 and shown.stderr == ""
    assert "MATRIX_LR" in shown.stdout


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"HASH_EMBED_ENABLED": "1", "PHASED_TTT_NUM_PHASES": "0"}, "nothing would train it"),
        ({"LOADER": "shuffled", "TRAIN_BATCH_TOKENS": "8192"}, "8 x TRAIN_SEQ_LEN = 16384"),
        ({"TTT_MODE": "chunk_sgd", "TTT_OPTIMIZER": "adam"}, "not an optimiser of TTT_MODE=chunk_sgd"),
        ({"ATTN_CLIP_SIGMAS": "12", "MATRIX_CLIP_SIGMAS": "11"}, "sets ATTN_CLIP_SIGMAS to another value"),
        ({"QUANTIZER": "sdclip", "CORRECT_LEVELS": "1"}, "CORRECT_LEVELS=1: needs QUANTIZER=rate_distortion"),
        ({"QUANTIZER": "sdclip", "TUNE_STEPS": "60", "TUNE_MATRICES": "1"}, "TUNE_MATRICES=1: needs QUANT"),
        ({"TUNE_STEPS": "2", "TUNE_MATRICES": "1"}, "TUNE_STEPS=2 leaves a group without a step"),
        ({"OUTPUT_DAMPENING": "0", "OUTPUT_FEEDBACK": "1"}, "OUTPUT_DAMPENING=0.0 to be greater than 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, words):
    with pytest.raises(t.Stop, match=words):
        t.Config.from_env(settings)
    *_, last = settings
    assert t.Config.from_env({name: value for name, value in settings.items() if name != last})


def test_names_of_other_programs_are_left_alone():
    assert t.Config.from_env(dict.fromkeys(NOT_TYPOS, "1")) == t.Config()


@pytest.mark.parametrize(
    "name, near",
    [("MODEL_DIR", "MODEL_DIM"), ("COMPILER", "COMPILE"), ("KERNEL", "KERNELS"), ("DATA_DIRS", "DATA_DIR")],
)
def test_a_near_miss_that_may_be_a_strangers_does_not_stop(name, near):
    assert t.Config.from_env({name: "/opt"}) == t.Config()
    assert t.find_near_miss(name, t.Config.variables()) == (near, False)


def test_integers_are_exact():
    for text in ("9007199254740993", "9_007_199_254_740_993", "9223372036854775807"):
        assert t.Config.from_env({"SEED": text}).seed == int(text)


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
    changed = environment({"NUM_LAYERS": "9", "LN_SCALE": "0"})
    result = run_python([ROOT / "train_gpt.py", "--print-config"], changed)
    pairs = dict(line.split("=", 1) for line in result.stdout.splitlines())
    assert t.Config.from_env(pairs) == config and len(pairs) == len(dataclasses.fields(t.Config))


def test_help_shows_every_setting_and_other_arguments_are_refused():
    shown = run_python([ROOT / "train_gpt.py", "--help"], environment({})).stdout
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
