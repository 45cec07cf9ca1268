"""bench/gpu_session.py: what is run, resumed, left and recorded, with stand-ins for commands and clock."""

from __future__ import annotations

import argparse
import importlib.util
import json
import lzma
import sys
import types
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from helpers import ROOT


def load(monkeypatch, name: str) -> ModuleType:
    """A script of bench/ as a module; it may change the path."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def session(monkeypatch) -> ModuleType:
    """The script as a module."""
    return load(monkeypatch, "gpu_session")


class StandIn:
    """A clock and commands that move it: each takes the seconds that its word names, or is stopped before."""

    def __init__(self):
        self.now = 1000.0
        self.ran: list[tuple[list[str], dict[str, str], float]] = []

    def clock(self) -> float:
        """The time in seconds."""
        return self.now

    def execute(self, command: list[str], settings: dict[str, str], seconds: float, log: Path) -> int:
        """command: name, seconds that it takes, status, further words."""
        self.ran.append((command, settings, seconds))
        taken = float(command[1])
        self.now += min(taken, seconds)
        log.write_text(f"{command[0]} began\nsecret\nRESULT {{}}\n")
        return 124 if taken > seconds else int(command[2])

    def names(self) -> list[str]:
        """The commands so far, which are then forgotten."""
        names = [command[0] for command, _, _ in self.ran]
        self.ran.clear()
        return names


def start(session: ModuleType, stand_in: StandIn, work: Path, limit: float):
    """A session under the stand-in."""
    return session.Session(work, limit, stand_in.clock, stand_in.execute)


def states(outcomes: dict) -> dict[str, str]:
    """State by name."""
    return {name: outcome.state for name, outcome in outcomes.items()}


def test_parts_of_a_call_can_be_chosen_and_bring_its_data(session):
    parts = [session.Part(name, [name], 1, 2) for name in ("data", "preflight", "tests", "kernels")]
    assert session.choose_parts(parts, []) == parts
    assert session.choose_parts(parts, ["kernels"]) == [parts[0], parts[3]]
    with pytest.raises(ValueError, match="--parts kernel: this call has no such part; name some of data pre"):
        session.choose_parts(parts, ["tests", "kernel"])


def test_a_call_is_resumed_and_repeats_nothing_that_succeeded(session, tmp_path):
    stand_in = StandIn()
    parts = [
        session.Part("a", ["a", "40", "0"], 40, 100),
        session.Part("b", ["b", "50", "0"], 60, 100),
        session.Part("c", ["c", "10", "0"], 20, 100),
    ]
    first = start(session, stand_in, tmp_path, 100).run(parts)
    assert states(first) == {"a": "done", "b": "left", "c": "done"}  # 55 s left for b, which needs 60
    assert stand_in.names() == ["a", "c"] and first["a"].seconds == 40
    assert first["b"].why == "60s needed, 55s left"
    second = start(session, stand_in, tmp_path, 100).run(parts)
    assert states(second) == {"a": "done", "b": "done", "c": "done"}
    assert stand_in.names() == ["b"] and second["a"].seconds == 40
    start(session, stand_in, tmp_path, 100).run(parts)
    assert stand_in.names() == []
    changed = [parts[0]._replace(settings={"MLP_MULT": "5.5"}), *parts[1:]]
    start(session, stand_in, tmp_path, 100).run(changed)
    assert stand_in.names() == ["a"]


def test_a_failed_part_is_tried_again_and_others_go_on(session, tmp_path):
    stand_in = StandIn()
    parts = [
        session.Part("broken", ["broken", "1", "3"], 10, 20),
        session.Part("endless", ["endless", "1e9", "0"], 10, 20),
        session.Part("after", ["after", "1", "0"], 10, 20, needs=tmp_path / "made by nobody"),
        session.Part("last", ["last", "1", "0"], 10, 20),
    ]
    outcomes = start(session, stand_in, tmp_path, 100).run(parts)
    assert states(outcomes) == {"broken": "failed", "endless": "failed", "after": "left", "last": "done"}
    assert (outcomes["broken"].why, outcomes["endless"].why) == ("status 3", "stopped after 20s")
    assert "made by nobody" in outcomes["after"].why
    assert stand_in.names() == ["broken", "endless", "last"]
    start(session, stand_in, tmp_path, 100).run(parts)
    assert stand_in.names() == ["broken", "endless"]


def test_a_part_leaves_the_later_ones_their_least(session, tmp_path):
    stand_in = StandIn()
    train = ["train", "0", "0", "--seconds={seconds}"]
    parts = [
        session.Part("train", train, 180, 510, 90, settings={"LIMIT": "{seconds}"}),
        session.Part("pack", ["pack", "0", "0"], 90, 240),
        session.Part("adapters", ["adapters", "0", "0"], 75, 240),
    ]
    start(session, stand_in, tmp_path, 575).run(parts)
    command, settings, seconds = stand_in.ran[0]
    assert seconds == 570 - 90 - 75
    assert command[3] == "--seconds=315" and settings == {"LIMIT": "315"}
    assert stand_in.ran[1][2] == 240  # its most
    part, later = parts[0], parts[1:]
    assert session.allowance(part, later, 1000) == 510
    assert session.allowance(part, later, 200) == 180  # nothing is kept for others below its own least
    assert session.allowance(part, [], 200) == 200


@pytest.mark.parametrize("dry", [False, True])
def test_the_calls_fit_their_limit(session, tmp_path, dry):
    places = session.Places(tmp_path / "carried", tmp_path / "data", tmp_path, dry, tmp_path / "other.py")
    for call, plan in session.CALLS.items():
        parts = plan(places)
        assert sum(part.least for part in parts) + session.KILL_AFTER <= 570, call
        assert len({part.name for part in parts}) == len(parts)
        assert all(part.start < part.least <= part.most for part in parts)
        for part in parts:
            script = part.command[1] if part.command[1] != "-m" else part.command[3]
            assert (ROOT / script).exists(), script
    third = {part.name: part.settings for part in session.third_call(places)}
    assert third["mlp_4"] | {"MLP_MULT": "5.5", "RUN_ID": "mlp_5.5"} == third["mlp_5.5"]
    assert "other.py" in " ".join(session.third_call(places)[-1].command)
    given = places._replace(data=tmp_path / "elsewhere")
    assert "data" not in [part.name for part in session.second_call(given)]


def test_settings_of_the_plan_are_the_trainers(session, tmp_path):
    import train_gpt as t

    places = session.Places(tmp_path, tmp_path / "data", tmp_path, False, None)
    for dry in (False, True):
        for plan in session.CALLS.values():
            for part in plan(places._replace(dry=dry)):
                if "train_gpt.py" in part.command:
                    settings = {
                        name: value.replace("{seconds}", "315") for name, value in part.settings.items()
                    }
                    settings.pop("CUDA_VISIBLE_DEVICES", None)
                    assert set(settings) <= {name.upper() for name in t.Config.__dataclass_fields__}
                    t.Config.from_env(settings)


def test_tables_show_the_chosen_lines_and_the_end_of_what_failed(session, tmp_path):
    stand_in = StandIn()
    parts = [
        session.Part("good", ["good", "1", "0"], 10, 20, shown="^good"),
        session.Part("bad", ["bad", "1", "1"], 10, 20, shown="^nothing"),
        session.Part("late", ["late", "1", "0"], 1000, 1000),
    ]
    one = start(session, stand_in, tmp_path, 100)
    outcomes = one.run(parts)
    about = {"device": "GPU X", "date": "2000-01-01 00:00 UTC", "torch": "2.11", "triton": "3.6"}
    text = session.section("2", parts, outcomes, one, about)
    assert text.startswith(
        "## GPU X, 2000-01-01 00:00 UTC: bench/gpu_session.sh 2\n\ntorch 2.11, triton 3.6\n"
    )
    assert "good began" in text and text.count("secret") == 1  # of the part that failed alone
    assert "| late | left | 0 | 1000s needed" in text
    tables, records = tmp_path / "tables_2.md", tmp_path / "records.md"
    tables.write_text(text)
    records.write_text("# GPU checks\n")
    session.append_records([tables], records)
    session.append_records([tables], records)
    written = records.read_text()
    assert written.startswith("# GPU checks\n\n## GPU X")
    assert written.count("## GPU X") == 2


def test_trainings_are_compared_in_one_table(session, tmp_path):
    part = session.Part(
        "mlp_4",
        ["mlp_4", "1", "0"],
        *(10, 20),
        settings={"STAGE": "train", "RUN_ID": "mlp_4", "MAX_WALLCLOCK_SECONDS": "140"},
    )
    (tmp_path / "mlp_4").mkdir()
    facts = {"train": {"steps": 700, "tokens_per_second": 981234.5}}
    (tmp_path / "mlp_4" / "stages.json").write_text(json.dumps(facts))
    (tmp_path / "mlp_4" / "score.json").write_text('{"bpb": 1.2345678}')
    rows = session.trainings([part], {"mlp_4": session.Outcome("done", 12.0)}, tmp_path)
    assert rows[2] == "| mlp_4 | 140 | 700 | 981,234 | 1.23457 |"
    assert session.trainings([part], {"mlp_4": session.Outcome("left")}, tmp_path) == []


def test_a_tuned_artifact_comes_last_and_takes_nothing_from_the_others(monkeypatch, tmp_path, capsys):
    """Who is stopped while it is tuned has both rows, and the artifact that the adapters need."""
    packing = load(monkeypatch, "gpu_packing")
    packers = types.SimpleNamespace(read=lambda data: data)
    subject = types.SimpleNamespace(divergence=lambda weights, chunks: (np.array([len(weights)]), 0.25))
    monkeypatch.setattr(packing, "Packers", lambda subject, calibration: packers)
    monkeypatch.setattr(packing, "pack_public", lambda packers: (b"public", 7))
    monkeypatch.setattr(packing, "pack_ours", lambda packers, goal: ({}, b"ours"))

    def stop(packers, goal):
        raise KeyboardInterrupt

    options = argparse.Namespace(run=tmp_path, calibration=1, tune_steps=0)
    rows = packing.compare(subject, options, range(1), 1.0)
    assert {name: (row["bytes"], row["bpb"]) for name, row in rows.items()} == {
        "SDClip + LQER": (7, 1.25),
        "ours": (4, 1.25),
    }
    capsys.readouterr()
    options.tune_steps = 96
    monkeypatch.setattr(packing, "pack_tuned", stop)
    with pytest.raises(KeyboardInterrupt):
        packing.compare(subject, options, range(1), 1.0)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["packer", "SDClip", "ours"]
    assert (tmp_path / "ours.ptz").read_bytes() == b"ours"
    monkeypatch.setattr(packing, "pack_tuned", lambda packers, goal: b"tuned")
    assert list(packing.compare(subject, options, range(1), 1.0)) == ["SDClip + LQER", "ours", "ours, tuned"]


def test_a_command_is_stopped_and_its_output_kept(session, tmp_path):
    script = "print('here', flush=True); import time; time.sleep(600)"
    log = tmp_path / "log"
    assert session.run_command([sys.executable, "-c", script], {}, 3.0, log) == 124
    assert (
        session.run_command([sys.executable, "-c", "import os; print(os.environ['X'])"], {"X": "7"}, 60, log)
        == 0
    )
    assert log.read_text() == "7\n"


def test_carry_takes_from_every_file_in_turn_up_to_the_size(session, tmp_path):
    for name, count in (("a", 3), ("b", 2)):
        with lzma.open(tmp_path / f"{name}.xz", "wt") as out:
            out.writelines(f'{{"text": "{name}{number}"}}\n' for number in range(count))
    (tmp_path / "val.xz").write_bytes(b"validation")
    (tmp_path / "model").write_bytes(b"tokenizer")
    folder = tmp_path / "carried"
    texts = [tmp_path / "a.xz", tmp_path / "b.xz"]
    session.carry(texts, tmp_path / "val.xz", tmp_path / "model", folder, 5)
    with lzma.open(folder / "train.jsonl.xz", "rt") as carried:
        lines = carried.read().splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["a0", "b0", "a1", "b1", "a2"]
    assert (folder / "val.jsonl.xz").read_bytes() == b"validation"
    assert (folder / "tokenizer.model").read_bytes() == b"tokenizer"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["2", "--carried", "nowhere"],
            "--carried nowhere: no train.jsonl.xz there; run carry first or name --data",
        ),
        (["3", "--against", "nothing.py"], "nothing.py: does not exist; name a file or folder that does"),
        (["2", "--data", "docs"], "--data docs: no manifest.json there; name a dataset that data/prepare.py"),
        (["carry"], "carry: TEXT, --tokenizer and --val are needed; name all three"),
        (["record"], "record: TABLES is missing; name the tables_*.md of the calls"),
        (["1", "--limit", "5"], "argument --limit: 5 must be at least 30"),
    ],
)
def test_errors_are_one_line(session, words, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        session.parse(words)
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
