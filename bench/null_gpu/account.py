"""What the null GPU was asked to do, as rows of a table with floors. Needs no torch.

A floor is the larger of bytes over the memory's bandwidth and operations over the rate that large bf16
products reach: the time below which no program can bring the same traffic and arithmetic on an H100 SXM."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

BANDWIDTH = 3.35e12  # bytes per second
SECTOR = 32  # bytes that the memory reads or writes at least
OPERATIONS = 790e12  # per second
PRODUCT = re.compile(r"gemm:\w\w m=(\d+) n=(\d+) k=(\d+) batch=(\d+) type=(\d+)")
LAUNCHED = ("triton", "gemm", "aten", "nccl", "copy", "memset", "graph")
TYPE_BYTES = {0: 4, 2: 2, 14: 2}  # of cudaDataType: fp32, fp16, bf16


class Work(NamedTuple):
    """Launches of one kind in one phase, with the sums of bytes moved and floating-point operations."""

    phase: str
    part: str
    kind: str  # generated, hand-written, cuBLAS, ATen
    launches: int
    bytes: float = 0.0
    operations: float = 0.0

    @property
    def floor_ms(self) -> float:
        """Milliseconds that these launches take at least."""
        return 1000 * max(self.bytes / BANDWIDTH, self.operations / OPERATIONS)

    @property
    def is_product(self) -> bool:
        """Whether it is a matrix product; everything else moves data."""
        return self.operations > 0


class Hand(NamedTuple):
    """Launches of a hand-written Triton kernel, the bytes of the tensors given to it, its operations."""

    launches: int
    bytes: float
    operations: float


def parse_ledger(text: str) -> dict[str, int]:
    """{what: how often} from the lines "calls<TAB>what" of nullgpu_dump."""
    lines = (line.split("\t", 1) for line in text.splitlines())
    return {what: int(calls) for calls, what in lines}


def bytes_moved(accesses: Mapping[str, Mapping[str, tuple[int, int]]]) -> int:
    """Bytes of {buffer: {place: (bytes read there, bytes of the buffer)}}: places are added up, but a buffer
    is not counted as more than itself, since what is read twice within a kernel comes from a cache."""
    total = 0
    for places in accesses.values():
        parts = sum(part for part, _ in places.values())
        whole = max(whole for _, whole in places.values())
        total += min(parts, whole)
    return total


def split_arguments(
    given: dict[str, Any], kernel: str, touched: dict[tuple[str, str], int]
) -> tuple[dict[str, Any], float]:
    """(the arguments that the kernel goes through, the bytes of the others: a sector read and written for
    each value it touches)."""
    whole = {name: value for name, value in given.items() if (kernel, name) not in touched}
    sparse = (
        2 * SECTOR * touched[kernel, name] * value.numel() // value.size(-1)
        for name, value in given.items()
        if name not in whole
    )
    return whole, float(sum(sparse))


def product(name: str, calls: int) -> tuple[float, float] | None:
    """(bytes, operations) of `calls` products written as the ledger does; None if `name` is none."""
    found = PRODUCT.match(name)
    if found is None:
        return None
    m, n, k, batch, kind = map(int, found.groups())
    size = TYPE_BYTES.get(kind, 4)
    return calls * batch * size * (m * k + k * n + m * n), calls * batch * 2.0 * m * n * k


def merge(rows: Iterable[Work]) -> list[Work]:
    """Rows of the same phase, part and kind as one; phases keep their order, the longest row first."""
    found: dict[tuple[str, str, str], Work] = {}
    for row in rows:
        before = found.get(row[:3], row._replace(launches=0, bytes=0.0, operations=0.0))
        found[row[:3]] = before._replace(
            launches=before.launches + row.launches,
            bytes=before.bytes + row.bytes,
            operations=before.operations + row.operations,
        )
    phases = list(dict.fromkeys(row.phase for row in found.values()))
    return sorted(found.values(), key=lambda row: (phases.index(row.phase), -row.floor_ms))


def rows_of(
    phase: str, ledger: Mapping[str, int], generated: Mapping[str, dict], hand: Mapping[str, Hand]
) -> list[Work]:
    """The rows of one phase: `generated` kernels are {name: {"bytes", "part"}} for one launch, `hand`-written
    ones by name. A memset or a copy is no kernel and no row."""
    rows = []
    for what, calls in ledger.items():
        source, _, name = what.partition(":")
        moved = product(what, calls)
        if moved is not None:
            rows.append(Work(phase, "products", "cuBLAS", calls, *moved))
        elif source == "aten":
            rows.append(Work(phase, "PyTorch's own kernels (bytes not counted)", "ATen", calls))
        elif source == "triton" and name in generated:
            kernel = generated[name]
            rows.append(Work(phase, kernel["part"], "generated", calls, float(calls * kernel["bytes"])))
        elif source == "triton":
            known = hand.get(name, Hand(calls, 0.0, 0.0))
            rows.append(Work(phase, name, "hand-written", calls, known.bytes, known.operations))
    return merge(rows)


def launches(ledger: Mapping[str, int], recorded: bool = False) -> Counter[str]:
    """What was launched, kernels, copies and whole CUDA graphs, or what was only `recorded`: by name."""
    found: Counter[str] = Counter()
    for what, calls in ledger.items():
        source, _, name = what.partition(":")
        if (source == "recorded") == recorded:
            found[name if recorded else what] += calls
    return Counter({what: calls for what, calls in found.items() if what.partition(":")[0] in LAUNCHED})


def refused(ledger: Mapping[str, int]) -> list[str]:
    """What the null GPU would not do."""
    return [what.partition(":")[2] for what in ledger if what.startswith("refused:")]


def markdown(rows: Iterable[Work]) -> str:
    """The rows as a table, with a line of sums."""
    rows = list(rows)
    lines = ["| phase | part | kind | launches | GB | TFLOP | floor, ms |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        figures = f"{row.bytes / 1e9:.2f} | {row.operations / 1e12:.2f} | {row.floor_ms:.2f}"
        lines.append(f"| {row.phase} | {row.part} | {row.kind} | {row.launches} | {figures} |")
    sums = [
        sum(getattr(row, name) for row in rows) for name in ("launches", "bytes", "operations", "floor_ms")
    ]
    lines.append(f"| all | | | {sums[0]} | {sums[1] / 1e9:.2f} | {sums[2] / 1e12:.2f} | {sums[3]:.2f} |")
    return "\n".join(lines)


def summary(rows: Iterable[Work], phases: Iterable[str] = ("forward", "backward")) -> dict[str, float]:
    """launches_per_step, elementwise_gb and floor_ms of the `phases`."""
    chosen = [row for row in rows if row.phase in set(phases)]
    return {
        "launches_per_step": sum(row.launches for row in chosen),
        "elementwise_gb": round(sum(row.bytes for row in chosen if not row.is_product) / 1e9, 2),
        "floor_ms": round(sum(row.floor_ms for row in chosen), 2),
    }
