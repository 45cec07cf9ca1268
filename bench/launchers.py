#!/usr/bin/env python3
"""sweep.py on a real Ray cluster of two nodes, or on a real Slurm, with a worker killed in the middle.

    python bench/launchers.py ray      needs: pip install ray
    python bench/launchers.py slurm    needs: pip install submitit; apt-get install slurm-wlm munge; root

Runs a small sweep of levers of the mini contest (docs/mini.md) through the launcher on this machine, kills
the process that holds the first training, prints what the sweep says, repeats the command, and compares every
score with those of the local launcher, which have to be equal to the last bit. `ray` starts two nodes of one
core each; `slurm` starts munged, slurmctld and slurmd with a configuration of its
own, and stops them at the end. The data is data/demo, which ./run.sh makes.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder: bench/data.py would hide the package data
import environment

environment.enter()
import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

LEVERS = "rate | MATRIX_LR=0.05 | a lever to try the launcher with\n"
SMALL = {  # the mini contest's proportions do not matter here
    "TRAIN_OPERATIONS": "2e11",
    "NUM_LAYERS": "4",
    "TTT_ENABLED": "0",
    "EVAL_PREQUANT": "0",
    "GPTQ_CALIBRATION_BATCHES": "4",
    "TRELLIS_STATES": "0",
    "CHECKPOINT_EVERY": "5",
    "OMP_NUM_THREADS": "1",
}
SLURM_CONF = """
ClusterName=sweep
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
NodeName={host} CPUs=2 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def need(program: str, remedy: str) -> str:
    """The path of a program; SystemExit with what installs it."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin"])
    found = shutil.which(program, path=places)
    if found is None:
        raise SystemExit(f"{program}: not found; {remedy}")
    return found


def wait_for(what: str, holds: Callable[[], bool], seconds: float = 300.0) -> None:
    """Return as soon as `holds()`; SystemExit after so many seconds."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise SystemExit(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.2)


@contextmanager
def ray_cluster(folder: Path) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Two Ray nodes of one core each on this machine; the options of sweep.py, and variables."""
    ray = need("ray", "pip install ray")
    port = free_ports(1)[0]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": True}
    common = [ray, "start", "--num-cpus=1", "--disable-usage-stats", "--object-store-memory=100000000"]
    head = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}/ray"]
    try:
        subprocess.run([*common, *head], **quiet)
        subprocess.run([*common, f"--address=127.0.0.1:{port}"], **quiet)
        yield ["--launcher", "ray", "--launcher-option", f"address=127.0.0.1:{port}"], {}
    finally:
        subprocess.run([ray, "stop", "--force"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[tuple[list[str], dict[str, str]]]:
    """munged, slurmctld and slurmd of this machine; the options of sweep.py, and variables."""
    remedy = "apt-get install slurm-wlm munge"
    munged, controller, node = (need(name, remedy) for name in ("munged", "slurmctld", "slurmd"))
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    host = socket.gethostname().split(".")[0]
    conf = folder / "slurm.conf"
    conf.write_text(SLURM_CONF.format(host=host, folder=folder, ports=free_ports(2)))
    variables = {"SLURM_CONF": str(conf)}
    pids = [folder / f"{name}.pid" for name in ("slurmd", "slurmctld", "munged")]
    try:
        subprocess.run(
            [
                munged,
                "--force",
                f"--key-file={key}",
                f"--socket={folder}/munge.socket",
                f"--pid-file={pids[2]}",
                f"--log-file={folder}/munged.log",
                f"--seed-file={folder}/munged.seed",
            ],
            check=True,
        )
        subprocess.run([controller, "-f", str(conf)], check=True)
        subprocess.run([node, "-f", str(conf)], check=True)
        info = [need("sinfo", remedy), "-h", "-o", "%T"]

        def is_idle() -> bool:
            shown = subprocess.run(info, env=os.environ | variables, capture_output=True, text=True)
            return shown.stdout.strip() == "idle"

        wait_for("slurmd", is_idle)
        yield ["--launcher", "slurm", "--launcher-option", "timeout_min=60"], variables
    finally:
        for path in pids:
            if path.exists():
                os.kill(int(path.read_text()), signal.SIGTERM)


def holders(script: Path) -> list[int]:
    """The parents of the processes that run `script`: what a launcher has started on a node."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue  # no process, or one that has just ended
        if os.fsencode(script) in words:
            found.append(parent)
    return found


class Trial:
    """One small sweep of levers, by the same command through any launcher."""

    def __init__(self, folder: Path, launcher: list[str], variables: dict[str, str]):
        self.folder = folder
        self.variables = os.environ | SMALL | variables
        levers = folder / "levers.txt"
        levers.write_text(LEVERS)
        self.script = folder / "runs" / "trial" / "train_gpt.py"
        self.records = folder / "levers.jsonl"
        sweep = [sys.executable, str(ROOT / "sweep.py"), "--levers", str(levers), "SEED=1,2"]
        recipe = ["--recipe", str(ROOT / "records" / "recipes" / "mini.env")]
        places = ["--out", str(folder / "runs"), "--name", "trial", "--records", str(self.records)]
        self.command = [*sweep, *recipe, *places, *launcher]

    def start(self) -> subprocess.Popen:
        """The sweep, its output to this terminal."""
        return subprocess.Popen(self.command, env=self.variables, cwd=ROOT)

    def scores(self) -> dict[tuple[str, int], float]:
        """The score of every run that has its record."""
        if not self.records.exists():
            return {}
        found = map(json.loads, self.records.read_text().splitlines())
        return {(record["lever"], record["seed"]): record["val_bpb"] for record in found}

    def kill_a_worker(self, sweep: subprocess.Popen) -> None:
        """SIGKILL for what holds a training, once that makes steps."""

        def is_training() -> bool:
            if sweep.poll() is not None:
                raise SystemExit(
                    f"the sweep has ended with exit status {sweep.returncode}, nothing was killed"
                )
            shown = [path.read_text() for path in self.script.parent.glob("*/console.log")]
            return bool(holders(self.script)) and any("step:5/" in text for text in shown)

        wait_for("a training of the sweep", is_training)
        worker = holders(self.script)[0]
        print(f"--- kill -9 of the worker, process {worker}", flush=True)
        os.kill(worker, signal.SIGKILL)


def try_launcher(trial: Trial) -> tuple[int, int]:
    """The sweep with a kill, then again until it is done: runs recorded by the first, commands needed."""
    sweep = trial.start()
    trial.kill_a_worker(sweep)
    status = sweep.wait()
    first = len(trial.scores())
    commands = 1
    while status and commands < 4:
        print("--- the same command again", flush=True)
        status = trial.start().wait()
        commands += 1
    if status:
        raise SystemExit(f"the sweep does not end well: exit status {status} after {commands} commands")
    return first, commands


CLUSTERS = {"ray": ray_cluster, "slurm": slurm_cluster}


def main() -> None:
    """Print what the sweeps say, and the RESULT line; exit status 1 if a score differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("launcher", choices=CLUSTERS)
    options = parser.parse_args()
    if not (ROOT / "data" / "demo" / "manifest.json").exists():
        parser.error("data/demo: no dataset there; ./run.sh makes it")
    with tempfile.TemporaryDirectory(prefix="l") as name:
        places = {what: Path(name) / what for what in ("cluster", "far", "here")}
        for place in places.values():
            place.mkdir()
        with CLUSTERS[options.launcher](places["cluster"]) as (words, variables):
            trial = Trial(places["far"], words, variables)
            first, commands = try_launcher(trial)
        print("--- the same sweep by the local launcher", flush=True)
        local = Trial(places["here"], [], {})
        local.start().wait()
        scores = trial.scores()
        same = scores == local.scores() and bool(scores)
    figures = {
        "launcher": options.launcher,
        "runs": len(scores),
        "before_the_kill_was_mended": first,
        "commands": commands,
        "same": same,
    }
    print("RESULT " + json.dumps(figures))
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
