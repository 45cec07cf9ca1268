"""compliance.py: a legal run passes every probe; each planted violation is named by the probe for it."""

from __future__ import annotations

import inspect
import json
import math
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from sentencepiece import sentencepiece_model_pb2

import compliance
import train_gpt as t
from data.shards import BOS, read_shard, train_tokenizer, write_shard
from data.sidecar import encode_with_bytes
from helpers.run_folders import edit
from helpers.trainer import launch, sentences, tiny_settings
from lossless_caps import TRANSFORMS
from results import Run

TOKENS = 800
POSITIONS = 1
PLAIN = {"TTT_ENABLED": False, "SLIDING_WINDOW_ENABLED": False}
CHUNKS = {"TTT_MODE": "chunk_sgd", "SLIDING_WINDOW_ENABLED": False, "TTT_LR": 0.05}
MIXTURE = {
    "TTT_MODE": "mixture",
    "SLIDING_WINDOW_ENABLED": False,
    "PHASED_TTT_NUM_PHASES": 0,
    "TTT_LORA_LR": 0.01,
    "TTT_MIXTURE_RATES": "0,1,4",
    "TTT_MIXTURE_CHUNK": 16,
}
DOCUMENTS = {"SLIDING_WINDOW_ENABLED": False, "PHASED_TTT_NUM_PHASES": 0, "TTT_CHUNK_SIZE": 32}
CLOCK = [
    ("start", 0.0),
    ("train_clock_start", 10.0),
    ("train_read_last", 300.0),
    ("artifact_sealed", 400.0),
    ("eval_clock_start", 450.0),
    ("validation_read", 451.0),
    ("eval_clock_end", 900.0),
]


@pytest.fixture(scope="session")
def caseops(tmp_path_factory) -> Path:
    """A dataset with case operators and a byte sidecar."""
    folder = tmp_path_factory.mktemp("caseops")
    encode, _, operators, _ = TRANSFORMS["caseops_v1"]
    train_tokenizer(map(encode, sentences(500, 0)), folder / "tokenizer", 340, operators)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for name, count, seed in (("train_000000", 300, 1), ("val_000000", 30, 3)):
        parts = [encode_with_bytes(pieces, "caseops_v1", text) for text in sentences(count, seed)]
        tokens = np.concatenate([np.append(BOS, ids) for ids, _, _ in parts])
        write_shard(folder / f"fineweb_{name}.bin", tokens.astype("<u2"))
    worth = np.concatenate([np.append(0, counts) for _, counts, _ in parts])
    write_shard(folder / "fineweb_val_bytes_000000.bin", worth.astype("<u2"))
    return folder


@pytest.fixture(scope="session")
def legal(caseops, tmp_path_factory) -> Path:
    """The folder of one finished run with every stage, from which all others here are copied."""
    out = tmp_path_factory.mktemp("legal")
    changes = {
        "LOADER": "packed",
        "NUM_LOOPS": "0",
        "NUM_LAYERS": "2",
        "XSA_LAST_N": "2",
        "PARALLEL_START_LAYER": "1",
        "ITERATIONS": "4",
        "TTT_LORA_LR": "0.01",
        "RUN_ID": "legal",
        "QUANTIZER": "sdclip",  # read without compiled loops, which the script alone has to compile
    }
    result = launch(tiny_settings(caseops, out) | changes)
    assert result.returncode == 0, result.stderr
    record(out / "legal", CLOCK)
    return out / "legal"


@pytest.fixture
def folder(legal, tmp_path) -> Path:
    """A copy of the legal run."""
    return shutil.copytree(legal, tmp_path / "run")


def record(folder: Path, events: list[tuple[str, float]]) -> None:
    """Replace the ledger in metrics.jsonl."""
    path = folder / "metrics.jsonl"
    digest = json.loads((folder / "summary.json").read_text())["artifact_sha256"]
    lines = [line for line in path.read_text().splitlines() if json.loads(line)["kind"] != "ledger"]
    lines += [
        json.dumps(
            {"kind": "ledger", "event": event, "time": 1e9 + at}
            | ({"sha256": digest} if event == "artifact_sealed" else {})
        )
        for event, at in events
    ]
    path.write_text("\n".join(lines) + "\n")


def probed(folder: Path, **settings) -> compliance.Report:
    """The report of a run whose config.json is changed first."""
    edit(folder / "config.json", lambda config: config.update(settings))
    return compliance.check(folder, TOKENS, POSITIONS, t, alone=False)


def broken(report: compliance.Report) -> set[str]:
    """The probes that failed."""
    return {f"{row.group}: {row.probe}" for row in report.rows if row.holds is False}


def test_a_legal_run_passes_every_probe(folder, capsys, monkeypatch):
    monkeypatch.setattr(compliance, "load_trainer", lambda folder: t)
    code = compliance.main([str(folder), "--tokens", str(TOKENS), "--positions", str(POSITIONS)])
    shown = capsys.readouterr().out
    report = json.loads((folder / "compliance.json").read_text())
    assert code == 0 and report["legal"] is True, shown
    assert all(report["conditions"][name]["holds"] for name in compliance.CONDITIONS)
    measured = [probe["holds"] for group in compliance.GROUPS for probe in report[group].values()]
    assert all(measured) and len(measured) > 40
    for stage in ("quantized", "sliding", "ttt"):
        assert f"{stage}: previous document replaced" in report["documents apart"]
        assert report["causal"][f"{stage}: future replaced"]["evidence"].endswith("by at most 0 (allowed 0)")
    assert "updates: " in report["score before update"]["ttt: records and updates"]["evidence"]
    assert "legal" in shown.splitlines()[-1] and "VIOLATION" not in shown


def test_chunk_sgd_passes_every_probe(folder):
    report = probed(folder, **CHUNKS)
    assert not report.violations and report.legal
    evidence = {f"{row.group}: {row.probe}": row for row in report.rows}
    assert evidence["documents apart: ttt: previous document replaced"].holds
    assert " 0 updates" not in evidence["score before update: ttt: records and updates"].evidence


def test_a_mixture_of_experts_passes_every_probe(folder):
    report = probed(folder, **MIXTURE, CANONICAL_MASK=True)
    assert not report.violations and report.legal
    evidence = {f"{row.group}: {row.probe}": row for row in report.rows}
    for probe in (
        "documents apart: ttt: previous document replaced",
        "normalised: ttt: entry of the true token",
        "causal: ttt: mask from the tokenizer",
    ):
        assert evidence[probe].holds, probe
    assert " 0 updates" not in evidence["score before update: ttt: records and updates"].evidence


def test_a_copy_that_has_seen_its_target_is_named(folder, monkeypatch):
    def find(copies, first, end):
        copies.tokens[0, first + 1 : end] = copies.text[first + 1 : end]
        copies.lengths[0, first + 1 : end] = 32

    monkeypatch.setattr(t.Copies, "find", find)
    assert "causal: ttt: token itself replaced" in broken(probed(folder, **MIXTURE))


def test_a_mask_made_from_the_validation_text_is_named(folder, monkeypatch):
    real = t.open_canonical

    def spy(run, data):
        real(run, data)
        seen = np.isin(np.arange(data.vocab_size), read_shard(data.val_files[0]))
        run.canonical.table &= t.pack_bits(seen)

    monkeypatch.setattr(t, "open_canonical", spy)
    report = probed(folder, CANONICAL_MASK=True, **PLAIN)
    assert broken(report) == {"causal: quantized: mask from the tokenizer"}
    assert "1 of 1 tables differ from that of the tokenizer alone" in report.violations[0]


def test_a_mask_that_knows_its_target_is_named(folder, monkeypatch):
    real = t.Canonical.rows
    monkeypatch.setattr(t.Canonical, "rows", lambda canonical, tokens: np.roll(real(canonical, tokens), -1))
    assert "causal: quantized: mask from the tokenizer" in broken(
        probed(folder, CANONICAL_MASK=True, **PLAIN)
    )


def test_weights_that_know_the_target_are_named(folder, monkeypatch):
    real = t.mix_experts

    def too_late(log_weights, log_p):
        before, after = real(log_weights, log_p)
        return torch.cat((before[:, :, 1:], after[:, :, None]), 2), after

    monkeypatch.setattr(t, "mix_experts", too_late)
    wrong = broken(probed(folder, **MIXTURE))
    assert {"normalised: ttt: entry of the true token", "normalised: ttt: sums to 1"} & wrong


def test_what_cannot_be_measured_is_said(folder):
    record(folder, [])
    edit(
        folder / "summary.json",
        lambda summary: summary["versions"].update(source_sha256="of another version"),
    )
    (folder / "documents.npz").unlink()
    report = probed(folder, LOADER="shuffled", **PLAIN)
    unknown = {row.probe: row.evidence for row in report.rows if row.holds is None}
    assert "attend across documents" in unknown["quantized: previous document replaced"]
    assert (
        "is not here" in unknown["code of the run"] and "no documents.npz" in unknown["sums of the documents"]
    )
    assert unknown["calibration before the bell"] == "not recorded: metrics.jsonl has no ledger"
    assert report.legal


# === THE FOUR CONDITIONS ===


def test_a_cache_keyed_by_the_target_is_caught(folder, monkeypatch):
    """Its gain on targets that were seen before, taken from the losses, is not in the distribution."""
    real = t.GPT.forward

    def cached(model, batch, *arguments, **named):
        seen = (batch.targets[:, :, None] == batch.inputs[:, None, :]).tril().any(-1)
        return real(model, batch, *arguments, **named) - 0.5 * seen

    monkeypatch.setattr(t.GPT, "forward", cached)
    found = broken(probed(folder, **PLAIN))
    assert {
        "normalised: quantized: entry of the true token",
        "causal: quantized: token itself replaced",
    } <= found


def test_logits_that_know_the_target_are_caught(folder, monkeypatch):
    real = t.GPT.forward

    def peeking(model, batch, *arguments, **named):
        head = model.matmul

        def matmul(site, *rest, **adapt):
            y = head(site, *rest, **adapt)
            return (
                y + (batch.targets % 7 == 0)[..., None] * torch.linspace(0, 1, y.size(-1))
                if site == "head"
                else y
            )

        with monkeypatch.context() as patch:
            patch.setattr(t.GPT, "matmul", staticmethod(matmul))
            return real(model, batch, *arguments, **named)

    monkeypatch.setattr(t.GPT, "forward", peeking)
    assert broken(probed(folder, **PLAIN)) == {"causal: quantized: token itself replaced"}


def test_a_look_at_the_next_token_is_caught(folder, monkeypatch):
    real = t.attend_sdpa

    def both_ways(q, k, v, starts, longest):
        y = real(q, k, v, starts, longest)
        return y + 0.1 * torch.nn.functional.pad(y[:, 1:], (0, 0, 0, 0, 0, 1))

    monkeypatch.setattr(t, "attend_sdpa", both_ways)
    assert "causal: quantized: future replaced" in broken(probed(folder, **PLAIN))


def test_a_mixture_that_does_not_sum_to_one_is_caught(folder, monkeypatch):
    """A cache's probability is added for the true token without taking it from the others."""
    real = t.softcapped_ce_reference
    monkeypatch.setattr(
        t,
        "softcapped_ce_reference",
        lambda logits, targets, cap: -torch.log((-real(logits, targets, cap)).exp() + 1e-3),
    )
    report = probed(folder, **PLAIN)
    assert {"normalised: quantized: sums to 1", "normalised: quantized: entry of the true token"} <= broken(
        report
    )
    assert any("sum to 1.34" in line for line in report.violations)


def test_learning_a_chunk_before_scoring_it_is_caught(folder, monkeypatch):
    def learn_first(run, model, forward, tally):
        tokens = tally.validation.tokens
        learner = t.Learner(run, model, torch.optim.SGD(model.parameters()), 1.0, 32, packed=True)
        learner.learn(tokens, 0, len(tokens) - 1, 0.1)
        t.score_sliding(run, forward, run.config.eval_stride, tally)

    monkeypatch.setattr(t, "chunk_sgd", learn_first)
    report = probed(folder, **CHUNKS)
    assert {"score before update: ttt: records and updates", "causal: ttt: future replaced"} <= broken(report)
    assert any("were learnt before their score was recorded" in line for line in report.violations)


def test_learning_what_cannot_be_named_is_caught(folder, monkeypatch):
    def by_hand(run, model, forward, tally):
        ids = torch.from_numpy(tally.validation.tokens[:65].astype(np.int64))[None]
        model(t.Batch(ids[:, :-1], ids[:, 1:])).mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        t.score_sliding(run, forward, run.config.eval_stride, tally)

    monkeypatch.setattr(t, "chunk_sgd", by_hand)
    report = probed(folder, **CHUNKS)
    assert "score before update: ttt: records and updates" in broken(report)
    assert any("whose targets cannot be told" in line for line in report.violations)


def test_recording_the_loss_after_the_step_is_caught(folder, monkeypatch):
    source = inspect.getsource(t.adapt_documents)
    late = source.replace("if repeat == 0:", "if repeat == (1 if learning else 0):")
    assert late != source
    exec(compile("from __future__ import annotations\n" + late, "late", "exec"), space := dict(vars(t)))
    monkeypatch.setattr(
        t, "adapt_documents", lambda *given, **named: space["adapt_documents"](*given, **named)
    )
    with monkeypatch.context() as patch:  # the copy must call what the probes watch
        patch.setitem(space, "window_batch", lambda *given, **named: t.window_batch(*given, **named))
        report = probed(folder, TTT_GRAD_STEPS=2, **DOCUMENTS)
    assert {"score before update: ttt: records and updates", "causal: ttt: future replaced"} <= broken(report)


def test_weights_changed_behind_the_records_are_caught(folder, monkeypatch):
    real = t.Tally.add

    def drift(tally, losses, places):
        real(tally, losses, places)
        models[-1].smear_w.data += 0.01

    models = []
    build = t.build

    def kept(run):
        models.append((built := build(run)).model)
        return built

    monkeypatch.setattr(t, "build", kept)
    monkeypatch.setattr(t.Tally, "add", drift)
    report = probed(folder, TTT_ENABLED=False)
    assert any("changed between two records without an update" in line for line in report.violations)


def test_training_before_scoring_is_named_illegal(folder):
    report = probed(folder, PREQUANT_TTT_ENABLED=True, **PLAIN)
    assert not report.legal
    assert broken(report) == {"score before update: no training before scoring"}


def test_warm_up_on_validation_tokens_is_caught(folder, monkeypatch):
    def rehearse(run, stages):
        validation = t.load_validation(t.Dataset(run.config, need_training=False))
        for how in stages.values():
            how(t.Tally(run, validation))

    monkeypatch.setattr(t, "rehearse", rehearse)
    assert broken(probed(folder, **PLAIN)) == {"score before update: warm-up"}
    monkeypatch.undo()
    record(folder, [*CLOCK[:4], ("validation_read", 420.0), *CLOCK[4:]])
    report = probed(folder)
    assert broken(report) == {"budgets: validation read after the seal"}
    assert "warm-up on validation tokens" in report.violations[0]


def test_scoring_twice_and_touching_a_score_are_caught(folder, monkeypatch):
    real = t.Tally.total

    def better_of_two(tally, stage):
        tally.nats[1:] = torch.minimum(tally.nats[1:], torch.full_like(tally.nats[1:], math.log(340)))
        return real(tally, stage)

    monkeypatch.setattr(t.Tally, "total", better_of_two)
    assert broken(probed(folder, **PLAIN)) == {"single pass: quantized: sum of the records"}
    monkeypatch.setattr(t.Tally, "total", real)
    slide = t.score_sliding
    monkeypatch.setattr(t, "score_sliding", lambda *given: (slide(*given), slide(*given)))
    assert "single pass: quantized: scored once" in broken(probed(folder))


# === DOCUMENTS AND DATA ===


def test_smear_across_packed_documents_is_caught(folder, monkeypatch):
    real = t.GPT.embedding

    def smeared(model, batch, hooks):
        x = real(model, batch, hooks)
        return torch.cat((x[:, :1], x[:, 1:] + 0.1 * x[:, :-1]), 1)

    monkeypatch.setattr(t.GPT, "embedding", smeared)
    assert broken(probed(folder, **PLAIN)) == {"documents apart: quantized: previous document replaced"}


def test_smear_across_batched_documents_is_caught(folder, monkeypatch):
    real = t.GPT.embedding

    def smeared(model, batch, hooks):
        x = real(model, batch, hooks)
        return x + 0.1 * x.roll(1, 0) if len(x) > 1 else x

    monkeypatch.setattr(t.GPT, "embedding", smeared)
    found = broken(probed(folder, **DOCUMENTS))
    assert "documents apart: ttt: previous document replaced" in found
    assert not any("quantized" in name for name in found)


def test_operators_charged_as_bytes_are_caught(folder, caseops, tmp_path):
    charged = shutil.copytree(caseops, tmp_path / "charged")
    path = charged / "fineweb_val_bytes_000000.bin"
    tokens = read_shard(charged / "fineweb_val_000000.bin")
    sizes = np.array(read_shard(path))
    sizes[(tokens >= 4) & (tokens <= 7)] = 3
    write_shard(path, sizes)
    report = probed(folder, DATASETS_DIR=str(charged), **PLAIN)
    assert {"data: bytes of the text", "data: sums of the documents", "data: verify_bytes"} == broken(report)
    assert any("operator U+E00" in line and "worth 0 bytes" in line for line in report.violations)


def test_a_truncated_validation_set_is_caught(folder, monkeypatch):
    real = t.load_validation

    def cut(data):
        tokens, sizes, source = real(data)
        size = 1 + (len(tokens) - 1) // 512 * 512
        return t.Validation(tokens[:size], sizes[:size], source)

    monkeypatch.setattr(t, "load_validation", cut)
    assert broken(probed(folder, **PLAIN)) == {"single pass: whole validation set"}
    monkeypatch.undo()
    edit(folder / "summary.json", lambda summary: summary.update(val_tokens=9_662_464))
    report = probed(folder)
    assert {"data: whole validation set", "data: val_bpb follows"} == broken(report)
    assert "10,000 documents or a corrupt shard" in report.violations[0]


def test_validation_text_among_the_training_data_is_caught(folder, caseops, tmp_path):
    leaky = shutil.copytree(caseops, tmp_path / "leaky")
    parts = [read_shard(leaky / f"fineweb_{name}_000000.bin") for name in ("train", "val")]
    write_shard(leaky / "fineweb_train_000001.bin", np.concatenate(parts))
    report = probed(folder, DATASETS_DIR=str(leaky), **PLAIN)
    assert broken(report) == {"data: same dataset", "data: verify_bytes"}
    assert "validation document" in report.violations[1]


def test_a_dataset_that_claims_to_be_the_published_one_must_be_it(folder, caseops, monkeypatch):
    key = compliance.sha256_file(caseops / "tokenizer.model")[:16]
    monkeypatch.setitem(compliance.TOKENIZERS, key, "caseops_v1")
    report = probed(folder, **PLAIN)
    assert broken(report) == {"data: verify_bytes"} and "instead of 50,000" in report.violations[0]


def test_figures_that_do_not_follow_are_caught(folder):
    edit(folder / "summary.json", lambda summary: summary.update(val_bpb=summary["val_bpb"] - 0.01))
    found = broken(probed(folder, **PLAIN))
    assert found == {"data: val_bpb follows", "data: score of the last stage", "data: sums of the documents"}


# === BUDGETS AND SHIPPED BYTES ===


def test_an_artifact_over_the_cap_is_caught(folder):
    report = probed(folder, ARTIFACT_CAP_BYTES=60_000, **PLAIN)
    assert broken(report) == {"budgets: artifact and code"}


def test_calibration_after_the_bell_is_caught(folder):
    record(folder, [(name, at + 320 * (name == "train_read_last")) for name, at in CLOCK])
    edit(folder / "summary.json", lambda summary: summary.update(budgeted_seconds=606.6))
    report = probed(folder, **PLAIN)
    assert broken(report) == {"budgets: calibration before the bell", "budgets: training and calibration"}
    assert "610.00 s after the clock started" in report.violations[1]


def test_the_training_clock_counts_what_a_killed_process_used(folder):
    """Seconds before a resumption count; between two processes the wall clock does not."""
    row = lambda: {r.probe: r for r in report.rows}["calibration before the bell"]
    for events, holds in (
        (CLOCK[:3], True),
        ([*CLOCK[:2], ("start", 40.0), *CLOCK[2:3]], None),
        (CLOCK[:2], None),
    ):
        record(folder, events)
        report = compliance.Report(folder)
        compliance.probe_ledger(report, Run.read(folder))
        assert row().holds is holds
    with open(folder / "metrics.jsonl", "a") as file:
        for event in (
            {"event": "start", "time": 1e9},
            {"event": "train_clock_start", "time": 1e9, "seconds": 500.0},
            {"event": "train_read_last", "time": 1e9 + 101},
        ):
            file.write(json.dumps({"kind": "ledger"} | event) + "\n")
    report = compliance.Report(folder)
    compliance.probe_ledger(report, Run.read(folder))
    assert row().holds is False and "601.00 s" in row().evidence


def test_validation_read_before_the_seal_is_caught(folder):
    record(folder, [*CLOCK[:2], ("validation_read", 20.0), *CLOCK[2:]])
    report = probed(folder, **PLAIN)
    assert (
        broken(report) == {"budgets: validation read after the seal"}
        and "before the seal" in report.violations[0]
    )


def test_other_weights_or_another_script_are_caught(folder, monkeypatch):
    real = t.assemble_weights
    monkeypatch.setattr(
        t, "assemble_weights", lambda *given: {name: weight + 1e-3 for name, weight in real(*given).items()}
    )
    stages = compliance.probe_stages

    def with_the_real(*given):
        monkeypatch.setattr(t, "assemble_weights", real)
        stages(*given)

    monkeypatch.setattr(compliance, "probe_stages", with_the_real)
    with open(folder / "packed_train_gpt.py", "a") as file:
        file.write("# not what the run wrote\n")
    found = broken(probed(folder, **PLAIN))
    assert found == {
        f"shipped bytes: {probe}" for probe in ("artifact scored", "code of the run", "weights scored")
    }


def test_a_script_that_reaches_beyond_its_folder_is_caught(folder, tmp_path):
    """A training shard, a file of the repository, and a connection."""
    (tmp_path / "fineweb_train_000000.bin").write_bytes(b"")
    (folder / "packed_train_gpt.py").write_text(
        "import json, os, socket\n"
        f"open({str(tmp_path / 'fineweb_train_000000.bin')!r}).close()\n"
        f"open({str(compliance.ROOT / 'README.md')!r}).close()\n"
        "try:\n    socket.create_connection(('192.0.2.1', 80), 1)\nexcept OSError as error:\n    reason = "
        "str(error)\n"
        "os.makedirs('runs/alone')\n"
        "json.dump({'reason': reason, 'train': os.listdir('data')}, open('runs/alone/summary.json', 'w'))\n"
    )
    sample = tmp_path / "sample"
    sample.mkdir()
    given = compliance.Sample(np.zeros(0), np.zeros(0), sample)
    summary, error, foreign = compliance.run_alone(Run.read(folder), t, given, {}, tmp_path / "alone")
    assert not error and summary == {"reason": "no network here", "train": []}
    assert [line.split()[0] for line in foreign] == ["network", "open", "open"]
    assert {Path(line).name for line in foreign[1:]} == {"fineweb_train_000000.bin", "README.md"}


def test_a_violation_is_one_line_and_exit_status_1(folder, capsys, monkeypatch):
    report = compliance.Report(folder)
    report.add("normalised", "ttt: sums to 1", False, "sums to 1.3")
    report.add("causal", "ttt: future replaced", True, "0")
    monkeypatch.setattr(compliance, "check", lambda *given, decode: report)
    assert compliance.main([str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "VIOLATION normalised: ttt: sums to 1: sums to 1.3" and "NOT LEGAL" in lines[-1]
    written = json.loads((folder / "compliance.json").read_text())
    assert written["legal"] is False and written["conditions"]["single pass"]["holds"] is None


def test_what_is_probed_is_what_is_shipped(tmp_path, folder):
    shipped = compliance.load_trainer(folder)
    assert shipped.Config is not t.Config and shipped.Config.from_env({}).overrides() == {}
    with pytest.raises(SystemExit, match="no such folder"):
        compliance.main([str(tmp_path / "nowhere")])
    (folder / "packed_train_gpt.py").write_text("1/0")
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        compliance.main([str(folder)])
    (folder / "packed_train_gpt.py").write_text("pass")
    with pytest.raises(SystemExit, match="has no Config"):
        compliance.main([str(folder)])
    edit(folder / "summary.json", lambda summary: summary.pop("val_bytes"))
    with pytest.raises(SystemExit, match="has no val_bytes"):
        compliance.main([str(folder)])
    (folder / "final_model.ptz").unlink()
    with pytest.raises(SystemExit, match="no such file"):
        compliance.main([str(folder)])


def decoding(pieces, documents: list[str], sidecar: list[int] | None = None) -> compliance.Row:
    """What probe_decoding finds for documents; `sidecar` has the bytes of each, else the tables count."""
    ids = [pieces.encode(text) for text in documents]
    tokens = np.concatenate([np.append(BOS, one) for one in ids]).astype(np.uint16)
    data = types.SimpleNamespace(pieces=pieces, sidecar_files=[], folder=None)
    sizes = compliance.bytes_of(data, tokens)
    if sidecar is not None:
        data.sidecar_files = ["there"]
        sizes = np.concatenate(
            [[0, size, *[0] * (len(one) - 1)] for one, size in zip(ids, sidecar, strict=True)]
        )
    report = compliance.Report(Path())
    compliance.probe_decoding(report, data, tokens, sizes, "none")
    return report.rows[0]


@pytest.fixture(scope="session")
def models(dataset, tmp_path_factory) -> list:
    """A tokenizer with byte fallback, and the same without its piece for a lone space."""
    whole = sentencepiece_model_pb2.ModelProto()
    whole.ParseFromString((dataset / "tokenizer.model").read_bytes())
    without = sentencepiece_model_pb2.ModelProto()
    without.CopyFrom(whole)
    (space,) = (piece for piece in without.pieces if piece.piece == "\u2581")
    without.pieces.remove(space)
    return [
        sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        for model in (whole, without)
    ]


def test_the_counted_bytes_are_those_of_the_decoded_text(models):
    documents = [*sentences(20, 1), "zzz 42 é  qqq ü \u2603 x"]
    whole, without = models
    row = decoding(whole, documents)
    assert row.holds is True and row.group == "data"
    size = sum(len(whole.decode(whole.encode(text)).encode()) for text in documents)
    assert f"{size} bytes counted in 21 documents, their decoded text has {size}" == row.evidence
    row = decoding(without, documents)
    assert row.holds is False and f"text has {size}, the first difference in document" in row.evidence
    counted = int(row.evidence.split()[0])
    assert counted > size and (counted - size) % 2 == 0, "three bytes for a space of one"


def test_a_sidecar_far_from_the_decoded_text_is_refuted_and_a_near_one_is_not_judged(models):
    documents = sentences(20, 1)
    sizes = [len(text.encode()) for text in documents]
    assert decoding(models[0], documents, sizes).holds is True
    assert decoding(models[0], documents, [sizes[0] + 2, *sizes[1:]]).holds is None
    assert decoding(models[0], documents, [size * 109 // 100 for size in sizes]).holds is False
