#!/usr/bin/env python3
"""What only a GPU can tell, in three calls of under ten minutes; each is of use alone, and can be resumed.

    python bench/gpu_session.py carry TEXT... --tokenizer FILE --val FILE    where the text is: what travels
    python bench/gpu_session.py 1    preflight, tests/gpu, the flagship's step with its parts, kernels
    python bench/gpu_session.py 2    trains the full shape (11 x 512) on that text, at most 7 minutes; packs
                                     it by SDClip + LQER and by ours at equal bytes, tuned too; adapters
    python bench/gpu_session.py 3    MLP_MULT 4 and 5.5 at equal time; with --against FILE, its step, too
    python bench/gpu_session.py record TABLES...    afterwards: appends to records/gpu_checks.md

`carry` fills runs/carried: train.jsonl.xz (a document from each file in turn), val.jsonl.xz and
tokenizer.model, of 8,192 entries, together at most --megabytes. This folder must be on the GPU's machine,
which needs no network: there, data/prepare.py makes a dataset of it; --data FOLDER uses another. A call
writes its parts' logs and what is done into --work, its tables into --out. A part whose time does not suffice
is left for the next run of the same call, which repeats nothing that succeeded. On a machine that is lent for
less, --parts and --limit choose. Status 0: all done, 1: a part failed, 3: a part is left. --dry: the whole
plan at tiny shapes on the CPU; shows that the plan works, not what a GPU does. The seconds of parts are those
of an H200 for the tests and for compiling, which is most of a start, else assumed.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder: bench/data.py would hide the package data
import environment

environment.enter()
import argparse
import contextlib
import datetime
import importlib.metadata
import json
import lzma
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from data.options import Parser, number_option

RECORDS = ROOT / "records" / "gpu_checks.md"
KILL_AFTER = 5.0  # seconds that a part gets to end by itself
SHOWN = 60  # lines of a log in the tables
FAILED = 20  # and of that of a part that failed
# Short runs on one GPU: small batches, so that seven minutes are more than a thousand steps; ramps to suit.
TRAINING = {
    "STAGE": "train",
    "TRAIN_BATCH_TOKENS": "196608",
    "MICRO_BATCH_TOKENS": "98304",
    "MUON_MOMENTUM_WARMUP_STEPS": "300",
    "GPTQ_RESERVE_SECONDS": "0",
    "CHECKPOINT_EVERY": "0",
    "VAL_LOSS_EVERY": "0",
    "VOCAB_SIZE": "8192",
    "TRAIN_LOG_EVERY": "100",
    "TOKENIZER_PATH": "",
}
DRY = {
    "NUM_LAYERS": "4",
    "MODEL_DIM": "64",
    "NUM_HEADS": "4",
    "NUM_KV_HEADS": "2",
    "XSA_LAST_N": "4",
    "LOOP_START": "1",
    "LOOP_END": "2",
    "PARALLEL_START_LAYER": "3",
    "LOADER": "shuffled",
    "TRAIN_SEQ_LEN": "64",
    "EVAL_SEQ_LEN": "64",
    "TTT_EVAL_SEQ_LEN": "64",
    "TRAIN_BATCH_TOKENS": "4096",
    "MICRO_BATCH_TOKENS": "4096",
    "WARMUP_STEPS": "1",
    "VAL_BATCH_TOKENS": "65536",
    "COMPRESSOR": "lzma",
    "CUDA_VISIBLE_DEVICES": "",
}


class Part(NamedTuple):
    """One command of a call; `{seconds}` in its words and settings becomes what its real work may take."""

    name: str
    command: list[str]
    least: float  # seconds without which it is not started
    most: float  # seconds after which it is stopped
    start: float = 0.0  # of these, what it needs besides {seconds}: compiling, the score at the end
    settings: dict[str, str] = {}
    needs: Path | None = None  # a file of an earlier part
    shown: str = ""  # pattern of the log's lines that belong into the tables; empty: no line


class Outcome(NamedTuple):
    """How a part stands: "done", "failed" or "left", the seconds it took, and why if it is not done."""

    state: str
    seconds: float = 0.0
    why: str = ""


def allowance(part: Part, later: list[Part], left: float) -> float:
    """Seconds for `part` of those `left`: what the least of `later` leaves, but its own least goes first."""
    return min(part.most, left, max(part.least, left - sum(other.least for other in later)))


def run_command(command: list[str], settings: dict[str, str], seconds: float, log: Path) -> int:
    """Status of a command whose output goes to `log`; 124 if it was stopped after `seconds`."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | settings, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
        try:
            process.wait(timeout=KILL_AFTER)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return 124


class Session:
    """Runs the parts of a call within its limit and remembers in `work`/state.json which succeeded."""

    def __init__(
        self,
        work: Path,
        limit: float,
        clock: Callable[[], float] = time.monotonic,
        execute: Callable[[list[str], dict[str, str], float, Path], int] = run_command,
    ):
        self.work, self.limit, self.clock, self.execute = work, limit, clock, execute
        work.mkdir(parents=True, exist_ok=True)
        self.began = clock()
        self.state_path = work / "state.json"
        self.state: dict[str, Any] = {}
        if self.state_path.exists():
            self.state = json.loads(self.state_path.read_text())

    def is_done(self, part: Part) -> bool:
        """Whether this very command succeeded before, with the same settings."""
        known = self.state.get(part.name, {})
        return known.get("command") == part.command and known.get("settings") == part.settings

    def log(self, part: Part) -> Path:
        """Where a part's output goes."""
        return self.work / f"{part.name}.log"

    def run(self, parts: list[Part]) -> dict[str, Outcome]:
        """The outcome of every part, in order; what was done before keeps its seconds."""
        outcomes: dict[str, Outcome] = {}
        for index, part in enumerate(parts):
            if self.is_done(part):
                outcomes[part.name] = Outcome("done", self.state[part.name]["seconds"])
                continue
            later = [other for other in parts[index + 1 :] if not self.is_done(other)]
            outcomes[part.name] = self.attempt(part, later)
        return outcomes

    def attempt(self, part: Part, later: list[Part]) -> Outcome:
        """Run one part if its time and its file are there, and remember it if it succeeds."""
        left = self.limit - (self.clock() - self.began) - KILL_AFTER
        if left < part.least:
            return Outcome("left", 0.0, f"{part.least:.0f}s needed, {max(left, 0.0):.0f}s left")
        if part.needs and not part.needs.exists():
            return Outcome("left", 0.0, f"there is no {part.needs.name}: an earlier part did not succeed")
        seconds = allowance(part, later, left)
        filled = str(int(seconds - part.start))
        command = [word.replace("{seconds}", filled) for word in part.command]
        settings = {name: value.replace("{seconds}", filled) for name, value in part.settings.items()}
        print(f"== {part.name}: at most {seconds:.0f}s of the {left:.0f}s left", flush=True)
        began = self.clock()
        status = self.execute(command, settings, seconds, self.log(part))
        taken = self.clock() - began
        if status:
            why = f"stopped after {seconds:.0f}s" if status == 124 else f"status {status}"
            return Outcome("failed", taken, why)
        self.state[part.name] = {"command": part.command, "settings": part.settings, "seconds": taken}
        written = self.state_path.with_suffix(".new")
        written.write_text(json.dumps(self.state, indent=1))
        written.replace(self.state_path)
        return Outcome("done", taken)


class Places(NamedTuple):
    """Where a session finds its text and keeps its work, and whether it is a dry one."""

    carried: Path
    data: Path
    work: Path
    dry: bool
    against: Path | None


def tool(*words: object) -> list[str]:
    """A command of this repository under this interpreter."""
    return [sys.executable, *map(str, words)]


def data_part(places: Places) -> list[Part]:
    """Tokenising the carried text; none if the dataset was given."""
    if places.data != places.work / "data":
        return []
    text = [places.carried / "train.jsonl.xz", "--val", places.carried / "val.jsonl.xz"]
    options = ["--tokenizer", places.carried / "tokenizer.model", "--out", places.data]
    command = tool("data/prepare.py", *text, *options)
    return [Part("data", command, 30, 120, needs=places.carried / "train.jsonl.xz", shown="tokens")]


def training(places: Places, name: str, **settings: str) -> dict[str, str]:
    """Settings of a training into `work`/NAME; a dry one is tiny."""
    found = TRAINING | (DRY if places.dry else {}) | settings
    manifest = places.data / "manifest.json"
    if manifest.exists():
        found["VOCAB_SIZE"] = str(json.loads(manifest.read_text())["tokenizer"]["vocab_size"])
    return found | {"DATASETS_DIR": str(places.data), "OUT_DIR": str(places.work), "RUN_ID": name}


def gpu_bench(places: Places, *words: object) -> list[str]:
    """A command of bench/gpu.py; a dry one is tiny and on the CPU."""
    return tool("bench/gpu.py", *words, *(["--device", "cpu", "--tiny", "--quick"] if places.dry else []))


def first_call(places: Places) -> list[Part]:
    """The machine, the tests, the step and the kernels."""
    # One after the other they take nearly four minutes, most of them the host's: it compiles.
    workers = [] if places.dry else ["--numprocesses", "4"]
    tests = tool("-m", "pytest", "tests/gpu", "-rs", *workers, *(["--dry"] if places.dry else []))
    kernels = gpu_bench(places, "--parts", "ceilings,kernels,step", "--budget", "{seconds}")
    result_lines = "passed|failed|^FAILED|^ERROR|^SKIPPED"
    return [
        *data_part(places),
        Part(
            "preflight",
            tool("train_gpt.py", "--preflight"),
            *(150, 260),
            settings=training(places, "preflight", STAGE="all"),
            needs=places.data / "tokenizer.model",
            shown="preflight |attention|kernels",
        ),
        Part("tests", tests, 100, 200, shown=result_lines),
        Part("kernels_and_step", kernels, 120, 400, 30, shown="^(?!RESULT )"),
    ]


def second_call(places: Places) -> list[Part]:
    """A full-shape model on real text, packed twice at equal bytes, and adapters on it."""
    run = places.work / "model"
    packing = tool("bench/gpu_packing.py", run, *(["--quick"] if places.dry else []))
    adapters = training(places, "adapters", STAGE="evaluate", TTT_MODE="doc_lora", TTT_ENABLED="1")
    if places.dry:
        adapters |= {"TTT_BATCH_SIZE": "4", "TTT_CHUNK_SIZE": "64", "TTT_LORA_RANK": "8"}
    seconds = "{seconds}" if not places.dry else "10"
    return [
        *data_part(places),
        Part(
            "train",
            tool("train_gpt.py"),
            *(210, 420 + 150, 150),
            settings=training(places, "model", MAX_WALLCLOCK_SECONDS=seconds),
            needs=places.data / "tokenizer.model",
            shown="^train: |attention|kernels|model_params",
        ),
        Part("packing", packing, 90, 300, needs=run / "checkpoint.pt", shown="^(?!RESULT )"),
        Part(
            "adapters",
            tool("train_gpt.py"),
            *(75, 240),
            settings=adapters | {"ARTIFACT": str(run / "ours.ptz"), "EVAL_PREQUANT": "0"},
            needs=run / "ours.ptz",
            shown="^val:|tok/s|documents|^final",
        ),
    ]


def third_call(places: Places) -> list[Part]:
    """Two widths of the MLP at equal time, and another script's step beside ours."""
    parts = data_part(places)
    quick = ["--quick"] if places.dry else []
    for width in ("4", "5.5"):
        name = f"mlp_{width}"
        settings = training(places, name, MLP_MULT=width, MAX_WALLCLOCK_SECONDS="10" if places.dry else "90")
        needs = places.data / "tokenizer.model"
        pattern = "^train: |model_params"
        score = tool("bench/gpu_packing.py", places.work / name, "--score", *quick)
        parts.append(
            Part(name, tool("train_gpt.py"), 210, 245, settings=settings, needs=needs, shown=pattern)
        )
        checkpoint = places.work / name / "checkpoint.pt"
        parts.append(Part(f"score_{width}", score, 25, 60, needs=checkpoint, shown="BPB"))
    if places.against:
        words = ["--parts", "ceilings,step", "--quick", "--against", places.against, "--budget", "{seconds}"]
        parts.append(Part("against", gpu_bench(places, *words), 60, 150, 20, shown="^(?!RESULT )"))
    return parts


CALLS = {"1": first_call, "2": second_call, "3": third_call}


def choose_parts(parts: list[Part], names: list[str]) -> list[Part]:
    """Those of a call's `parts` that have one of `names`, and its data; all without names.

    ValueError where a name is that of no part.
    """
    known = [part.name for part in parts]
    for name in names:
        if name not in known:
            raise ValueError(f"--parts {name}: this call has no such part; name some of {' '.join(known)}")
    return [part for part in parts if not names or part.name in (*names, "data")]


def facts() -> dict[str, str]:
    """Device, date and versions."""
    import torch

    has_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if has_gpu else f"{os.cpu_count()}-core CPU",
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC",
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if has_gpu else "not used",
        "cuda": torch.version.cuda or "none",
    }


def excerpt(log: Path, part: Part, outcome: Outcome) -> list[str]:
    """The lines of a log that the tables show: those of the part's pattern, the last ones if it failed."""
    if outcome.state == "left" or not log.exists():
        return []
    lines = log.read_text(errors="replace").splitlines()
    if outcome.state == "failed":
        return lines[-FAILED:]
    return [line for line in lines if part.shown and re.search(part.shown, line)][-SHOWN:]


def trainings(parts: list[Part], outcomes: dict[str, Outcome], work: Path) -> list[str]:
    """One table row for each training that is done, with the table's head."""
    rows = []
    for part in parts:
        stages = work / part.settings.get("RUN_ID", "") / "stages.json"
        if (
            part.settings.get("STAGE") != "train"
            or outcomes[part.name].state != "done"
            or not stages.exists()
        ):
            continue
        train = json.loads(stages.read_text())["train"]
        score = work / part.settings["RUN_ID"] / "score.json"
        bpb = f"{json.loads(score.read_text())['bpb']:.5f}" if score.exists() else "-"
        limit = part.settings["MAX_WALLCLOCK_SECONDS"].replace("{seconds}", "what was left")
        speed = f"{train['tokens_per_second']:,.0f}"
        rows.append(f"| {part.name} | {limit} | {train['steps']} | {speed} | {bpb} |")
    head = [
        "| training | budget, s | steps | tokens/s | BPB (256 tokens of context) |",
        "|---|---|---|---|---|",
    ]
    return [*head, *rows, ""] if rows else []


def section(
    call: str, parts: list[Part], outcomes: dict[str, Outcome], session: Session, about: dict[str, str]
) -> str:
    """A call's section of records/gpu_checks.md."""
    versions = ", ".join(f"{name} {value}" for name, value in about.items() if name not in ("device", "date"))
    lines = [f"## {about['device']}, {about['date']}: bench/gpu_session.sh {call}", "", versions, ""]
    lines += ["| part | state | seconds | |", "|---|---|---|---|"]
    for name, outcome in outcomes.items():
        lines.append(f"| {name} | {outcome.state} | {outcome.seconds:.0f} | {outcome.why} |")
    lines += ["", *trainings(parts, outcomes, session.work)]
    for part in parts:
        shown = excerpt(session.log(part), part, outcomes[part.name])
        if shown:
            lines += [f"### {part.name}", "", "```", *shown, "```", ""]
    return "\n".join(lines)


def append_records(tables: list[Path], records: Path) -> None:
    """Append the sections of finished calls to the records."""
    before = records.read_text() if records.exists() else "# GPU checks\n"
    sections = [path.read_text() for path in tables]
    written = records.with_suffix(".new")
    written.write_text("\n\n".join(text.strip("\n") for text in [before, *sections]) + "\n")
    written.replace(records)


def carry(texts: list[Path], validation: Path, tokenizer: Path, folder: Path, megabytes: float) -> None:
    """Fill `folder` with training text, validation text and tokenizer, at most so many megabytes together."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(validation, folder / "val.jsonl.xz")
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    most = megabytes * 1e6 - validation.stat().st_size - tokenizer.stat().st_size
    coder = lzma.LZMACompressor(preset=6)
    written = count = 0
    with contextlib.ExitStack() as stack:
        sources = [stack.enter_context(lzma.open(path, "rb")) for path in texts]
        out = stack.enter_context((folder / "train.jsonl.xz").open("wb"))
        while sources and written < most - 1e6:  # the coder still holds back some
            for source in list(sources):
                line = source.readline()
                if not line:
                    sources.remove(source)
                    continue
                written += out.write(coder.compress(line))
                count += 1
        written += out.write(coder.flush())
    print(f"{folder}: {count:,} documents in {written / 1e6:.1f} MB, validation text and tokenizer")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The checked command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=[*CALLS, "carry", "record"], help="a call, or what is around them")
    parser.add_argument("files", nargs="*", type=Path, help="carry: .jsonl.xz files; record: tables_*.md")
    add = parser.add_argument
    add("--limit", type=number_option(float, 30), default=570.0, metavar="S", help="seconds of a call (570)")
    add("--parts", nargs="+", default=[], metavar="NAME", help="of a call: these alone, after its data")
    add("--against", type=Path, metavar="FILE", help="call 3: a module like bench/train_step.py")
    add("--data", type=Path, metavar="FOLDER", help="a dataset that is there already, instead of the text")
    add("--carried", type=Path, default=ROOT / "runs" / "carried", metavar="FOLDER", help="what travels")
    add("--work", type=Path, default=ROOT / "runs" / "gpu_session", metavar="FOLDER", help="logs, models")
    add("--out", type=Path, metavar="FOLDER", help="tables (default: $OUT, else the folder of --work)")
    add("--dry", action="store_true", help="tiny shapes on the CPU")
    add("--tokenizer", type=Path, metavar="FILE", help="carry: SentencePiece model")
    add("--val", type=Path, metavar="FILE", help="carry: validation documents, .jsonl.xz")
    add("--megabytes", type=number_option(float, 5), default=38.0, help="carry: of everything (38)")
    options = parser.parse_args(arguments)
    inputs = [*options.files, options.against, options.data, options.tokenizer, options.val]
    for path in inputs:
        if path and not path.exists():
            parser.error(f"{path}: does not exist; name a file or folder that does")
    if options.data and not (options.data / "manifest.json").is_file():
        finished = "name a dataset that data/prepare.py or data/download.py has finished"
        parser.error(f"--data {options.data}: no manifest.json there; {finished}")
    if options.action == "carry" and not (options.files and options.tokenizer and options.val):
        parser.error("carry: TEXT, --tokenizer and --val are needed; name all three")
    if options.action == "record" and not options.files:
        parser.error("record: TABLES is missing; name the tables_*.md of the calls")
    if options.action in CALLS and not (options.data or (options.carried / "train.jsonl.xz").exists()):
        parser.error(f"--carried {options.carried}: no train.jsonl.xz there; run carry first or name --data")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Do what was asked for; a call prints its tables and the RESULT line."""
    options = parse(arguments)
    if options.action == "carry":
        carry(options.files, options.val, options.tokenizer, options.carried, options.megabytes)
        return 0
    if options.action == "record":
        append_records(options.files, RECORDS)
        return 0
    work = options.work.resolve()
    against = options.against and options.against.resolve()
    data = options.data.resolve() if options.data else work / "data"
    places = Places(options.carried.resolve(), data, work, options.dry, against)
    session = Session(work, options.limit)
    about = facts()
    if not options.dry and about["device"].endswith("CPU"):
        print("gpu_session: there is no GPU here; --dry tries the plan without one", file=sys.stderr)
        return 2
    try:
        parts = choose_parts(CALLS[options.action](places), options.parts)
    except ValueError as error:
        print(f"gpu_session: {error}", file=sys.stderr)
        return 2
    if options.dry:
        # How long a CPU takes, busy with other things, says nothing: a part may take what is left.
        parts = [part._replace(most=options.limit) for part in parts]
    outcomes = session.run(parts)
    text = section(options.action, parts, outcomes, session, about)
    out = options.out or Path(os.environ.get("OUT") or work)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"tables_{options.action}.md").write_text(text)
    print(text)
    states = {name: outcome.state for name, outcome in outcomes.items()}
    print("RESULT " + json.dumps({"call": options.action, "dry": options.dry, **about, "parts": states}))
    return 1 if "failed" in states.values() else 3 if "left" in states.values() else 0


if __name__ == "__main__":
    sys.exit(main())
