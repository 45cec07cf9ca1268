"""bench/mini.py: the parts of the difference between two recipes sum up to it."""

from __future__ import annotations

import json

import pytest

from bench import mini


def summary(trained: float, packed: float, final: float) -> dict:
    """summary.json of a run, as far as the bench reads it."""
    return {
        "bpb": {"prequant": trained, "quantized": packed, "ttt": final},
        "val_bpb": final,
        "artifact_bytes": 100,
        "operations": 6e12,
        "eval_passes": 5.5,
        "compliance": {"legal": True},
    }


@pytest.fixture
def runs(monkeypatch) -> dict[str, dict]:
    """What the trainer is asked for, by name; it gives scores that depend on recipe, seed and copies."""
    asked = {}

    def train(out, name, settings):
        asked[name] = dict(settings)
        shift = 0.01 * int(settings["SEED"])
        if settings["QUANTIZER"] == "sdclip":
            return summary(2.0 + shift, 2.03 + shift, 2.01 + shift)
        copies = settings.get("TTT_MIXTURE_COPIES") != "none"
        return summary(1.9 + shift, 1.91 + shift, (1.7 if copies else 1.8) + 2 * shift)

    monkeypatch.setattr(mini, "train", train)
    monkeypatch.setattr(
        mini.recipes, "read", lambda path: {"QUANTIZER": "sdclip" if "public" in path.name else "ours"}
    )
    return asked


def test_parts_sum_up_to_the_difference(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["mini.py", "--work", str(tmp_path), "--seeds", "1", "2"])
    assert mini.main() == 0
    result = json.loads(capsys.readouterr().out.rsplit("RESULT ", 1)[1])
    found = {part: result[part]["bpb"] for part in mini.PARTS}
    assert found == pytest.approx({"training": -0.1, "packer": -0.02, "evaluation": -0.075, "copies": -0.1})
    assert sum(found.values()) == pytest.approx(result["together"]["bpb"]) == pytest.approx(-0.295)
    assert result["without_copies"]["bpb"] == pytest.approx(-0.195)
    assert result["together"]["percent"] == pytest.approx(100 * -0.295 / 2.025, abs=0.01)
    # The score without copies is of the same artifact, and of no other training.
    again = runs["ours-1-without-copies"]
    assert again["STAGE"] == "evaluate" and again["ARTIFACT"].endswith("ours-1/final_model.ptz")
