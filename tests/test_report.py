"""report.html: the figures of summary.json, no network, and pages for what is unfinished or damaged."""

from __future__ import annotations

import html.parser
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import report
import results
import sweep
from helpers import ROOT, STAND_IN, stand_in
from helpers.processes import run_python
from helpers.run_folders import copy_run, edit, original

VOID = {"meta", "br", "line", "polyline"}


class Page(html.parser.HTMLParser):
    """The exact numbers, the words and the headings of a page; the tags must close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.numbers = []
        self.words = []
        self.tags = []
        self.open = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "data":
            self.numbers.append(json.loads(dict(attributes)["value"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def run(dataset, tmp_path) -> Path:
    """One finished run."""
    return copy_run(original(dataset), tmp_path / "runs" / "a", 1)


def page_of(folder: Path) -> Page:
    """The report of a folder, written and read again."""
    report.main([str(folder)])
    return Page((folder / "report.html").read_text())


def test_the_figures_are_those_of_the_summary(run):
    page = page_of(run)
    summary = json.loads((run / "summary.json").read_text())
    for name in (
        "val_bpb",
        "val_loss",
        "total_bytes",
        "train_seconds",
        "eval_seconds",
        "steps",
        "step_ms",
        "tokens_per_second",
        "hessian_seconds",
        "gptq_seconds",
        "pack_seconds",
        "code_bytes",
    ):
        assert summary[name] in page.numbers, name
    assert set(summary["bpb"].values()) <= set(page.numbers)
    text = " ".join(page.words)
    for title in (
        "Training loss",
        "Validation during training",
        "Learning rate",
        "Score by stage",
        "Time by part",
        "Bytes of the artifact",
        "Compliance",
        "Settings that differ from the defaults",
        "loops on",
    ):
        assert title in text, title
    assert "✓ legal" in text and summary["compliance"]["reason"] in text
    for name, value in summary["overrides"].items():
        assert name in page.words and (isinstance(value, bool) or str(value) in page.words), name


def test_every_training_loss_is_in_the_page(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    text = " ".join(page_of(run).words)
    losses = [r for r in records if r["kind"] == "train" and "train_loss" in r]
    assert len(losses) == 8
    for record in losses:
        assert f"{record['step']}: {record['train_loss']:.4f}" in text
    for record in records:
        if record["kind"] == "score" and record["stage"].startswith("step"):
            assert f"{record['stage'][4:]}: {record['val_bpb']:.4f}" in text


def test_records_that_a_resumption_made_void_are_not_drawn(run):
    (run / "documents.npz").unlink()  # its positions are numbers, too
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "resume", "step": 6, "seconds": 1.0}) + "\n")
        file.write(
            json.dumps({"kind": "train", "step": 7, "train_loss": 9.75, "rate": 0.5}) + '\n{"kind": "tra'
        )
    text = " ".join(page_of(run).words)
    assert "7: 9.7500" in text and "6: " in text and not re.search(r"\b8: \d\.\d{4}", text)


def test_the_areas_are_the_bytes_of_the_artifact_and_the_code(run):
    parts = report.artifact_parts(run / "final_model.ptz")
    assert sum(part.bytes for part in parts) == (run / "final_model.ptz").stat().st_size
    assert len(parts) > 3 and all(part.bytes > 0 for part in parts)
    drawn = report.treemap(parts)
    boxes = re.findall(
        r'class="role" style="left:([\d.]+)%;top:([\d.]+)%;width:([\d.]+)%;height:([\d.]+)%', drawn
    )
    areas = sorted(float(w) * float(h) / 1e4 for _, _, w, h in boxes)
    total = sum(part.bytes for part in parts)
    assert areas == pytest.approx(sorted(part.bytes / total for part in parts), abs=1e-4)


def test_the_page_needs_no_network_and_no_script(run):
    page_of(run)
    text = (run / "report.html").read_text()
    assert not re.search(r"https?:|//\w|<script|<link|<img|@import|url\(|\ssrc=", text)
    assert len(text) < 300_000 and "prefers-color-scheme:dark" in text and "width=device-width" in text


def test_text_from_a_run_is_escaped(run):
    edit(run / "summary.json", lambda s: s["compliance"].update(legal=False, reason="<b onclick=x>&"))
    page = page_of(run)
    assert "<b onclick=x>&" in " ".join(page.words) and "✗ not legal" in " ".join(page.words)
    assert not any("onclick" in attributes for _, attributes in page.tags)


def test_length_and_position_are_drawn_from_the_sums(run):
    tokens = np.array([5, 6, 100, 120])
    size = np.array([10, 20, 300, 500])
    nats = np.array([20.0, 30.0, 400.0, 450.0])
    np.savez(
        run / "documents.npz",
        tokens=tokens,
        bytes=size,
        nats=nats,
        position_start=[0, 8, 64],
        position_bytes=[100, 200, 0],
        position_nats=[150.0, 220.0, 0.0],
    )
    text = " ".join(page_of(run).words)
    assert f"4: {50 / math.log(2) / 30:.4f}" in text and f"64: {850 / math.log(2) / 800:.4f}" in text
    assert f"0: {1.5 / math.log(2):.4f}" in text and f"8: {1.1 / math.log(2):.4f}" in text


def test_an_unfinished_run_a_damaged_artifact_and_a_missing_folder(run, tmp_path):
    data = bytearray((run / "final_model.ptz").read_bytes())
    data[-1] ^= 1
    (run / "final_model.ptz").write_bytes(data)
    assert "a byte was changed" in " ".join(page_of(run).words)
    for name in ("summary.json", "stages.json", "final_model.ptz", "documents.npz"):
        (run / name).unlink(missing_ok=True)
    text = " ".join(page_of(run).words)
    assert "not finished" in text and "Training loss" in text and "Score by stage" not in text
    with pytest.raises(results.Stop, match="no such folder"):
        report.main([str(tmp_path / "nothing")])
    (run / "config.json").unlink()
    with pytest.raises(results.Stop, match="config.json: no such file"):
        report.main([str(run)])


def test_a_sweep_has_a_page_with_its_table_and_one_for_each_run(tmp_path, dataset):
    words = [
        "MATRIX_LR=0.02,0.03,9",
        "SEED=1,2",
        "--script",
        str(STAND_IN),
        "--out",
        str(tmp_path),
        "--name",
        "s",
    ]
    with pytest.raises(SystemExit):
        sweep.main(words)
    for seed in (1, 2):  # one with the files of a real run
        folder = tmp_path / "s" / f"MATRIX_LR-0.03_SEED-{seed}"
        shutil.rmtree(folder)
        copy_run(original(dataset), folder, seed, 1 - seed / 1000)
    page = page_of(tmp_path / "s")
    means = {row.settings["MATRIX_LR"]: row.mean for row in sweep.rows_of(tmp_path / "s", "val_bpb")}
    assert means["0.02"] in page.numbers and means["0.03"] in page.numbers
    assert means["0.02"] == pytest.approx(np.mean([stand_in.score(0.02, 5.25, seed) for seed in (1, 2)]))
    text = " ".join(page.words)
    assert "baseline" in text and "not finite" in text and "MATRIX_LR-9_SEED-1" in text
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert len(links) == 4 and all((tmp_path / "s" / link).is_file() for link in links)


def test_it_runs_as_a_command_from_any_folder(run, tmp_path):
    done = run_python([ROOT / "report.py", "--help"], folder=tmp_path)
    assert done.returncode == 0 and "usage:" in done.stdout
