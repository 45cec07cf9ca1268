"""What the tools read of one run folder, all of it: for the tests with damaged files, and bench/fuzz.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import compliance
import report
import results
import submit
import track


class Silent:
    """A tracker that keeps nothing but demands numbers."""

    def __init__(self, folder, config):
        pass

    def log(self, values, step):
        assert all(results.is_number(value) for value in values.values()) and results.is_count(step)

    def finish(self):
        pass


@contextlib.contextmanager
def text_alone() -> Iterator[None]:
    """Reports without what takes long and depends on artifact and trainer alone; a tracker `silent`."""
    with (
        mock.patch.dict(track.TRACKERS, {"silent": Silent}),
        mock.patch.object(report, "artifact_parts", lambda path: []),
        mock.patch.object(report, "settings_table", lambda overrides: ""),
    ):
        yield


def read_all(folder: Path) -> None:
    """Everything that the tools read of one run, apart from its artifact; inside text_alone."""
    run = results.Run.read(folder)
    report.run_report(run)
    submit.check_run(run)
    submit.check_same([run])
    submit.description(run)
    submit.credits_of(run)
    submit.command_of(run, [1])
    submit.compare([run, run], (3.0, 0.1, 3))
    results.lookup(run.summary, "val_bpb")
    compliance.probe_ledger(compliance.Report(folder), run)
    (folder / ".silent.json").unlink(missing_ok=True)
    track.track(folder, "silent", 0.0)
