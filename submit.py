#!/usr/bin/env python3
"""Check the runs of several seeds and make the record folder of a submission from them.

    ./submit.py runs/A runs/B runs/C --name MyIdea --baseline 1.06108,0.0009,3
    ./submit.py runs/A runs/B runs/C --name MyIdea --track demo         not on the contest's data or hardware
    ./submit.py runs/A runs/B runs/C --name MyIdea --check              first score every artifact again

Nothing is written unless everything fits: one configuration, one code, one dataset, no seed twice, no started
seed left out, every limit kept, every byte there, and the score following from its sums. --check also runs
the packed script of each run from an empty folder, without network and training shards, on the artifact: it
must give the same score.
"""

from __future__ import annotations

import environment

environment.enter()
import argparse
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from results import (
    PLACES,
    Run,
    Stop,
    check_present,
    check_summary,
    conditions,
    is_number,
    mean_std,
    place_of,
    place_of_data,
    read_documents,
    read_json,
    read_plan,
    run_tool,
    show,
    text_of,
    welch,
    write_atomically,
)

ROOT = Path(__file__).resolve().parent
RECORD_TRACK = "track_10min_16mb"
CAP_BYTES = 16_000_000
BUDGET_SECONDS = 600
RANKS = 8
GPU = "H100"
DOCUMENTS = 50_000
SEEDS = 3
MARGIN_NATS = 0.005  # the written rule
MARGIN_P = 0.01
APPLIED_P = 0.25  # the one applied since 2026-04-28 (#1902)
FILES = (
    "config.json",
    "summary.json",
    "stages.json",
    "metrics.jsonl",
    "train.log",
    "final_model.ptz",
    "packed_train_gpt.py",
)
RECORDED = (  # in summary.json
    *("val_bpb", "val_loss", "val_tokens", "val_bytes", "bpb", "artifact_bytes", "code_bytes", "total_bytes"),
    *("artifact_sha256", "train_seconds", "eval_seconds", "steps", "seed", "world_size", "overrides"),
    *("versions.source_sha256", "versions.device", "versions.torch", "data.tokenizer", "compliance.legal"),
)
SETTINGS = (  # in config.json
    *("SEED", "DATA_DIR", "DATASETS_DIR", "TOKENIZER_PATH", "VOCAB_SIZE", "NUM_LAYERS", "MODEL_DIM"),
    *("NUM_LOOPS", "LOOP_START", "LOOP_END", "MATRIX_BITS", "EMBED_BITS", "COMPRESSOR", "TRELLIS_STATES"),
    *("ARTIFACT_CAP_BYTES", "MAX_WALLCLOCK_SECONDS", "EVAL_BUDGET_SECONDS"),
)
SAME_VERSIONS = ("python", "torch", "numpy", "triton", "cuda", "device", "dtype")
ROUNDING = 1e-9  # relative; sums are kept in fp64
AGAIN = 1e-4  # relative; adapting with atomic additions on a GPU gives about 1e-5 between two scorings

Ask = Callable[[str], Any]  # the value of a setting, None if this version has no such setting

# Whose ideas the settings use: (idea, pull requests of the public repository, whether the settings use it).
CREDITS: list[tuple[str, str, Callable[[Ask], Any]]] = [
    ("layers passed several times in a U-Net", "#1394, #1493", lambda of: of("NUM_LOOPS")),
    (
        "two residual lanes with learned routing",
        "#1204, #1529",
        lambda of: of("PARALLEL_RESIDUAL") == "two_lane",
    ),
    ("attention confined to packed documents", "#1530", lambda of: of("LOADER") == "packed"),
    ("gate on the attention output", "#1667, #1693", lambda of: of("HEAD_GATE") == "attn_out"),
    ("sparse attention gate", "#1787", lambda of: of("HEAD_GATE") == "sparse"),
    ("SmearGate", "#1667", lambda of: of("SMEAR_GATE")),
    ("no smearing into a new document", "#1851", lambda of: of("SMEAR_GATE") and of("SMEAR_GATE_BOS_FIX")),
    ("Polar Express coefficients in Muon", "#1787", lambda of: of("MUON_COEFFICIENTS") == "polar_express"),
    ("taper of the weight decay", "#1729", lambda of: (of("WD_TAPER_START_FRAC") or 1) < 1),
    ("each rank clips its own gradient", "#1585, #1693", lambda of: of("GRAD_CLIP_SCOPE") == "local"),
    ("GPTQ with clipping by standard deviations (SDClip)", "#1394", lambda of: of("ATTN_CLIP_SIGMAS")),
    (
        "adapters per document at evaluation",
        "#1530",
        lambda of: of("TTT_ENABLED") and of("TTT_MODE") in ("doc_lora", "mixture"),
    ),
    (
        "phases of SGD on scored documents",
        "#1610, #1693",
        lambda of: (
            of("TTT_ENABLED") and of("TTT_MODE") in ("doc_lora", "mixture") and of("PHASED_TTT_NUM_PHASES")
        ),
    ),
    (
        "SGD on chunks after they were scored",
        "#1493, #1585",
        lambda of: of("TTT_ENABLED") and of("TTT_MODE") == "chunk_sgd",
    ),
    (
        "hashed pair embedding learnt at evaluation",
        "#1523",
        lambda of: of("TTT_ENABLED") and of("TTT_MODE") == "chunk_sgd" and of("HASH_EMBED_ENABLED"),
    ),
]


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def close(a: Any, b: Any) -> bool:
    """Whether two recorded numbers are the same up to fp64 rounding."""
    return is_number(a) and is_number(b) and math.isclose(a, b, rel_tol=ROUNDING)


def bpb_of(nats: float, count: float) -> float:
    """Bits per byte of a sum of nats."""
    return nats / math.log(2) / count


# === WHAT ONE RUN MUST SATISFY ===


def check_run(run: Run) -> None:
    """Stop at the first thing wrong: a missing file, a broken limit, a figure that does not follow."""
    for name in FILES:
        if not (run.folder / name).is_file():
            raise Stop(
                f"{run.folder / name}: missing; finish the run (the same command goes on) or copy the whole "
                "folder"
            )
    summary = run.summary
    again = f"score the run again with STAGE=evaluate RUN_ID={run.folder.name}"
    foreign = "a run evaluated from a foreign ARTIFACT cannot be submitted"
    check_present(run.folder / "summary.json", summary, RECORDED, f"{again}, and {foreign}")
    check_present(run.folder / "config.json", run.config, SETTINGS, "copy it again, or repeat the run")
    check_score(run, summary)
    check_bytes(run, summary)
    for name, value in summary["overrides"].items():
        if run.config.get(name) != value:
            raise Stop(
                f"{run.folder / 'summary.json'}: overrides say {name}={value}, config.json "
                f"{run.config.get(name)}; one of the files was changed, score the run again"
            )
    if summary["seed"] != run.seed:
        raise Stop(
            f"{run.folder / 'summary.json'}: seed {summary['seed']}, but config.json says SEED={run.seed}; "
            "one of the files was changed, repeat the run"
        )
    if run.source != summary["versions"]["source_sha256"]:
        raise Stop(
            f"{run.folder / 'summary.json'}: source_sha256 {summary['versions']['source_sha256'][:16]}, but "
            f"train.log says {run.source[:16] or 'nothing'}; one of the files was changed, repeat the run"
        )
    compliance = summary["compliance"]
    if compliance.get("legal") is not True:
        raise Stop(
            f"{run.folder}: not a legal run ({compliance.get('reason', 'no reason given')}); an illegal run "
            "cannot be submitted, repeat it within the limits"
        )
    for name, verdict, evidence in conditions(compliance):
        if verdict == "BROKEN":
            raise Stop(
                f"{run.folder}: condition {name} is broken ({evidence}) though the run says legal; repeat it"
            )


def check_score(run: Run, summary: dict[str, Any]) -> None:
    """Stop unless the score follows from its sums and every place that records it says the same."""
    path = run.folder / "summary.json"
    remedy = "score the run again with STAGE=evaluate"
    follows = bpb_of(summary["val_loss"] * summary["val_tokens"], summary["val_bytes"])
    if not close(follows, summary["val_bpb"]):
        raise Stop(
            f"{path}: val_bpb {summary['val_bpb']} does not follow from val_loss, val_tokens and val_bytes, "
            f"which give {follows}; {remedy}"
        )
    stage, last = list(summary["bpb"].items())[-1]
    scores = [r for r in run.records() if r.get("kind") == "score" and r.get("stage") == stage]
    recorded = {
        f"bpb.{stage} there": {"val_bpb": last},
        "stages.json": run.stages().get("evaluate", {}),
        f"the last {stage} record of metrics.jsonl": scores[-1] if scores else {},
    }
    for place, facts in recorded.items():
        for name in ("val_bpb", "val_loss"):
            if (name in facts or name == "val_bpb") and not close(facts.get(name), summary[name]):
                raise Stop(
                    f"{path}: {name} {summary[name]}, but {place} says {facts.get(name)}; one of the files "
                    f"was changed, {remedy}"
                )
    finals = re.findall(r"^final val_loss:(\S+) val_bpb:(\S+)", run.log, re.M)
    if not finals or finals[-1] != (f"{summary['val_loss']:.8f}", f"{summary['val_bpb']:.8f}"):
        raise Stop(
            f"{path}: val_loss {summary['val_loss']:.8f} val_bpb {summary['val_bpb']:.8f}, but the last line "
            f"`final` of train.log says {' '.join(finals[-1]) if finals else 'nothing'}; {remedy}"
        )
    if documents := read_documents(run.folder):
        tokens = int(documents.tokens.sum())
        count = int(documents.bytes.sum())
        sums = bpb_of(float(documents.nats.sum()), count)
        if (tokens, count) != (summary["val_tokens"], summary["val_bytes"]) or not close(
            sums, summary["val_bpb"]
        ):
            raise Stop(
                f"{run.folder / 'documents.npz'}: its sums give val_bpb {sums} over {tokens} tokens and "
                f"{count} bytes, summary.json says {summary['val_bpb']} over {summary['val_tokens']:.0f} and "
                f"{summary['val_bytes']:.0f}; {remedy}"
            )


def check_bytes(run: Run, summary: dict[str, Any]) -> None:
    """Stop unless artifact and packed script are those that the summary describes, and under the cap."""
    artifact = run.folder / "final_model.ptz"
    code = run.folder / "packed_train_gpt.py"
    for path, name in ((artifact, "artifact_bytes"), (code, "code_bytes")):
        if path.stat().st_size != summary[name]:
            raise Stop(
                f"{path}: {path.stat().st_size} bytes, but summary.json says {name} {summary[name]}; copy "
                "the run folder again, or repeat STAGE=quantize and STAGE=evaluate"
            )
    if file_hash(artifact) != summary["artifact_sha256"]:
        raise Stop(
            f"{artifact}: not the artifact that was scored (its sha256 differs from summary.json's); copy "
            "the run folder again, or score it with STAGE=evaluate"
        )
    total = summary["artifact_bytes"] + summary["code_bytes"]
    cap = min(CAP_BYTES, run.setting("ARTIFACT_CAP_BYTES"))
    if total != summary["total_bytes"]:
        raise Stop(
            f"{run.folder / 'summary.json'}: total_bytes {summary['total_bytes']}, but artifact and code "
            f"have {total}; the file was changed, score the run again"
        )
    if total > cap:
        raise Stop(
            f"{run.folder}: artifact and code have {total} bytes, {total - cap} over the cap of {cap}; raise "
            "the clip sigmas or lower the bits, and repeat STAGE=quantize"
        )


# === WHAT THE RUNS MUST SATISFY TOGETHER ===


def check_same(runs: list[Run]) -> None:
    """Stop unless all runs have one configuration, code, dataset and machine, and each seed occurs once."""
    first = runs[0]
    summary = runs[0].summary
    for run in runs[1:]:
        ours = first.settings("SEED")
        theirs = run.settings("SEED")
        other = run.summary
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                raise Stop(
                    f"{run.folder}: {name}={theirs.get(name)}, but {first.folder} has "
                    f"{name}={ours.get(name)}; "
                    "runs of one submission differ in SEED only"
                )
        for name in ("source_sha256", *SAME_VERSIONS):
            if summary["versions"].get(name) != other["versions"].get(name):
                raise Stop(
                    f"{run.folder}: {name} {other['versions'].get(name)}, but {first.folder} has "
                    f"{summary['versions'].get(name)}; repeat the runs with the same code on the same machine"
                )
        if summary["world_size"] != other["world_size"]:
            raise Stop(
                f"{run.folder}: world_size {other['world_size']}, but {first.folder} has "
                f"{summary['world_size']}; repeat the runs on the same number of GPUs"
            )
        if file_hash(first.folder / "packed_train_gpt.py") != file_hash(run.folder / "packed_train_gpt.py"):
            raise Stop(
                f"{run.folder / 'packed_train_gpt.py'}: differs from {first.folder.name}'s; one of the files "
                "was changed, repeat STAGE=quantize and STAGE=evaluate"
            )
        for name in sorted(summary["data"].keys() | other["data"].keys()):
            if summary["data"].get(name) != other["data"].get(name):
                raise Stop(
                    f"{run.folder}: data {name} {other['data'].get(name)}, but {first.folder} has "
                    f"{summary['data'].get(name)}; repeat the runs on the same dataset"
                )
    seeds: dict[Any, Run] = {}
    for run in runs:
        if (twin := seeds.setdefault(run.seed, run)) is not run:
            raise Stop(f"{run.folder}: SEED={run.seed} again, as in {twin.folder}; give each seed once")


def started(runs: list[Run]) -> Iterator[tuple[Path, Any, str]]:
    """(folder, seed, state) of every run of this configuration and code that is not among the given ones.

    Looked for beside the given ones, and in the plan of their sweep.
    """
    given = {run.folder.resolve() for run in runs}
    settings = runs[0].settings("SEED")
    source = runs[0].summary["versions"]["source_sha256"]
    for parent in sorted({run.folder.resolve().parent for run in runs}):
        for path in sorted(parent.glob("*/config.json")):
            run = Run.read(path.parent)
            if path.parent in given or run.config.get("ARTIFACT") or run.settings("SEED") != settings:
                continue
            if (path.parent / "train.log").exists() and run.source == source:
                yield path.parent, run.seed, "finished" if run.is_finished else "started, not finished"
        plan = read_plan(parent)["runs"] if (parent / "sweep.json").exists() else {}
        same = [without_seed(plan[run.folder.name]) for run in runs if run.folder.name in plan]
        for name, chosen in plan.items():
            if without_seed(chosen) in same and not (parent / name / "config.json").exists():
                yield parent / name, chosen.get("SEED"), "planned by the sweep, not started"


def without_seed(chosen: dict[str, Any]) -> dict[str, Any]:
    """The settings of a planned run apart from the seed."""
    return {name: value for name, value in chosen.items() if name != "SEED"}


def check_complete(runs: list[Run], left_out: dict[Path, str]) -> None:
    """Stop if a run of the same experiment exists that is neither given nor left out with a reason."""
    found = set()
    for folder, seed, state in started(runs):
        found.add(folder)
        if folder not in left_out:
            shown = os.path.relpath(folder)
            raise Stop(
                f"{shown}: SEED={seed} of the same settings and code ({state}) is not among the runs given; "
                f"finish and add it, or name the reason with --leave-out {shlex.quote(shown + '=REASON')}"
            )
    for folder in left_out.keys() - found:
        raise Stop(
            f"--leave-out {os.path.relpath(folder)}: no run of the same settings and code that is not given; "
            "drop the argument"
        )


def check_record_track(run: Run) -> None:
    """Stop unless a run is one of the contest's: its data, hardware and limits."""
    summary = run.summary
    data = run.summary["data"]
    remedy = "use the contest's, or submit to another track, as in --track non-record"
    from verify_bytes import CANONICAL

    low = min(c.credited[0] for c in CANONICAL.values())
    high = max(c.credited[1] for c in CANONICAL.values())
    if data.get("docs_val") != DOCUMENTS or not low <= summary["val_bytes"] <= high:
        raise Stop(
            f"{run.folder}: scored on {data.get('docs_val', 'an unknown number of')} documents with "
            f"{summary['val_bytes']:.0f} bytes, but the contest's validation set has {DOCUMENTS} with {low} "
            f"to {high}; {remedy}"
        )
    if summary["world_size"] != RANKS or GPU not in summary["versions"]["device"]:
        raise Stop(
            f"{run.folder}: run on {summary['world_size']} x {summary['versions']['device']}, but the record "
            f"track is for {RANKS} x {GPU}; {remedy}"
        )
    for name, used, limit in (
        ("MAX_WALLCLOCK_SECONDS", run.setting("MAX_WALLCLOCK_SECONDS"), BUDGET_SECONDS),
        ("EVAL_BUDGET_SECONDS", run.setting("EVAL_BUDGET_SECONDS"), BUDGET_SECONDS),
        ("train_seconds", summary["train_seconds"], BUDGET_SECONDS),
        ("eval_seconds", summary["eval_seconds"], BUDGET_SECONDS),
    ):
        if used > limit:
            raise Stop(f"{run.folder}: {name} {used:g} is over the record track's {limit}; {remedy}")


# === THE SECOND SCORE (--check) ===


def score_alone(run: Run) -> tuple[dict[str, Any], bool]:
    """The summary of the packed script on the artifact in an empty folder, and whether it had no network.

    It has no training shards either.
    """
    summary = run.summary
    folder = place_of_data(run)
    if not folder.is_dir():
        raise Stop(
            f"DATASETS_DIR={folder}: the dataset of {run.folder} is not there; run --check where it is"
        )
    with tempfile.TemporaryDirectory(prefix="check-") as empty:
        place = Path(empty)
        shutil.copy(run.folder / "packed_train_gpt.py", place / "train_gpt.py")
        shutil.copy(run.folder / "final_model.ptz", place / "model.ptz")
        (place / "data").mkdir()
        for path in [*folder.glob("fineweb_val_*.bin"), *folder.glob("manifest.json")]:
            (place / "data" / path.name).symlink_to(path.resolve())
        shutil.copy(tokenizer_of(run, None), place / "data" / "tokenizer.model")
        settings = {name: show(value) for name, value in summary["overrides"].items() if name not in PLACES}
        settings |= {
            "STAGE": "evaluate",
            "ARTIFACT": "model.ptz",
            "RUN_ID": "again",
            "OUT_DIR": "runs",
            "DATASETS_DIR": "data",
            "TOKENIZER_PATH": "data/tokenizer.model",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "train_gpt.py"]
        if summary["world_size"] > 1:
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc_per_node={summary['world_size']}",
                "train_gpt.py",
            ]
        wall = [
            "unshare",
            "--map-root-user",
            "--net",
            "sh",
            "-c",
            'ip link set lo up 2>/dev/null; exec "$@"',
            "sh",
        ]
        offline = (
            shutil.which("unshare") is not None
            and subprocess.run([*wall, "true"], capture_output=True, check=False).returncode == 0
        )
        done = subprocess.run(
            [*(wall if offline else []), *command],
            cwd=place,
            env=clean_environment(run) | settings,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            error = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise Stop(f"{run.folder}: its packed script fails in an empty folder: {' '.join(error)}")
        path = place / "runs" / "again" / "summary.json"
        again = check_summary(path, read_json(path))
        check_present(path, again, ("val_bpb", "compliance"), "its packed script records no score")
        return again, offline


def score_again(run: Run) -> str:
    """What the packed script alone scores, in words; Stop unless it is what the run has recorded."""
    summary, (again, offline) = run.summary, score_alone(run)
    if not math.isclose(again["val_bpb"], summary["val_bpb"], rel_tol=AGAIN):
        raise Stop(
            f"{run.folder}: its packed script scores {again['val_bpb']:.8f} in an empty folder, summary.json "
            f"says {summary['val_bpb']:.8f}; the score is not that of these bytes"
        )
    for name, verdict, evidence in conditions(
        {k: v for k, v in again["compliance"].items() if k != "limits"}
    ):
        if verdict == "BROKEN":
            raise Stop(f"{run.folder}: condition {name} is broken in the second scoring ({evidence})")
    return (
        f"{run.folder.name}: the packed script alone gives val_bpb {again['val_bpb']:.8f} again, "
        f"{'without network' if offline else 'network not cut off (unshare is not permitted here)'}, without "
        "training shards"
    )


def probe(run: Run, track: str) -> tuple[str, dict[str, Any]]:
    """What compliance.py finds on a sample of the run's documents: in words, and the conditions found.

    Some documents are decoded from their code, too. Stop at the first violation.
    """
    import compliance

    # score_again has run the packed script on all of them
    report = compliance.check(run.folder, alone=False, decode=compliance.DECODE)
    found = report.as_json()
    write_atomically(run.folder / "compliance.json", json.dumps(found, indent=1))
    for row in report.rows:  # another track may have budgets of its own
        if row.holds is False and (track == RECORD_TRACK or row.group != "budgets"):
            raise Stop(f"{run.folder}: {row.group}: {row.probe}: {row.evidence}")
    measured = [row for row in report.rows if row.holds is not None]
    held = sum(row.holds for row in measured)
    return f"{run.folder.name}: {held} of {len(measured)} compliance probes hold", found["conditions"]


def clean_environment(run: Run) -> dict[str, str]:
    """This process's environment without a setting of the trainer or a launcher's numbers."""
    kept = {name: value for name, value in os.environ.items() if name not in run.config}
    environment.forget_launcher(kept)
    return kept


def tokenizer_of(run: Run, given: Path | None) -> Path:
    """The tokenizer of the run's dataset; Stop if it is not found or not the one that the run used."""
    shared = f"{run.setting('DATA_DIR')}/tokenizers/fineweb_{run.setting('VOCAB_SIZE')}_bpe.model"
    places = [place_of_data(run) / "tokenizer.model", place_of(shared)]
    if given:
        places = [given]
    elif named := run.setting("TOKENIZER_PATH"):
        places = [place_of(named)]
    path = next(filter(Path.is_file, places), None)
    if path is None:
        raise Stop(f"{places[0]}: the tokenizer of {run.folder} is not there; name it with --tokenizer PATH")
    if not file_hash(path).startswith(run.summary["data"]["tokenizer"]):
        raise Stop(
            f"{path}: not the tokenizer of {run.folder} (its sha256 starts with {file_hash(path)[:16]} "
            f"instead of {run.summary['data']['tokenizer']}); name the right one with --tokenizer PATH"
        )
    return path


# === STATISTICS ===


def read_baseline(text: str | None, record: Path | None) -> tuple[float, float, int] | None:
    """(mean, standard deviation, number of seeds) of the score to beat; None if none is given."""
    if text:
        try:
            mean, std, count = text.split(",")
            moments = float(mean), float(std), int(count)
        except ValueError:
            raise Stop(
                f"--baseline {text}: give mean,std,n of the score to beat, as in 1.06108,0.0009,3"
            ) from None
        if not (0 < moments[0] < math.inf and 0 <= moments[1] < math.inf and moments[2] > 1):
            raise Stop(
                f"--baseline {text}: needs a mean above 0, a standard deviation of at least 0 and n above 1"
            )
        return moments
    if not record:
        return None
    facts = read_json(record / "submission.json" if record.is_dir() else record)
    results = facts.get("seed_results") or {}
    rows = results.values() if isinstance(results, dict) else results if isinstance(results, list) else []
    values = [row["val_bpb"] for row in rows if isinstance(row, dict) and is_number(row.get("val_bpb"))]
    if len(values) > 1:
        return *mean_std(values), len(values)
    mean, std, seeds = (facts.get(name) for name in ("val_bpb", "val_bpb_std", "seeds"))
    if is_number(mean) and is_number(std) and std >= 0 and isinstance(seeds, list) and len(seeds) > 1:
        return mean, std, len(seeds)
    raise Stop(
        f"--baseline-record {record}: its submission.json has neither seed_results of two seeds nor val_bpb, "
        "val_bpb_std and seeds; give --baseline mean,std,n"
    )


def compare(runs: list[Run], baseline: tuple[float, float, int]) -> dict[str, Any]:
    """How far the runs lie below a baseline, in bits per byte and nats per token, and with what certainty."""
    values = [run.summary["val_bpb"] for run in runs]
    if len(values) < 2:
        raise Stop(
            f"{runs[0].folder}: one run has no standard deviation; --baseline needs at least two seeds"
        )
    mean, std, count = baseline
    summary = runs[0].summary
    nats_per_bpb = summary["val_loss"] / summary["val_bpb"]
    gain = mean - mean_std(values)[0]
    lower = welch(values, mean, std, count)
    by_margin = welch(values, mean - MARGIN_NATS / nats_per_bpb, std, count)
    return {
        "baseline_bpb": mean,
        "baseline_std": std,
        "baseline_seeds": count,
        "gain_bpb": gain,
        "gain_nats_per_token": gain * nats_per_bpb,
        "p_lower": lower,
        "p_lower_by_0.005_nats": by_margin,
        "meets_0.005_nats_at_p_0.01": gain * nats_per_bpb >= MARGIN_NATS and by_margin < MARGIN_P,
        "meets_p_0.25": gain > 0 and lower < APPLIED_P,
    }


def verdict_of(comparison: dict[str, Any]) -> list[str]:
    """The comparison in sentences."""
    c = comparison
    met = lambda holds: "met" if holds else "NOT met"
    return [
        f"Baseline {c['baseline_bpb']:.5f} (std {c['baseline_std']:.5f}, {c['baseline_seeds']} seeds): lower "
        f"by {c['gain_bpb']:.5f} BPB = {c['gain_nats_per_token']:.5f} nats per token; one-sided Welch test "
        f"p = {c['p_lower']:.4g}.",
        f"At least {MARGIN_NATS} nats per token lower at p < {MARGIN_P} (the written rule): "
        f"{met(c['meets_0.005_nats_at_p_0.01'])}, p = {c['p_lower_by_0.005_nats']:.4g}.",
        f"Lower at p < {APPLIED_P} (the rule as applied): {met(c['meets_p_0.25'])}.",
    ]


# === THE FOLDER ===


def command_of(run: Run, seeds: list[Any]) -> str:
    """The shell command that repeats the runs, from the overrides; absolute places are left to fill in."""
    words = []
    for name, value in run.summary["overrides"].items():
        if name in ("SEED", "RUN_ID", "OUT_DIR", "STAGE", "ARTIFACT"):
            continue
        text = show(value)
        if name in PLACES and Path(text).is_absolute():
            text = f"/path/to/{Path(text).name}"
        words.append(f"{name}={shlex.quote(text)}")
    ranks = run.summary["world_size"]
    start = f"torchrun --standalone --nproc_per_node={ranks}" if ranks > 1 else "python"
    lines = []
    line = f"  SEED=$seed RUN_ID={'seed$seed'}"
    for word in [*words, f"{start} train_gpt.py"]:
        if len(line) + len(word) > 116:
            lines.append(line + " \\")
            line = "   "
        line += " " + word
    return "\n".join([f"for seed in {' '.join(map(str, seeds))}; do", *lines, line, "done"])


def description(run: Run) -> str:
    """What the model is, in a sentence made from its settings."""
    c = run.config
    loops = (
        f", layers {c['LOOP_START']} to {c['LOOP_END']} passed {c['NUM_LOOPS'] + 1} times"
        if c["NUM_LOOPS"]
        else ""
    )
    parameters = re.search(r"model_params:(\d+)", run.log)
    size = f" ({int(parameters[1]):,} parameters)" if parameters else ""
    stage = list(run.summary["bpb"])[-1]
    rounding = (
        f"to {c['MATRIX_BITS']} bits, the embedding to {c['EMBED_BITS']}, packed with {c['COMPRESSOR']}"
    )
    if c.get("QUANTIZER") == "rate_distortion":
        rounding = (
            f"on a trellis of {c['TRELLIS_STATES']} states with rate-distortion steps, filled to a set size"
        )
    return (
        f"A transformer of {c['NUM_LAYERS']} layers and width {c['MODEL_DIM']}{loops}{size}, vocabulary "
        f"{c['VOCAB_SIZE']}, trained with Muon and Adam; matrices quantised with GPTQ {rounding}. Scored "
        f"from the bytes of the artifact (stage `{stage}`)."
    )


def credits_of(run: Run) -> list[str]:
    """Whose ideas the settings use."""
    return [f"{idea}: {who}" for idea, who, uses in CREDITS if uses(run.config.get)]


def submission(
    runs: list[Run], options: argparse.Namespace, comparison: dict[str, Any] | None, left_out: dict[Path, str]
) -> dict[str, Any]:
    """The content of submission.json."""
    first = runs[0].summary
    summaries = [run.summary for run in runs]
    bpb, loss = (mean_std([s[name] for s in summaries]) for name in ("val_bpb", "val_loss"))
    keep = (
        "val_bpb",
        "val_loss",
        "bpb",
        "val_tokens",
        "val_bytes",
        "steps",
        "step_ms",
        "train_seconds",
        "eval_seconds",
        "artifact_bytes",
        "code_bytes",
        "total_bytes",
        "artifact_sha256",
    )
    known = lambda value: None if math.isnan(value) else value
    return {
        "author": options.author,
        "github_id": options.github_id,
        "name": options.name,
        "blurb": options.blurb or description(runs[0]),
        "date": options.date,
        "track": options.track,
        "val_loss": loss[0],
        "val_bpb": bpb[0],
        "val_loss_std": known(loss[1]),
        "val_bpb_std": known(bpb[1]),
        "seeds": [run.seed for run in runs],
        "seed_results": {str(run.seed): {name: run.summary.get(name) for name in keep} for run in runs},
        "bytes_total": max(s["total_bytes"] for s in summaries),
        "bytes_code": first["code_bytes"],
        "bytes_model": max(s["artifact_bytes"] for s in summaries),
        "hardware": f"{first['world_size']} x {first['versions']['device']}",
        "pytorch_version": first["versions"]["torch"],
        "source_sha256": first["versions"]["source_sha256"],
        "data": first["data"],
        "overrides": without_seed({n: v for n, v in first["overrides"].items() if n in runs[0].settings()}),
        "compliance": {str(run.seed): run.summary["compliance"] for run in runs},
        "comparison": comparison,
        "left_out": {folder.name: reason for folder, reason in left_out.items()},
    }


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def readme(runs: list[Run], facts: dict[str, Any], notes: list[str], measured: bool) -> str:
    """The text of the folder's README; `measured` says that the facts hold what --check found."""
    first = runs[0].summary
    results = facts["seed_results"]
    stages = list(first["bpb"])
    rows = [
        [
            seed,
            r["steps"],
            *(f"{r['bpb'][stage]:.5f}" for stage in stages),
            f"**{r['val_bpb']:.5f}**",
            f"{r['val_loss']:.5f}",
            r["artifact_bytes"],
            r["total_bytes"],
            f"{r['train_seconds']:.1f}",
            f"{r['eval_seconds']:.1f}",
        ]
        for seed, r in results.items()
    ]
    rows.append(
        ["mean", "", *[""] * len(stages), f"**{facts['val_bpb']:.5f}**", f"{facts['val_loss']:.5f}"]
        + [""] * 4
    )
    if facts["val_bpb_std"] is not None:
        rows.append(
            ["std", "", *[""] * len(stages), f"{facts['val_bpb_std']:.5f}", f"{facts['val_loss_std']:.5f}"]
            + [""] * 4
        )
    compliance = [
        [run.seed, name, verdict, evidence]
        for run in runs
        for name, verdict, evidence in conditions(facts["compliance"][str(run.seed)])
    ]
    settings = [[f"`{name}`", f"`{show(value)}`"] for name, value in facts["overrides"].items()]
    parts = [
        f"# {facts['name']}",
        *([facts["blurb"]] if facts["blurb"] != description(runs[0]) else []),
        f"**val_bpb {facts['val_bpb']:.5f}** (mean of {len(runs)} seed{'s' * (len(runs) > 1)}"
        + (f", std {facts['val_bpb_std']:.5f}" if facts["val_bpb_std"] is not None else "")
        + f"), at most {facts['bytes_total']:,} bytes, {facts['hardware']}, "
        + f"PyTorch {facts['pytorch_version']}.",
        "## Results",
        table(
            [
                "seed",
                "steps",
                *stages,
                "val_bpb",
                "val_loss",
                "artifact bytes",
                "total bytes",
                "train s",
                "eval s",
            ],
            rows,
        ),
        *notes,
    ]
    if facts["left_out"]:
        parts += [
            "Runs of the same settings that are left out: "
            + "; ".join(f"{name} ({reason})" for name, reason in facts["left_out"].items())
            + "."
        ]
    parts += [
        "## What it is",
        description(runs[0]),
        "Settings that differ from the defaults of `train_gpt.py`:\n\n"
        + table(["setting", "value"], settings)
        if settings
        else "All settings are the defaults of `train_gpt.py`.",
        "## Command",
        f"`train_gpt.py` is the packed script whose bytes are counted; `pip install -r requirements.txt` "
        f"first. Data: {text_of(first['data'])}.",
        f"```bash\n{command_of(runs[0], facts['seeds'])}\n```",
        "## Compliance",
        f"As recorded by each run{', the conditions as `compliance.py` measured them' * measured}: "
        + "; ".join(f"seed {run.seed}: {run.summary['compliance'].get('reason', 'legal')}" for run in runs)
        + ".",
        table(["seed", "condition or limit", "verdict", "evidence"], compliance),
        "## Credits",
        "Numbers are pull requests of the public Parameter Golf repository.",
        "\n".join(f"* {line}" for line in credits_of(runs[0])),
    ]
    return "\n\n".join(parts) + "\n"


def write_folder(target: Path, runs: list[Run], facts: dict[str, Any], text: str, tokenizer: Path) -> None:
    """Make the record folder, whole or not at all."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise Stop(f"{target.parent}: cannot be written ({error.strerror}); choose another --out") from None
    try:
        building.chmod(0o755)
        for run in runs:
            shutil.copyfile(run.folder / "train.log", building / f"train_seed{run.seed}.log")
        shutil.copyfile(runs[0].folder / "packed_train_gpt.py", building / "train_gpt.py")
        shutil.copyfile(tokenizer, building / "tokenizer.model")
        needed = (ROOT / "requirements.txt").read_text()
        if runs[0].summary["versions"].get("cuda", "none") != "none":
            needed += (ROOT / "requirements-gpu.txt").read_text()
        write_atomically(building / "requirements.txt", needed)
        write_atomically(building / "submission.json", json.dumps(facts, indent=1) + "\n")
        write_atomically(building / "README.md", text)
        building.rename(target)
    except OSError as error:
        raise Stop(f"{target}: cannot be written ({error.strerror}); free disk space or use --out") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def git_author() -> str:
    """The name that git commits under here, empty if there is none."""
    if not shutil.which("git"):
        return ""
    return subprocess.run(
        ["git", "config", "user.name"], capture_output=True, text=True, check=False
    ).stdout.strip()


def parse_left_out(pairs: list[str]) -> dict[Path, str]:
    """FOLDER=REASON arguments; Stop without a reason."""
    found = {}
    for pair in pairs:
        folder, _, reason = pair.partition("=")
        if not reason.strip():
            raise Stop(f"--leave-out {pair}: give FOLDER=REASON; the reason is printed in the README")
        found[Path(folder).resolve()] = reason.strip()
    return found


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="run folders, one per seed")
    add("--name", required=True, help="name of the submission: letters, digits, '.', '_' and '-'")
    add(
        "--track",
        default=RECORD_TRACK,
        help="folder under records/; others than %(default)s accept any data, "
        "hardware and number of seeds, as in demo or non-record",
    )
    add("--baseline", metavar="MEAN,STD,N", help="the score to beat, for the Welch test")
    add(
        "--baseline-record",
        type=Path,
        metavar="FOLDER",
        help="the same, from a record folder's submission.json",
    )
    add(
        "--check",
        action="store_true",
        help="score every artifact again with its packed script in an empty folder, "
        "and run the compliance probes",
    )
    add(
        "--leave-out",
        action="append",
        default=[],
        metavar="FOLDER=REASON",
        help="a run of the same settings that is not submitted, and why; printed in the README",
    )
    add("--author", default=None, help="default: git's user.name")
    add("--github-id", default="", help="account on GitHub")
    add("--blurb", default="", help="what is new, in a sentence; default: the model in a sentence")
    add("--tokenizer", type=Path, help="the tokenizer, if it is no longer where the runs found it")
    add("--date", default=f"{datetime.now(timezone.utc):%Y-%m-%d}", help="default: today")
    add("--out", type=Path, default=ROOT / "records", help="default: records/ of this repository")
    options = parser.parse_args(arguments)
    for name in ("name", "track", "date"):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", getattr(options, name)):
            raise Stop(f"--{name} {getattr(options, name)}: may hold letters, digits, '.', '_' and '-' only")
    if options.author is None:
        options.author = git_author()
    return options


def main(arguments: list[str]) -> None:
    """Check, compare, write."""
    options = parse_arguments(arguments)
    target = options.out / options.track / f"{options.date}_{options.name}"
    if target.exists():
        raise Stop(f"{target}: there already; choose another --name, or delete it first")
    left_out = parse_left_out(options.leave_out)
    baseline = read_baseline(options.baseline, options.baseline_record)
    runs = [Run.read(folder) for folder in options.runs]
    for run in runs:
        check_run(run)
    check_same(runs)
    check_complete(runs, left_out)
    runs.sort(key=lambda run: run.seed)
    if options.track == RECORD_TRACK:
        if len(runs) < SEEDS:
            raise Stop(
                f"{len(runs)} run{'s' * (len(runs) > 1)}: the record track needs {SEEDS} seeds; run more, or "
                "submit to another track, as in --track non-record"
            )
        for run in runs:
            check_record_track(run)
    tokenizer = tokenizer_of(runs[0], options.tokenizer)
    comparison = compare(runs, baseline) if baseline else None
    notes = verdict_of(comparison) if comparison else []
    probed: dict[str, Any] = {}  # the conditions by seed, as compliance.py has measured them
    if options.check:
        for run in runs:
            notes.append(score_again(run))
            print(notes[-1], flush=True)
            words, probed[str(run.seed)] = probe(run, options.track)
            notes.append(words)
            print(words, flush=True)
    facts = submission(runs, options, comparison, left_out)
    for seed, measured in probed.items():
        facts["compliance"][seed] = facts["compliance"][seed] | {"conditions": measured}
    write_folder(target, runs, facts, readme(runs, facts, notes, bool(probed)), tokenizer)
    for run in runs:
        print(
            f"seed {run.seed}: val_bpb {run.summary['val_bpb']:.8f} total_bytes {run.summary['total_bytes']} "
            f" "
            f"{run.folder}"
        )
    spread = f" std {facts['val_bpb_std']:.8f}" if facts["val_bpb_std"] is not None else ""
    print(f"mean val_bpb {facts['val_bpb']:.8f}{spread} over {len(runs)} seed{'s' * (len(runs) > 1)}")
    print(
        "\n".join(
            verdict_of(comparison)
            if comparison
            else ["no baseline given: --baseline mean,std,n tells whether this is a record"]
        )
    )
    print(f"written: {target}/")
    for name in ("author", "github_id"):
        if not facts[name]:
            print(f"to fill in before submitting: {name} in {target / 'submission.json'}")


if __name__ == "__main__":
    run_tool(main)
