"""bench/budget.py: counts are those of the model, and the arithmetic is that of the rates it names."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest

import train_gpt as t
from helpers import ROOT


@pytest.fixture(scope="module")
def tool():
    """The tool as a module."""
    spec = importlib.util.spec_from_file_location("budget", ROOT / "bench" / "budget.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "shape", [(5, 128, 2.5, 300), (6, 192, 4.0, 512)], ids=lambda shape: "x".join(map(str, shape))
)
def test_parameters_are_those_of_the_model(tool, monkeypatch, shape):
    small = t.dataclasses.replace(tool.AUDITED, loop_start=1, loop_end=2, parallel_start_layer=3)
    monkeypatch.setattr(tool, "AUDITED", small)
    shape = tool.Shape(*shape)
    model = t.GPT(tool.settings(shape))
    matrices, values = tool.count_parameters(model.config)
    assert matrices + values == sum(parameter.numel() for parameter in model.parameters())
    assert matrices == sum(
        t.matrix_weight(dict(model.named_parameters()), matrix).numel()
        for matrix in t.list_matrices(model.table)
    )


def test_the_audited_stack_is_the_origin_and_a_wider_mlp_costs_steps_and_bits(tool):
    audited = tool.budget(tool.Shape(11, 512, 4.0, 8192), 16_000_000, 50_000)
    assert audited.total == 0 and audited.steps == 1 and audited.parameters == 35_945_671
    wider = tool.budget(tool.Shape(11, 512, 5.0, 8192), 16_000_000, 50_000)
    more = 11 * 2 * 512 * 512
    assert wider.parameters == audited.parameters + more
    assert wider.steps == pytest.approx(120 / (120 + 1.3 * more / 1e6))
    assert wider.bits * (wider.parameters - 41_000) == pytest.approx(8 * 15_950_000 - 16 * 41_000, rel=1e-3)
    assert wider.by_parameters == pytest.approx(-0.075 * math.log(wider.parameters / audited.parameters))
    assert wider.by_packing == pytest.approx(t.packing_loss(wider.bits) - t.packing_loss(audited.bits))
    # A visit more of the same layer: what loops cost is part of the operations.
    assert wider.operations > 6 * wider.parameters


def test_time_depends_on_what_is_larger(tool):
    now = tool.Shape(11, 512, 4.0, 8192)
    deeper = tool.more_milliseconds(now._replace(layers=12))
    assert deeper == pytest.approx(4.5 * 2.885, rel=2e-2)
    assert tool.more_milliseconds(now._replace(vocabulary=16_384)) == pytest.approx(0.5 * 8192 * 512 / 1e6)
    both = tool.more_milliseconds(now._replace(layers=12, vocabulary=16_384))
    assert both == pytest.approx(deeper + 0.5 * 8192 * 512 / 1e6)


def test_it_prints_a_row_for_each_shape_and_the_best(tool, monkeypatch, capsys):
    monkeypatch.setattr(tool.t, "pack_source", lambda source: (b"x" * 50_000, ""))
    monkeypatch.setattr(tool.sys, "argv", ["budget.py", "--mlp", "5", "6"])
    tool.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines[2:5]] == ["4", "5", "6"]
    found = json.loads(lines[-1].removeprefix("RESULT "))
    assert found["best"]["mlp"] == 6.0 and found["code_bytes"] == 50_000
    assert [row["mlp"] for row in found["shapes"]] == [4.0, 5.0, 6.0]
