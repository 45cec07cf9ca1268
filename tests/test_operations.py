"""Operations and passes: the script's own count is torch's, and budgets are kept."""

from __future__ import annotations

import json

import numpy as np
import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_gpt as t
from helpers import ROOT
from helpers.run_folders import original
from helpers.tensors import tokens
from helpers.trainer import launch, replace
from recipes import read as read_recipe


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
        levers = {"bigram_rows": 20, "mudd_last_n": 2} if batch is packed else {}
        chosen = replace(config, head_gate=gates, smear_gate=gates != "none", **levers)
        model = t.GPT(chosen)
        model.looped = looped
        ours = t.step_operations(chosen, looped, count, t.attention_pairs(batch))
        unsmeared = 6 * chosen.gate_width * len(batch.inputs) if chosen.smear_gate else 0
        assert counted(model, batch) == ours - unsmeared


def test_a_training_ends_with_its_operations_and_says_what_it_used(settings):
    config = t.Config.from_env(settings)
    plain, looped = (
        t.step_operations(config, loops, config.train_batch_tokens, config.train_batch_tokens * 32)
        for loops in (0, config.num_loops)
    )
    budget = 3 * plain + 4 * looped + looped // 2
    chosen = {"SCHEDULE": "operations", "TRAIN_OPERATIONS": str(budget), "ITERATIONS": "100"}
    chosen |= {"ENABLE_LOOPING_AT": str(2.5 * plain / budget), "RUN_ID": "a", "STAGE": "train"}
    chosen |= {"GPTQ_RESERVE_SECONDS": "0", "WARMUP_STEPS": "0"}
    done = launch(settings | chosen)
    assert done.returncode == 0, done.stderr
    facts = json.loads((t.Path(settings["OUT_DIR"]) / "a" / "stages.json").read_text())["train"]
    assert (facts["steps"], facts["operations"]) == (7, 3 * plain + 4 * looped)
    assert "stopped by TRAIN_OPERATIONS" in done.stdout and "loops on at step 3" in done.stdout


def test_passes_of_evaluation_are_counted_and_both_budgets_are_limits(dataset, config):
    summary = json.loads((original(dataset) / "summary.json").read_text())
    tokens = summary["val_tokens"]
    windows = [len(t.plan_windows(int(tokens) + 1, 32, stride)) for stride in (32, 8)]
    thirds = sum(-(-count // 64) * 64 * 32 for count in windows)  # whole batches of forwards
    assert summary["eval_passes"] == pytest.approx(thirds / 3 / tokens)
    assert {"passes", "operations"}.isdisjoint(summary["compliance"]["limits"])
    budget = {"eval_budget_passes": 2.0, "schedule": "operations", "train_operations": 1e9}
    facts = summary | {"operations": 10**8}
    verdict = t.judge(replace(config, **budget), facts, adapted=False, own_artifact=True)
    assert verdict["limits"]["operations"] == (10**8, 1e9) and not verdict["legal"]
    assert verdict["limits"]["passes"] == (summary["eval_passes"], 2.0) and "passes: " in verdict["reason"]
    facts["eval_passes"] = 1.5
    assert t.judge(replace(config, **budget), facts, adapted=False, own_artifact=True)["legal"]


@pytest.mark.parametrize("chosen", [{"SCHEDULE": "operations"}, {"TRAIN_OPERATIONS": "1e9"}])
def test_operations_are_a_budget_of_their_own_schedule_alone(chosen):
    with pytest.raises(t.Stop, match="SCHEDULE=operations needs TRAIN_OPERATIONS, and no other"):
        t.Config.from_env(chosen)


def test_the_recipes_of_the_mini_contest_keep_to_one_rule():
    ours, public = (read_recipe(ROOT / f"records/recipes/{name}.env") for name in ("mini", "mini_public"))
    config = t.Config.from_env(ours)
    differs = {name for name in ours.keys() | public.keys() if ours.get(name) != public.get(name)}
    assert differs == {
        "ARTIFACT_TARGET_BYTES",
        "QUANTIZER",
        "TTT_LORA_LR",
        *(f"{n}_CLIP_SIGMAS" for n in ("ATTN", "MLP", "EMBED")),
    }
    assert t.Config.from_env(public).train_operations == config.train_operations == 6e12
    entries = sum(t.math.prod(spec.shape) for spec in t.parameter_table(config).values())
    assert 500_000 < entries < 510_000
    # Our best one keeps to the same rule, and has another evaluation.
    best = t.Config.from_env(read_recipe(ROOT / "records/recipes/mini_flagship.env"))
    rule = ("datasets_dir", "vocab_size", "schedule", "train_operations", "artifact_target_bytes")
    for name in (*rule, "eval_budget_passes", "num_layers", "model_dim", "mlp_mult", "train_batch_tokens"):
        assert getattr(best, name) == getattr(config, name)
    assert best.ttt_mode == "mixture" and best.quantizer == config.quantizer
    # The parts of the contest are all there.
    assert config.num_loops and config.parallel_residual == "two_lane" and config.smear_gate
    assert config.head_gate == "sparse" and config.ttt_mode == "doc_lora" and config.eval_budget_passes == 40
