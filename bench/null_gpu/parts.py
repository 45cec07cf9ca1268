"""The checks of bench/gpu_compile.py, each in a process of its own that meets the null GPU:

    python -m bench.null_gpu.parts PART OPTIONS FILE

OPTIONS is a JSON object (see Options), FILE receives the findings as one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

import train_gpt as t
from bench.null_gpu import account, attention, whole_run
from bench.null_gpu.record import Ledger, Recorder

FLAGSHIP_SEGMENTS = 150  # document segments in a packed micro-batch of 98,304 tokens: about FineWeb's number
SHORT = {  # the flagship's width with every kind of visit, and few of them
    "NUM_LAYERS": "4",
    "LOOP_START": "1",
    "LOOP_END": "2",
    "NUM_LOOPS": "1",
    "XSA_LAST_N": "4",
    "PARALLEL_START_LAYER": "3",
}
SHORTEST = {**SHORT, "NUM_LAYERS": "3", "NUM_LOOPS": "0", "PARALLEL_START_LAYER": "2"}
DOCUMENTS = {  # an evaluation of seconds
    **SHORT,
    "TTT_BATCH_SIZE": "8",
    "TTT_CHUNK_SIZE": "256",
    "TTT_EVAL_SEQ_LEN": "1024",
    "PHASED_TTT_PREFIX_DOCS": "16",
    "GLOBAL_TTT_CHUNK_TOKENS": "8192",
    "TTT_CHUNK_TOKENS": "16384",
    "EVAL_STRIDE": "512",
    "TTT_EPOCHS": "1",
}


@dataclass
class Options:
    """What the command line chose."""

    cache: str
    settings: dict[str, str] = field(default_factory=dict)
    flash_attn: str = ""


@dataclass
class Findings:
    """What a part found; `rows` are account.Work as lists."""

    checks: list[tuple[bool, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: list[list] = field(default_factory=list)
    graph_breaks: int = 0
    recompiles: int = 0
    spills: int | None = None
    peak_gib: float | None = None

    def expect(self, holds: bool, text: str) -> None:
        """Note a check and print it."""
        self.checks.append((bool(holds), text))
        print(("ok    " if holds else "FAIL  ") + text, flush=True)

    def note(self, text: str) -> None:
        """Keep a line for the record and print it."""
        self.notes.append(text)
        print(text, flush=True)


# --- the trainer: all that this program knows of it ---
# Functions of the trainer that name no part of the model.
HELPERS = frozenset({"rms_norm", "matmul", "adapt", "<lambda>"})
# Hand-written kernels that touch few values of a tensor: so many in each of its rows.
TOUCHED = {("head_finish_kernel", "slopes"): 1}


def take_attention(attend: Callable, config: t.Config, run: t.Run) -> str:
    """In place of the trainer's trial, which compares numbers: the part interfaces tries every backend."""
    return ""


class Trainer:
    """The trainer's own objects for some settings."""

    def __init__(self, settings: dict[str, str]):
        t.try_attention = take_attention
        self.config = t.Config.from_env(settings)
        self.run = t.Run(self.config)
        self.model, self.forward, self.compiled = t.build(self.run)

    def packed(self, segments: int, total: int = 0, seed: int = 0) -> t.Batch:
        """A packed row of `total` tokens (0: a micro-batch) in equal segments, on the device."""
        total = total or self.config.micro_batch_tokens
        tokens = np.random.default_rng(seed).integers(2, self.config.vocab_size, total + 1)
        tokens[np.linspace(0, total, segments, endpoint=False).astype(int)] = t.BOS
        row = torch.from_numpy(tokens)
        starts = t.segment_starts(tokens[:-1], self.config.train_seq_len)
        return t.to_device(
            t.Batch(row[None, :-1], row[None, 1:], starts, self.config.train_seq_len), self.run
        )

    def rows(self, count: int, length: int) -> t.Batch:
        """Windows one below the other, on the device."""
        ids = torch.randint(2, self.config.vocab_size, (count, length + 1))
        return t.to_device(t.Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()), self.run)

    def stepper(self, replayed: bool) -> Callable[[t.Batch], Tensor]:
        """A step of one micro-batch, its average included, as CUDA graphs if it is `replayed`."""
        average = {name: weight.detach().float().clone() for name, weight in self.model.named_parameters()}
        optimizers = t.Optimizers(self.run, self.model, self.compiled, average)
        graphs = t.StepGraphs(self.run, self.model, self.forward, optimizers) if replayed else None
        return lambda batch: t.train_step(self.run, self.forward, optimizers, [batch], 0.5, 1, graphs)

    def adapters(self, documents: int) -> torch.nn.Module:
        """Fresh adapters for so many documents."""
        return t.LoRA(self.config, documents, self.run.device)

    def adapted(self) -> Callable[..., Tensor]:
        """The forward that takes adapters, compiled like the evaluation's."""
        return torch.compile(self.model, dynamic=True, fullgraph=True)

    def update(self) -> dict[str, Callable[[], None]]:
        """The optimiser's step and the average's, by phase."""
        optimizers = t.Optimizers(self.run, self.model, self.compiled)
        average = {name: weight.detach().float().clone() for name, weight in self.model.named_parameters()}
        return {
            "optimiser": lambda: optimizers.step(1.0, 0.95, self.config.muon_wd),
            "average": lambda: t.update_ema(average, self.model, self.config.ema_decay),
        }

    def scorers(self) -> dict[str, Callable[[t.Tally], None]]:
        """Every way of scoring, as the evaluation starts them."""
        run, model, c = self.run, self.model, self.config
        adapted = self.adapted()
        return {
            "plain": lambda tally: t.score_sliding(run, self.forward, c.eval_seq_len, tally),
            "sliding": lambda tally: t.score_sliding(run, self.forward, c.eval_stride, tally),
            "chunk SGD": lambda tally: t.chunk_sgd(run, model, self.forward, tally),
            "document adapters": lambda tally: t.doc_lora(run, model, adapted, tally),
        }

    def tally(self, lengths: np.ndarray, seed: int) -> t.Tally:
        """An empty score of random documents of these lengths."""
        tokens = np.random.default_rng(seed).integers(2, self.config.vocab_size, int(lengths.sum()))
        tokens[np.cumsum(lengths) - lengths] = t.BOS
        sizes = np.ones(len(tokens), np.int32)
        return t.Tally(self.run, t.Validation(tokens.astype("<u2"), sizes, "random"))

    def rehearse(self, scorers: dict[str, Callable[[t.Tally], None]]) -> None:
        """What the trainer does before the evaluation's clock starts."""
        t.rehearse(self.run, scorers)


# --- what all parts use ---
def graphs() -> int:
    """Graphs that Dynamo has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def graph_breaks() -> int:
    """Graph breaks that Dynamo has counted in this process."""
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def kernels() -> int:
    """How many forms of the trainer's Triton kernels this process has built: one per key of arguments."""
    ours = [value for value in vars(t).values() if isinstance(value, triton.JITFunction)]
    return sum(len(forms) for kernel in ours for forms, *_ in kernel.device_caches.values())


def brief(error: BaseException) -> str:
    """Kind and beginning of an exception, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """torch.compile with a backend that generates no code: "eager", or "aot_eager", which differentiates."""
    real = torch.compile
    torch.compile = lambda *arguments, **options: real(*arguments, **options, backend=name)
    torch._dynamo.reset()
    try:
        yield
    finally:
        torch.compile = real
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def case(findings: Findings, label: str, expected: int, action: Callable[[], Any]) -> None:
    """`action` must make so many new graphs, and raise nothing; if none, then no form of a kernel either."""
    before, kernels_before = graphs(), kernels()
    try:
        action()
    except Exception as error:
        findings.expect(False, f"{label}: {brief(error)}")
        return
    made = graphs() - before
    built = kernels() - kernels_before if expected == 0 else 0
    findings.recompiles += max(0, made - expected) + built
    again = f"; {built} kernels built again" if built else ""
    findings.expect(made == expected and not built, f"{label}: {made} graphs, {expected} expected{again}")


def on_the_host() -> torch.library.Library:
    """Let nonzero and unique work on the host: what they look at comes from there, and a size goes back."""

    def unique(numbers, sort=True, return_inverse=False, return_counts=False):
        found = torch.ops.aten._unique2(numbers.cpu(), sort, return_inverse, return_counts)
        return tuple(tensor.to(numbers.device) for tensor in found)

    library = torch.library.Library("aten", "IMPL")
    library.impl("nonzero", lambda mask: mask.cpu().nonzero().to(mask.device), "CUDA", allow_override=True)
    library.impl("_unique2", unique, "CUDA", allow_override=True)
    return library


def without_orthogonal_start() -> None:
    """Start from normal matrices: orthogonal ones take half a minute, and no value matters here."""
    torch.nn.init.orthogonal_ = lambda matrix: torch.nn.init.normal_(matrix, std=0.02)


# --- the parts ---
def interfaces(options: Options, findings: Findings) -> None:
    """Every attention backend, packed and dense, and with adapters over many lengths; differentiated."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # it needs a driver that does more
    for name in ("fa3", "fa2", "varlen"):
        with backend("aot_eager"):
            try:
                trainer = Trainer(SHORTEST | options.settings | {"ATTENTION": name})
            except (Exception, SystemExit) as error:
                findings.expect(False, f"{name}: {brief(error)}")
            else:
                learn_packed_and_windows(findings, trainer, name)
                adapt_over_lengths(findings, trainer, f"{name}, adapters")


def learn_packed_and_windows(findings: Findings, trainer: Trainer, label: str) -> None:
    """A graph each for packed rows and for windows."""

    def learn(batch: t.Batch) -> None:
        trainer.forward(batch).mean().backward()

    case(findings, f"{label}, packed rows", 1, lambda: learn(trainer.packed(50)))
    case(findings, f"{label}, windows", 1, lambda: learn(trainer.rows(8, 2048)))


def adapt_over_lengths(findings: Findings, trainer: Trainer, label: str) -> None:
    """Adapters: a graph for learning and one for scoring, whatever the length and the documents."""
    adapted = trainer.adapted()
    trainer.model.requires_grad_(False)
    first, second = trainer.adapters(8), trainer.adapters(8)

    def learn(lora: torch.nn.Module, length: int) -> None:
        adapted(trainer.rows(8, length), lora=lora).sum().backward()

    @torch.no_grad()
    def score(length: int) -> None:
        adapted(trainer.rows(8, length), lora=first)

    case(findings, f"{label}, 48 tokens", 1, lambda: learn(first, 48))
    for length in (96, 17, 500, 2048):
        case(findings, f"{label}, {length} tokens", 0, lambda length=length: learn(first, length))
    case(findings, f"{label} of other documents", 0, lambda: learn(second, 144))
    case(findings, f"{label}, last chunk", 1, lambda: score(48))
    case(findings, f"{label}, last chunk of other length", 0, lambda: score(96))
    trainer.model.requires_grad_(True)


def shapes(options: Options, findings: Findings) -> None:
    """Which changes of shape or flag make a new graph in training."""
    with backend("eager"):
        trainer = Trainer(SHORT | options.settings)
        model = trainer.model

        def learn(segments: int, seed: int = 0) -> None:
            trainer.forward(trainer.packed(segments, seed=seed)).mean().backward()

        @torch.no_grad()
        def score(segments: int) -> None:
            trainer.forward(trainer.packed(segments, total=65_536))

        case(findings, "training, 50 segments", 1, lambda: learn(50))
        case(findings, "training, 50 others", 0, lambda: learn(50, seed=1))
        model.looped = True
        case(findings, "training, loops on", 1, lambda: learn(50))
        model.looped = False
        case(findings, "training, loops off again", 0, lambda: learn(50))
        case(findings, "scoring", 1, lambda: score(40))
        case(findings, "scoring others", 0, lambda: score(41))
        weights = {name: weight.cpu() for name, weight in model.state_dict().items()}
        model.load_state_dict(weights)
        case(findings, "training after load_state_dict", 0, lambda: learn(50))


def evaluation(options: Options, findings: Findings) -> None:
    """Every way of scoring after its rehearsal: none may make a graph while the clock runs."""
    keep = on_the_host()
    draw = np.random.default_rng(0)
    with backend("eager"):
        trainer = Trainer(DOCUMENTS | options.settings)
        for name, score in trainer.scorers().items():
            try:
                trainer.rehearse({name: score})
            except (Exception, SystemExit) as error:
                findings.expect(False, f"{name}, rehearsal: {brief(error)}")
                continue
            for seed, count in enumerate((24, 27)):  # the second leaves a batch of 3 documents
                lengths = draw.lognormal(5.5, 0.8, count).astype(int).clip(8, 1500)
                label = f"{name}, {count} documents after its rehearsal"
                case(findings, label, 0, lambda: score(trainer.tally(lengths, seed)))  # noqa: B023 -- called at once
    del keep


class Counted:
    """A trainer whose kernels are recorded: runs actions twice, counts the second time."""

    def __init__(self, options: Options, findings: Findings):
        torch._inductor.config.force_disable_caches = True  # a kernel from a cache would not be seen
        self.options, self.findings = options, findings
        self.ledger, self.recorder = Ledger(), Recorder(Path(t.__file__), HELPERS, TOUCHED)
        self.refused: set[str] = set()

    def count(self, actions: dict[str, Callable[[], Any]]) -> list[account.Work]:
        """The rows of these actions by phase, when everything is compiled."""
        rows = []
        for counting in (False, True):
            torch.cuda.reset_peak_memory_stats()
            self.ledger.take()
            for phase, action in actions.items():
                self.recorder.hand.clear()
                begin = time.monotonic()
                action()
                seconds, done = time.monotonic() - begin, self.ledger.take()
                self.refused |= set(account.refused(done))
                if counting:
                    rows += account.rows_of(phase, done, self.recorder.generated, self.recorder.hand)
                else:
                    print(f"      {phase} compiled in {seconds:.0f} s", flush=True)
        return rows

    def finish(self, what: str) -> None:
        """Spills, refusals and breaks of everything compiled so far."""
        resources = self.recorder.resources(Path(self.options.cache))
        spilled = {
            name: entries
            for name, entries in resources.items()
            if any(e["stack"] or e["local"] for e in entries)
        }
        self.findings.spills = len(spilled)
        self.findings.expect(
            bool(resources), f"{what}: {len(resources)} generated kernels, resources of all read"
        )
        self.findings.expect(
            not spilled, f"{what}: {len(spilled)} kernels with a stack: spills or slow sines"
        )
        for name, entries in sorted(spilled.items()):
            stacks = ", ".join(f"{e['registers']} registers {e['stack']} B" for e in entries)
            self.findings.note(
                f"      {self.recorder.generated.get(name, {}).get('part', '?')}: {name}: {stacks}"
            )
        self.findings.expect(not self.refused, f"{what}: {len(self.refused)} launches or descriptors refused")
        for line in sorted(self.refused):
            self.findings.note(f"      refused: {line}")


def training(options: Options, findings: Findings) -> None:
    """One micro-batch of the flagship with loops on, through Inductor: the table."""
    counted = Counted(options, findings)
    trainer = Trainer(options.settings)
    trainer.model.looped, batch, losses = True, trainer.packed(FLAGSHIP_SEGMENTS), []

    def forward() -> None:
        losses[:] = [trainer.forward(batch).mean() / 8]

    actions = {"forward": forward, "backward": lambda: losses[0].backward(), **trainer.update()}
    rows = counted.count(actions)
    findings.rows = [list(row) for row in rows]
    findings.peak_gib = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    counted.finish("flagship, loops on")


def variants(options: Options, findings: Findings) -> None:
    """At a short depth through Inductor: no loops, windows, scoring, updates, adapters over many lengths."""
    counted = Counted(options, findings)
    trainer = Trainer(SHORT | options.settings)
    packed, scored = trainer.packed(FLAGSHIP_SEGMENTS), trainer.packed(64, total=65_536)
    windows = trainer.rows(trainer.config.micro_batch_tokens // 2048, 2048)

    def learn(batch: t.Batch, looped: bool) -> None:
        trainer.model.looped = looped
        trainer.forward(batch).mean().backward()

    @torch.no_grad()
    def score() -> None:
        trainer.model.looped = True
        trainer.forward(scored)

    actions = {
        "packed, no loops": lambda: learn(packed, False),
        "windows, loops on": lambda: learn(windows, True),
        "scoring, loops on": score,
        **trainer.update(),
    }
    for name, action in actions.items():
        try:
            findings.rows += [list(row) for row in counted.count({name: action})]
        except Exception as error:
            findings.expect(False, f"{name}: {brief(error)}")
    replay(findings, trainer, packed)
    adapt_over_lengths(findings, trainer, "adapters through Inductor")
    counted.finish("four layers")


def replay(findings: Findings, trainer: Trainer, batch: t.Batch) -> None:
    """A whole step as CUDA graphs: recorded as it runs without them, then two launches among some numbers."""
    ledger, plain, replayed = Ledger(), trainer.stepper(replayed=False), trainer.stepper(replayed=True)
    trainer.model.looped = False  # compiled before
    done = []
    for step in (plain, plain, replayed, replayed):  # the first may compile
        ledger.take()
        try:
            step(batch)
        except Exception as error:
            findings.expect(False, f"CUDA graphs: {brief(error)}")
            return
        done.append(ledger.take())
    _, ran, _, again = (account.launches(one) for one in done)
    recorded = account.launches(done[2], recorded=True)
    refused = account.refused(done[2])
    findings.expect(not refused, f"CUDA graphs: {sum(recorded.values())} launches recorded, none waits")
    lost = ran - recorded - again
    findings.expect(
        not lost, f"CUDA graphs: all that runs without is recorded, but for {dict(lost) or 'nothing'}"
    )
    kernels = {what for what in ran if what.startswith(("triton", "gemm"))}
    others = {what: recorded[what] - ran[what] for what in kernels if recorded[what] != ran[what]}
    findings.expect(
        not others, f"CUDA graphs: {len(kernels)} kernels as without graphs, but for {others or 'nothing'}"
    )
    only = again["graph"] == 2 and not kernels & set(again)
    findings.expect(only, f"CUDA graphs: a step is 2 replays and {sum(again.values()) - 2} fills and copies")
    findings.note(f"      launches of the host for it: {sum(ran.values())} without CUDA graphs")


def run(options: Options, findings: Findings) -> None:
    """The script itself at a small shape: alone, as two ranks that must agree, and these by CUDA graphs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole_run.make_dataset(folder / "data")
        whole_script(options, findings, folder, "1 rank", 1, {})
        whole_script(options, findings, folder, "2 ranks", 2, {})
        replayed = {"CUDA_GRAPHS": "1", "STAGE": "train"}
        whole_script(options, findings, folder, "training of 2 ranks by CUDA graphs", 2, replayed)


def whole_script(
    options: Options, findings: Findings, folder: Path, what: str, ranks: int, settings: dict[str, str]
) -> None:
    """One start of the script: it must end well, leave its files, and compile nothing on the clock."""
    runs = folder / what.replace(" ", "_")
    places = {"DATASETS_DIR": str(folder / "data"), "OUT_DIR": str(runs), "RUN_ID": "null"}
    settings = whole_run.SMALL | options.settings | places | settings
    failures = whole_run.start(runs, settings, options.flash_attn, ranks)
    for line in failures:
        findings.note(f"      {line}")
    label = f"train_gpt.py, {what}"
    findings.expect(not failures, f"{label}: from start to end")
    wanted = ("checkpoint.pt",) if settings.get("STAGE") == "train" else ("final_model.ptz", "summary.json")
    missing = [name for name in wanted if not (runs / "null" / name).exists()]
    findings.expect(not missing, f"{label}: {' and '.join(wanted)}")
    if (runs / "null" / "stages.json").exists():
        late = whole_run.graphs_inside_clock(runs / "null")
        findings.recompiles += late
        findings.expect(late == 0, f"{label}: {late} graphs while the training clock ran")


PARTS = {part.__name__: part for part in (interfaces, shapes, evaluation, training, variants, run)}


def main() -> None:
    """Run one part and write its findings."""
    name, options, path = sys.argv[1], Options(**json.loads(sys.argv[2])), Path(sys.argv[3])
    findings = Findings()
    without_orthogonal_start()
    installed = attention.install(Path(options.flash_attn) if options.flash_attn else None)
    if name == "interfaces":
        findings.note(f"attention: {installed}")
    with contextlib.redirect_stdout(sys.stdout):
        PARTS[name](options, findings)
    findings.graph_breaks = graph_breaks()
    findings.expect(findings.graph_breaks == 0, f"{name}: {findings.graph_breaks} graph breaks")
    path.write_text(json.dumps(dataclasses.asdict(findings)))


if __name__ == "__main__":
    main()
