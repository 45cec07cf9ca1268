"""Operations and passes: the script's own count is torch's, and budgets are kept."""

from __future__ import annotations

import json

import numpy as np
import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_gpt as t
from helpers.tensors import tokens
from helpers.trainer import launch, replace


def counted(model: t.GPT, batch: t.Batch) -> int:
    """What torch counts in a forward and backward; attention with its scores, which a fused one hides."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(batch).mean().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("looped", [False, True])
def test_the_operations_of_a_step_are_what_torch_counts(config, looped):
    rows = tokens(config)
    flat = rows._replace(inputs=rows.inputs.reshape(1, -1), targets=rows.targets.reshape(1, -1))
    count = rows.inputs.numel()
    starts = t.segment_starts(flat.inputs[0].numpy(), config.train_seq_len, np.array([5, 21]))
    packed = flat._replace(starts=starts, longest=config.train_seq_len)
    for batch, gates in ((rows, "sparse"), (packed, "sparse"), (rows, "none")):
        chosen = replace(config, head_gate=gates, smear_gate=gates != "none")
        model = t.GPT(chosen)
        model.looped = looped
        ours = t.step_operations(chosen, looped, count, t.attention_pairs(batch))
        unsmeared = 6 * chosen.gate_width * len(batch.inputs) if chosen.smear_gate else 0
        assert counted(model, batch) == ours - unsmeared


def test_a_training_ends_with_its_operations_and_says_what_it_used(settings):
    config = t.Config.from_env(settings)
    plain, looped = (
        t.step_operations(config, state, config.train_batch_tokens, config.train_batch_tokens * 32)
        for state in (False, True)
    )
    budget = 3 * plain + 4 * looped + looped // 2
    chosen = {
        "SCHEDULE": "operations",
        "TRAIN_OPERATIONS": str(budget),
        "ITERATIONS": "100",
        "TTT_ENABLED": "0",
    }
    chosen |= {"EVAL_BUDGET_PASSES": "0.1", "ENABLE_LOOPING_AT": str(2.5 * plain / budget), "RUN_ID": "a"}
    done = launch(settings | chosen)
    assert done.returncode == 0, done.stderr
    folder = t.Path(settings["OUT_DIR"]) / "a"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["steps"], summary["operations"]) == (7, 3 * plain + 4 * looped)
    assert "stopped by TRAIN_OPERATIONS" in done.stdout and "loops on at step 3" in done.stdout
    limits = summary["compliance"]["limits"]
    assert limits["operations"] == [summary["operations"], budget]
    # Plain scores are a third of a pass each; the windows of the sliding one overlap by three quarters.
    assert limits["passes"] == [summary["eval_passes"], 0.1] and summary["eval_passes"] > 1 / 3 + 4 / 3
    assert "passes: " in summary["compliance"]["reason"] and not summary["compliance"]["legal"]


@pytest.mark.parametrize("chosen", [{"SCHEDULE": "operations"}, {"TRAIN_OPERATIONS": "1e9"}])
def test_operations_are_a_budget_of_their_own_schedule_alone(chosen):
    with pytest.raises(t.Stop, match="SCHEDULE=operations needs TRAIN_OPERATIONS, and no other"):
        t.Config.from_env(chosen)
