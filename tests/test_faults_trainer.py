"""Faults that users of this field have met: refused in the first seconds, or a run that can be saved."""

from __future__ import annotations

import ast
import json
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

import train_gpt as t
from data.shards import BOS, train_tokenizer, write_shard
from helpers.processes import run_python
from helpers.run_folders import original
from helpers.trainer import RANK, TRAINER, VALIDATION, environment, launch, replace, sentences

SMALL = {"ITERATIONS": "3", "SLIDING_WINDOW_ENABLED": "0", "TTT_ENABLED": "0", "RUN_ID": "one"}


@pytest.fixture
def folder(dataset: Path, tmp_path: Path) -> Path:
    """A copy of the dataset, to be harmed."""
    return Path(shutil.copytree(dataset, tmp_path / "data"))


def cut(path: Path, count: int = 1000) -> None:
    """Take the last `count` bytes from a file."""
    path.write_bytes(path.read_bytes()[:-count])


# === WHAT CAN BE REFUSED IN THE FIRST SECONDS ===


def short_sidecar(folder: Path) -> None:
    """A sidecar with one value too few."""
    count = len(t.read_shard(folder / "fineweb_val_000000.bin"))
    write_shard(folder / "fineweb_val_bytes_000000.bin", np.full(count - 1, 3, dtype="<u2"))


def write_manifest(**content: object) -> Callable[[Path], object]:
    """What writes a manifest."""
    return lambda folder: (folder / "manifest.json").write_text(json.dumps(content))


def only_bos(folder: Path) -> None:
    """A validation set of one BOS."""
    write_shard(folder / "fineweb_val_000000.bin", np.array([BOS], dtype="<u2"))


def copied(kind: str) -> Callable[[Path], object]:
    """What leaves the copy of a shard beside it, as a file manager names it."""
    return lambda folder: shutil.copy(
        folder / f"fineweb_{kind}_000000.bin", folder / f"fineweb_{kind}_000000 (1).bin"
    )


HARM = {
    "a copy of a training shard": (copied("train"), "fineweb_train_ and six digits"),
    "a copy of a validation shard": (copied("val"), "fineweb_val_ and six digits"),
    "a validation shard cut off": (lambda folder: cut(folder / "fineweb_val_000000.bin"), "truncated"),
    "a short sidecar": (short_sidecar, "byte sidecar has"),
    "BOS alone": (only_bos, "one token"),
    "prepare was stopped": (lambda folder: (folder / "prepare.journal.json").touch(), "not finished"),
    "the download was stopped": (lambda folder: (folder / "download.unfinished").touch(), "not finished"),
    "a validation shard lost": (write_manifest(val_tokens=10**6), "manifest says 1000000"),
    "a sidecar lost": (write_manifest(val_sidecar=True), "promises"),
    "pieces count too much": (write_manifest(val_bytes=99, val_lut_bytes=100), "100 bytes where .* has 99"),
    "a count that is none": (write_manifest(val_bytes="many"), "val_bytes is many"),
    "a broken table of scores": (write_manifest(references={"a": None}), "reference a"),
}


@pytest.mark.parametrize("kind", HARM)
def test_a_dataset_is_refused_before_training(config, folder, kind):
    changed = replace(config, datasets_dir=str(folder))
    t.Dataset(changed)
    harm, words = HARM[kind]
    harm(folder)
    with pytest.raises(t.Stop, match=words) as stop:
        t.Dataset(changed)
    assert "\n" not in str(stop.value)


def run_program(program: str, settings: dict[str, str]) -> subprocess.CompletedProcess:
    """A Python program that changes the trainer before it starts it, with the small settings."""
    return run_python(["-c", program], environment(settings | SMALL))


def test_a_finished_dataset_may_have_kept_its_marks(config, folder):
    (folder / "prepare.journal.json").touch()
    write_manifest(docs_val=30)(folder)
    assert t.Dataset(replace(config, datasets_dir=str(folder))).manifest == {"docs_val": 30}


def test_only_documents_without_text_are_no_score(config, folder):
    write_shard(folder / "fineweb_val_000000.bin", np.full(9, BOS, dtype="<u2"))
    with pytest.raises(t.Stop, match="9 validation tokens of no bytes"):
        t.load_validation(t.Dataset(replace(config, datasets_dir=str(folder))))


def test_training_is_not_of_other_data_because_a_validation_file_is(config, folder):
    def identities() -> tuple[str, str]:
        data = t.Dataset(replace(config, datasets_dir=str(folder)))
        return data.training_digest, data.fingerprint["shards"]

    training, everything = identities()
    few = np.array([BOS, 5, 6], dtype="<u2")
    write_shard(folder / "fineweb_val_000000.bin", few)
    assert identities()[0] == training
    assert identities()[1] != everything
    write_shard(folder / "fineweb_train_000000.bin", few)
    assert identities()[0] != training


# === BYTES ===


def rename_space(folder: Path) -> int:
    """Give the tokenizer of `folder` byte pieces and no lone U+2581; returns its entries."""
    from sentencepiece import sentencepiece_model_pb2

    path = folder / "tokenizer.model"
    train_tokenizer(sentences(2000, 0), folder / "tokenizer", 600)
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    for piece in model.pieces:
        if piece.piece == t.WORD_START:
            piece.piece = "\u2603\u2603"
    path.write_bytes(model.SerializeToString())
    return len(model.pieces)


def test_byte_pieces_without_a_lone_space_need_a_sidecar(config, folder):
    changed = replace(config, datasets_dir=str(folder), vocab_size=rename_space(folder))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert any(pieces.is_byte(i) for i in range(changed.vocab_size))
    with pytest.raises(t.Stop, match=r"no piece for a lone space \(U\+2581\)"):
        t.Dataset(changed)
    count = len(t.read_shard(folder / "fineweb_val_000000.bin"))
    write_shard(folder / "fineweb_val_bytes_000000.bin", np.full(count, 3, dtype="<u2"))
    assert t.load_validation(t.Dataset(changed)).bytes.sum() == 3 * count


def test_the_total_is_that_of_the_manifest(config, folder):
    changed = replace(config, datasets_dir=str(folder))
    true = int(t.load_validation(t.Dataset(changed)).bytes.sum())
    assert true == sum(len(text.encode()) for text in VALIDATION)
    for name in ("val_bytes", "val_lut_bytes"):
        write_manifest(**{name: true})(folder)
        t.load_validation(t.Dataset(changed))
        write_manifest(**{name: true + 1})(folder)
        with pytest.raises(t.Stop, match=f"{name} is {true + 1}, the lut counts {true};"):
            t.load_validation(t.Dataset(changed))


# === A RUN CAN ALWAYS BE SAVED ===


def saved_command(message: str) -> str:
    """The command that a stopped run prints last."""
    found = re.fullmatch(r"saved: training is in (.+?); go on with: (.+)", message.strip().splitlines()[-1])
    assert found, message
    return found.group(2)


def go_on(message: str) -> str:
    """Do what a shell makes of the command that `message` ends with; its output."""
    words = shlex.split(saved_command(message))
    assignments = [word for word in words if re.match("[A-Z_]+=", word)]
    variables = dict(word.split("=", 1) for word in assignments)
    program, *arguments = words[len(assignments) :]
    assert Path(program).resolve() == Path(sys.executable).resolve()
    assert [Path(word).resolve() for word in arguments] == [TRAINER]
    result = run_python(["-c", RANK], environment(variables), folder=Path.cwd())
    assert result.returncode == 0, result.stdout + result.stderr
    assert "\nfinal val_loss:" in result.stdout and "step:" not in result.stdout
    return result.stdout


def crash(*given: object) -> None:
    """Stands for a bug."""
    raise RuntimeError("out of luck")


@pytest.mark.parametrize(
    ("where", "stage"), [("pack_run", "all"), ("measure", "evaluate"), ("summarize", "evaluate")]
)
def test_a_crash_after_training_costs_no_training(settings, tmp_path, monkeypatch, capsys, where, stage):
    given = settings | SMALL | {"OUT_DIR": str(tmp_path / "it's runs"), "DATA_DIR": "a b"}
    with monkeypatch.context() as patch:
        patch.setattr(t, where, crash)
        done = launch(given)
    assert done.returncode == 1 and done.stderr.startswith("saved: ")
    assert "RuntimeError: out of luck" in capsys.readouterr().err
    assert saved_command(done.stderr).startswith(f"RUN_ID=one STAGE={stage} ")
    go_on(done.stderr)
    summary = json.loads((tmp_path / "it's runs" / "one" / "summary.json").read_text())
    assert summary["steps"] == 3 and summary["compliance"]["legal"]


def test_a_run_that_has_its_summary_has_all_of_its_log(dataset, config, tmp_path, monkeypatch):
    """A kill between the two would leave a finished run whose log lacks the score."""
    folder = Path(shutil.copytree(original(dataset), tmp_path / "a"))
    log = folder / "train.log"
    log.write_text("")
    seen = []
    monkeypatch.setattr(
        t, "write_atomically", lambda path, content: seen.append((path.name, log.read_text()))
    )
    run = t.Run(replace(config, ttt_enabled=False))
    run.folder = run.open(folder)
    t.summarize(run, t.Dataset(config))
    run.close()
    ((name, said),) = seen
    assert name == "summary.json"
    assert re.fullmatch(r"final val_loss:.*", said.splitlines()[-1])


def test_a_shard_that_is_damaged_while_training_is_mended_without_training_again(
    settings, folder, monkeypatch
):
    given = settings | SMALL | {"DATASETS_DIR": str(folder)}
    path = folder / "fineweb_val_000000.bin"
    whole = path.read_bytes()
    load = t.load_validation

    def damaged(data: t.Dataset) -> t.Validation:
        cut(path)
        return load(data)

    with monkeypatch.context() as patch:
        patch.setattr(t, "load_validation", damaged)
        done = launch(given)
    error, saved = done.stderr.splitlines()
    assert str(path) in error and "truncated" in error
    path.write_bytes(whole)
    go_on(saved)


def test_a_full_disk_stops_with_one_line_and_costs_no_training(settings, tmp_path):
    """The limit on a file's size lets no byte more into the log, in the middle of evaluation."""
    program = (
        "import os, resource, train_gpt as t\n"
        "real = t.load_validation\n"
        "def full(data):\n"
        "    size = os.path.getsize(os.environ['OUT_DIR'] + '/one/metrics.jsonl')\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 9, resource.RLIM_INFINITY))\n"
        "    return real(data)\n"
        "t.load_validation = full\n"
        "t.main(t.Config.from_env(os.environ))\n"
    )
    done = run_program(program, settings)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    error, saved = done.stderr.strip().splitlines()
    assert "cannot be written" in error and "free disk space" in error
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    go_on(saved)


def test_a_line_that_a_full_disk_has_cut_is_ended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for content, expected in ((b"", b"x\n"), (b"a\n", b"a\nx\n"), (b"a\nb", b"a\nb\nx\n")):
        path.write_bytes(content)
        with t.open_lines(path) as file:
            t.write_line(file, "x")
        assert path.read_bytes() == expected


def test_a_file_that_could_not_be_written_leaves_no_part(tmp_path):
    def fill(file) -> None:
        file.write(b"much")
        raise OSError(28, "No space left on device")

    with pytest.raises(t.Stop, match=r"a.bin: cannot be written .*No space left"):
        t.write_atomically(tmp_path / "a.bin", fill)
    assert list(tmp_path.iterdir()) == []


def test_standard_output_that_is_full_is_one_line(settings):
    program = (
        "import os, train_gpt as t\n"
        "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)\n"
        "t.Run(t.Config.from_env(os.environ)).log('x')\n"
    )
    done = run_program(program, settings)
    assert done.returncode == 1
    assert re.fullmatch(r"standard output: cannot be written .*\n", done.stderr)


def test_the_saved_command_starts_as_many_processes(config, tmp_path):
    run = t.Run(replace(config, run_id="other", stage="train"))
    run.folder = tmp_path / "one"
    run.complete = "train"
    run.world_size = 4
    words = t.describe_saved(run).split("go on with: ")[1]
    assert words.startswith("RUN_ID=one STAGE=train ") and "RUN_ID=other" not in words
    assert " -m torch.distributed.run --standalone --nproc_per_node=" in words


def test_a_terminated_run_says_how_to_go_on(settings, tmp_path):
    program = (
        "import os, signal, train_gpt as t\n"
        "real = t.pack_run\n"
        "t.pack_run = lambda *given: os.kill(os.getpid(), signal.SIGTERM) or real(*given)\n"
        "t.main(t.Config.from_env(os.environ))\n"
    )
    done = run_program(program, settings)
    assert done.returncode == -signal.SIGTERM
    go_on(done.stderr)


def test_what_stops_a_run_while_it_trains_is_not_called_saved(settings, monkeypatch):
    monkeypatch.setattr(t.Training, "take_step", crash)
    with pytest.raises(RuntimeError, match="out of luck"):
        launch(settings | SMALL)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_changed_validation_set_is_scored_without_training_again(settings, folder, monkeypatch):
    given = settings | SMALL | {"DATASETS_DIR": str(folder)}
    del given["RUN_ID"]
    with monkeypatch.context() as patch:
        patch.setattr(t, "measure", crash)
        assert launch(given).returncode == 1
    path = folder / "fineweb_val_000000.bin"
    write_shard(path, np.array(t.read_shard(path)[:500]))
    done = launch(given)
    assert done.returncode == 0, done.stderr
    assert "step:" not in done.stdout and "val_tokens:499" in done.stdout


# === THE PACKED SCRIPT ===


def test_no_f_string_holds_a_string():
    """Python 3.12 could write it with the quotes of the f-string, which 3.10 and 3.11 refuse."""
    source = Path(t.__file__).read_text()
    assert t.quoted_expressions(source) == []
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FormattedValue)]
    assert len(found) > 300


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("f\"{x['a']}\"", [1]),
        ("y = 1\nf\"{x if y else 'b'}\"", [2]),
        ("f\"{f'{x}'}\"", [1]),
        ("f'{x[1]:>{y}}'", []),
        ("'a' + f'{x}'", []),
    ],
)
def test_f_strings_with_strings_inside_are_found_and_not_minified(source, lines):
    assert t.quoted_expressions(source) == lines
    text, how = t.minify(source)
    assert ("not minified" in how) == bool(lines)
    assert (text == source) == bool(lines)


def test_making_the_short_form_leaves_nothing_on_the_nodes_that_all_syntax_trees_share():
    """Triton copies the target of a += with all that hangs on it."""
    assert t.minify("x = 1\nx += len('ab') if not x else -x\n")[1] == "minified"
    for node in ast.walk(ast.parse("x = 1\nx += len('ab') if not x else -x\n")):
        assert set(vars(node)) <= {*node._fields, *node._attributes}, ast.dump(node)


def test_a_minifier_that_fails_is_told(monkeypatch):
    monkeypatch.setattr(t, "MINIFY", "raise SystemExit('no such thing')")
    assert t.minify("x = 1\n") == ("x = 1\n", "not minified (python-minifier: no such thing)")


def test_syntax_that_python_3_10_lacks_is_refused():
    with pytest.raises(t.Stop, match="has to run on Python 3.10"):
        t.minify("try:\n    pass\nexcept* ValueError:\n    pass\n")


def test_the_short_form_is_one_of_python_3_10():
    text, how = t.minify(Path(t.__file__).read_text())
    assert how == "minified"
    ast.parse(text, feature_version=t.LEAST_PYTHON)
    assert t.quoted_expressions(text) == []
