"""bench/gpu_compile.py without a CUDA build of torch: its message, its sums and tables, and its C library."""

from __future__ import annotations

import argparse
import ast
import ctypes
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
import torch

import train_gpt as t
from bench.null_gpu import account, build
from helpers import ROOT

SCRIPT = ROOT / "bench" / "gpu_compile.py"
PACKAGES = Path(torch.__file__).parent.parent
LEDGER = (
    "3\ttriton:chain\n2\ttriton:loss\n5\taten:fill\n1\tmemset\n4\tgemm:TN m=128 n=64 k=32 batch=2 type=14\n"
)
needs_gcc = pytest.mark.skipif(
    shutil.which("gcc") is None or not build.include_folders(PACKAGES),
    reason="needs gcc, and the headers of CUDA that triton brings",
)


@pytest.fixture
def script(monkeypatch) -> ModuleType:
    """The script as a module; it changes the path."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("bench_gpu_compile", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(*words: str) -> subprocess.CompletedProcess:
    """Run the script."""
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False)


# --- the command ---
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is a CUDA build")
def test_without_a_cuda_build_it_says_so_in_one_line():
    done = start("--quick")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert f"torch {torch.__version__} is not a CUDA build" in line and "pip install" in line


@pytest.mark.parametrize(
    "words, named",
    [
        (["--parts", "shapes,speed"], "no part speed"),
        (["--set", "NUM_LAYERS"], "NAME=VALUE"),
        (["--flash-attn", "/nowhere"], "/nowhere"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(words, named):
    done = start(*words)
    assert done.returncode == 1 and named in done.stderr and len(done.stderr.splitlines()) == 1


# --- sums and tables ---
def test_a_buffer_counts_once_however_often_it_is_read():
    twice = {"x": {"i": (100, 100), "i + 1": (99, 100)}}
    halves = {"x": {"i": (50, 100), "i + 50": (50, 100)}, "y": {"i": (7, 10)}}
    assert account.bytes_moved(twice) == 100
    assert account.bytes_moved(halves) == 107
    assert account.bytes_moved({}) == 0


def test_a_product_is_read_from_its_line():
    moved, operations = account.product("gemm:TN m=128 n=64 k=32 batch=2 type=14", calls=3)
    assert operations == 3 * 2 * (2 * 128 * 64 * 32)
    assert moved == 3 * 2 * 2 * (128 * 32 + 32 * 64 + 128 * 64)
    assert account.product("aten:fill", 1) is None


def test_a_single_precision_product_moves_twice_the_bytes():
    half, single = (account.product(f"gemm:NN m=8 n=8 k=8 batch=1 type={kind}", 1) for kind in (14, 0))
    assert single[0] == 2 * half[0] and single[1] == half[1]


def rows() -> list[account.Work]:
    """The rows of LEDGER as the forward phase."""
    generated = {"chain": {"bytes": 10**9, "part": "trunk"}}
    hand = {"loss": account.Hand(2, 4e9, 0.0)}
    return account.rows_of("forward", account.parse_ledger(LEDGER), generated, hand)


def test_every_launch_has_a_row_and_a_memset_has_none():
    found = {(row.kind, row.part): row for row in rows()}
    assert found["generated", "trunk"].launches == 3 and found["generated", "trunk"].bytes == 3e9
    assert found["hand-written", "loss"] == account.Work("forward", "loss", "hand-written", 2, 4e9, 0.0)
    assert found["cuBLAS", "products"].launches == 4
    assert sum(row.launches for row in found.values()) == 14


def test_a_floor_is_the_slower_of_memory_and_arithmetic():
    work = account.Work("forward", "x", "cuBLAS", 1, account.BANDWIDTH / 1000, account.OPERATIONS / 500)
    assert work.floor_ms == pytest.approx(2.0)
    assert work._replace(operations=0.0).floor_ms == pytest.approx(1.0)


def test_rows_merge_within_a_phase_and_the_longest_comes_first():
    one = account.Work("forward", "norm", "generated", 1, 1e9)
    other = account.Work("forward", "loss", "generated", 1, 5e9)
    later = account.Work("backward", "norm", "generated", 1, 9e9)
    merged = account.merge([one, other, later, one])
    assert merged == [other, one._replace(launches=2, bytes=2e9), later]


def test_the_figures_of_a_step_leave_the_update_and_the_products_out():
    update = account.Work("optimiser", "x", "generated", 7, 1e12)
    facts = account.summary([*rows(), update])
    assert facts["launches_per_step"] == 14
    assert facts["elementwise_gb"] == pytest.approx(7.0)
    assert facts["floor_ms"] == pytest.approx(1000 * 7e9 / account.BANDWIDTH, abs=0.02)


def test_the_table_ends_with_its_sums():
    last = account.markdown(rows()).splitlines()[-1]
    assert last.startswith("| all |") and "| 14 | 7.00 |" in last


def test_what_was_refused_is_found():
    ledger = account.parse_ledger("1\trefused:launch of x\n2\ttriton:y\n")
    assert account.refused(ledger) == ["launch of x"]


def test_what_a_kernel_touches_sparsely_counts_by_sectors():
    slopes, logits = torch.zeros(4, 3, 100), torch.zeros(4, 3, 100)
    touched = {("finish", "slopes"): 2, ("other", "logits"): 5}
    whole, sparse = account.split_arguments({"slopes": slopes, "logits": logits}, "finish", touched)
    assert list(whole) == ["logits"] and whole["logits"] is logits
    assert sparse == 4 * 3 * 2 * 2 * account.SECTOR  # rows, values in each, read and written
    assert account.split_arguments({"logits": logits}, "finish", touched) == ({"logits": logits}, 0.0)


def test_every_sparse_argument_is_one_of_the_trainers_kernels():
    source = ast.parse((ROOT / "bench" / "null_gpu" / "parts.py").read_text())  # to import it takes a second
    tables = {
        ast.unparse(node.targets[0]): node.value for node in source.body if isinstance(node, ast.Assign)
    }
    touched = ast.literal_eval(tables["TOUCHED"])
    assert touched and all(argument in getattr(t, kernel).arg_names for kernel, argument in touched)


def test_launches_are_told_from_what_is_recorded():
    text = (
        "3\ttriton:a\n2\tcopy:host-to-device\n1\tgraph\n9\tdescriptor:x\n4\trecorded:triton:a\n1\trefused:b\n"
    )
    ledger = account.parse_ledger(text)
    assert account.launches(ledger) == {"triton:a": 3, "copy:host-to-device": 2, "graph": 1}
    assert account.launches(ledger, recorded=True) == {"triton:a": 4}


def test_the_result_has_all_keys_whatever_ran(script):
    part = {"checks": [[True, "fine"]], "graph_breaks": 0, "recompiles": 2, "spills": None}
    facts = script.result({"shapes": part})
    assert list(facts) == list(script.RESULT_KEYS)
    assert facts["recompiles"] == 2 and facts["spills"] is None and facts["elementwise_gb"] is None


def test_the_record_names_what_fails_and_what_is_not_checked(script):
    work = [list(row) for row in rows()]
    training = {"checks": [[False, "2 spills"]], "rows": work, "spills": 2, "peak_gib": 39.5, "notes": []}
    found = {"training": training}
    text = script.record(found, script.result(found), "python bench/gpu_compile.py")
    assert "fails: 2 spills" in text and "| peak_gib | 39.5 |" in text and "trunk" in text
    assert all(line in text for line in script.NOT_CHECKED)
    json.dumps(script.result(found))


def test_a_part_that_held_is_not_repeated_until_something_changes(script, tmp_path, monkeypatch, capsys):
    checks, starts = [[True, "fine"]], []

    def start(name, arguments, library):
        starts.append(name)
        return {"checks": checks}

    monkeypatch.setattr(script, "start_part", start)
    monkeypatch.setattr(script.importlib.metadata, "version", lambda package: "1.0")
    options = argparse.Namespace(cache=str(tmp_path), set=[], flash_attn="", again=False)

    def run(name: str, **changes) -> int:
        options.__dict__.update(changes)
        before = len(starts)
        assert script.run_part(name, options, tmp_path) == {"checks": checks}
        return len(starts) - before

    assert run("shapes") == 1 and run("shapes") == 0
    assert "kept: all 1 checks held before" in capsys.readouterr().out
    assert run("run") == 1  # another part
    assert run("shapes", set=["NUM_LAYERS=2"]) == 1 and run("shapes") == 0
    assert run("shapes", again=True) == 1 and run("shapes", again=False) == 0
    checks[0][0] = False
    assert run("shapes", flash_attn="/x") == 1 and run("shapes") == 1  # what failed is tried again


def test_a_signal_ends_the_parts_with_all_that_they_have_started(script, monkeypatch):
    handlers = {}
    monkeypatch.setattr(script, "parse_arguments", lambda: argparse.Namespace(cache="/nowhere", parts=[]))
    monkeypatch.setattr(script.build, "missing", lambda: "")
    monkeypatch.setattr(script.build, "build", lambda cache: cache)
    monkeypatch.setattr(script.signal, "signal", handlers.__setitem__)
    command = ["sh", "-c", "sleep 100 & echo begun; wait"]

    def killed(*_) -> None:
        with script.CHILDREN.start(command, stdout=subprocess.PIPE, text=True) as part:
            assert part.stdout.readline() == "begun\n"
            with pytest.raises(SystemExit) as ended:
                handlers[signal.SIGTERM](signal.SIGTERM, None)
            assert ended.value.code == 128 + signal.SIGTERM
            assert part.stdout.read() == ""  # nobody is left who could write
        script.CHILDREN.start(command)

    monkeypatch.setattr(script, "run_parts", killed)
    with pytest.raises(SystemExit, match="stopped"):
        script.main()
    assert handlers.keys() == {signal.SIGTERM, signal.SIGINT}


# --- the library ---
def test_functions_that_exist_get_no_stub():
    made = build.stubs(
        {"cuInit", "cudaMalloc", "ncclSend"}, "cudaError_t cudaMalloc(void **memory, size_t size) {"
    )
    assert made == "int cuInit(void) { return 0; }\nint ncclSend(void) { return 0; }\n"


@needs_gcc
@pytest.mark.parametrize(
    "source", [path for path in build.SOURCES if path.suffix == ".c"], ids=lambda p: p.name
)
def test_the_source_compiles_without_a_warning(source, tmp_path):
    options = [*build.FLAGS, *build.include_folders(PACKAGES), *build.WITHOUT_HALVES]
    command = ["gcc", *options, "-c", str(source), "-o", str(tmp_path / "object.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    """The null GPU without PyTorch: nobody is preloaded."""
    made = tmp_path_factory.mktemp("null_gpu") / "null_gpu.so"
    sources = [str(path) for path in build.SOURCES if path.suffix == ".c"]
    options = [*build.FLAGS, *build.include_folders(PACKAGES), *build.WITHOUT_HALVES, "-shared"]
    subprocess.run(["gcc", *options, *sources, "-o", str(made), "-ldl", "-lpthread"], check=True)
    loaded = ctypes.CDLL(str(made))
    loaded.memory_take.restype = ctypes.c_void_p
    return loaded


def ledger_of(library: ctypes.CDLL, folder: Path) -> dict[str, int]:
    """What the library has counted since its last reset."""
    path = folder / "ledger.tsv"
    assert library.nullgpu_dump(str(path).encode()) == 0
    return account.parse_ledger(path.read_text())


@needs_gcc
def test_the_device_is_full_when_it_is_full(library):
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    memory = ctypes.c_void_p()
    assert library.cudaMalloc(ctypes.byref(memory), ctypes.c_size_t(70 << 30)) == 0
    library.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
    assert total.value - free.value == 70 << 30
    more = ctypes.c_void_p()
    assert library.cudaMalloc(ctypes.byref(more), ctypes.c_size_t(20 << 30)) != 0
    library.cudaFree(memory)
    library.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
    assert free.value == total.value


@needs_gcc
def test_copies_bring_values_back(library):
    memory = ctypes.c_void_p()
    library.cudaMalloc(ctypes.byref(memory), ctypes.c_size_t(16))
    back = ctypes.create_string_buffer(16)
    library.cudaMemcpy(memory, b"fifteen letters", ctypes.c_size_t(16), 1)
    library.cudaMemcpy(back, memory, ctypes.c_size_t(16), 2)
    library.cudaFree(memory)
    assert back.value == b"fifteen letters"


@needs_gcc
@pytest.mark.parametrize("stride, refused", [(1024, False), (1000, True)])
def test_a_descriptor_with_a_crooked_stride_is_refused(library, tmp_path, stride, refused):
    library.nullgpu_reset()
    memory = ctypes.c_void_p()
    library.cudaMalloc(ctypes.byref(memory), ctypes.c_size_t(1 << 20))
    sizes, strides = (ctypes.c_uint64 * 2)(500, 64), (ctypes.c_uint64 * 1)(stride)
    box, steps = (ctypes.c_uint32 * 2)(64, 64), (ctypes.c_uint32 * 2)(1, 1)
    bf16, swizzle_128 = 9, 3
    given = (
        ctypes.create_string_buffer(128),
        bf16,
        2,
        memory,
        sizes,
        strides,
        box,
        steps,
        0,
        swizzle_128,
        0,
        0,
    )
    assert (library.cuTensorMapEncodeTiled(*given) != 0) is refused
    assert bool(account.refused(ledger_of(library, tmp_path))) is refused
    library.cudaFree(memory)


@needs_gcc
def test_a_recording_counts_launches_apart_and_refuses_whoever_waits(library, tmp_path):
    library.nullgpu_reset()
    stream, graph, nodes = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_size_t()
    library.cudaStreamCreate(ctypes.byref(stream))
    assert library.cudaStreamBeginCapture(stream, 1) == 0
    library.cudaMemsetAsync(ctypes.create_string_buffer(8), 0, ctypes.c_size_t(8), stream)
    assert library.cudaStreamSynchronize(None) == 0  # another stream
    assert library.cudaStreamSynchronize(stream) != 0 and library.cudaDeviceSynchronize() != 0
    assert library.cudaStreamBeginCapture(stream, 1) != 0
    assert library.cudaStreamEndCapture(stream, ctypes.byref(graph)) == 0 and graph.value
    assert library.cudaGraphGetNodes(graph, None, ctypes.byref(nodes)) == 0 and nodes.value == 1
    assert library.cudaStreamSynchronize(stream) == 0 and library.cudaDeviceSynchronize() == 0
    library.cudaGraphLaunch(graph, stream)
    found = ledger_of(library, tmp_path)
    assert found["recorded:memset"] == 1 and found["graph"] == 1 and "memset" not in found
    assert len(account.refused(found)) == 3


class Id(ctypes.Structure):
    """ncclUniqueId."""

    _fields_ = [("bytes", ctypes.c_char * 128)]


def meet(library: ctypes.CDLL, calls: list) -> list[int]:
    """The status of `calls` (communicator -> status), one for each rank, made at the same time."""
    identity, statuses = Id(), [None] * len(calls)
    library.ncclGetUniqueId(ctypes.byref(identity))

    def work(rank: int) -> None:
        group = ctypes.c_void_p()
        library.ncclCommInitRank(ctypes.byref(group), len(calls), identity, rank)
        statuses[rank] = calls[rank](group)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses


@needs_gcc
def test_ranks_that_disagree_about_a_collective_are_refused(library, tmp_path, monkeypatch):
    monkeypatch.setenv("NULL_GPU_RANKS", str(tmp_path))
    data = ctypes.create_string_buffer(1 << 12)

    def reduce(count: int, kind: int):
        return lambda group: library.ncclAllReduce(data, data, ctypes.c_size_t(count), kind, 0, group, None)

    library.nullgpu_reset()
    assert meet(library, [reduce(952, 7), reduce(952, 7)]) == [0, 0]
    assert account.refused(ledger_of(library, tmp_path)) == []
    assert all(meet(library, [reduce(952, 7), reduce(5120 // 8, 9)]))
    assert len(account.refused(ledger_of(library, tmp_path))) == 2


@needs_gcc
def test_a_broadcast_carries_its_bytes(library, tmp_path, monkeypatch):
    monkeypatch.setenv("NULL_GPU_RANKS", str(tmp_path))
    sent, got = ctypes.create_string_buffer(b"word", 8), ctypes.create_string_buffer(8)
    send = lambda group: library.ncclBroadcast(sent, sent, ctypes.c_size_t(8), 1, 0, group, None)
    receive = lambda group: library.ncclBroadcast(got, got, ctypes.c_size_t(8), 1, 0, group, None)
    assert meet(library, [send, receive]) == [0, 0]
    assert got.value == b"word"
