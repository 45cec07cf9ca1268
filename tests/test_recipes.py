"""The recipes of the four published systems: settings, sizes, routes, and their scripts' variables."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest

import recipes
import sweep
import train_gpt as t
from bench import gpu
from helpers import ROOT
from helpers.damage import mutants
from helpers.processes import run_python
from helpers.trainer import environment
from recipes import read as read_recipe

SYSTEMS = ["pr1585", "pr1738", "pr1755", "pr1693"]
# The environment of the published commands, without paths.
COMMANDS = {
    "pr1585": "SEED=42 TTT_ENABLED=1 HASH_EMBED_ENABLED=1 TTT_LR=0.005 MUON_MOMENTUM=0.97 "
    "PARALLEL_RESIDUAL_START=8 GPTQ_RESERVE_SECONDS=13 EMA_DECAY=0.997 WARMDOWN_FRAC=0.72",
    "pr1738": "SEED=1337 PREQUANT_TTT_ENABLED=1 PREQUANT_TTT_EPOCHS=21 TTT_EMA_ENABLED=0",
    "pr1755": "SEED=314 TTT_ENABLED=1",
    "pr1693": "SEED=0 ATTN_OUT_GATE=1 SMEAR_GATE=1 PHASED_TTT_ENABLED=1 PHASED_TTT_NUM_PHASES=3 "
    "PHASED_TTT_PREFIX_DOCS=2000",
}


def recipe(name: str) -> dict[str, str]:
    """The variables of a recipe file."""
    return read_recipe(ROOT / f"records/recipes/{name}.env")


def published(name: str) -> dict[str, str]:
    """The effective settings of the logged run of a system, by the names its script declares."""
    head, *rows = (
        line.split("\t") for line in (ROOT / "tests/published_settings.tsv").read_text().splitlines()[1:]
    )
    column = head.index(name)
    return {row[0]: row[column].strip("'") for row in rows if row[column] != "-"}


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_recipe_has_the_settings_of_the_logged_run(name):
    """Every variable of the published script at its logged value, on top of the recipe, changes nothing."""
    settings = published(name)
    config = t.Config.from_env(recipe(name))
    live = {n: v for n, v in settings.items() if n not in t.REFUSED}
    assert len(live) > 60 and {"MATRIX_LR", "EMA_DECAY", "TTT_ENABLED", "GPTQ_RESERVE_SECONDS"} <= live.keys()
    assert t.Config.from_env(recipe(name) | live) == config
    for n in settings.keys() & t.REFUSED.keys():
        with pytest.raises(t.Stop, match=rf"{n}=.*unset {n}$"):
            t.Config.from_env({n: settings[n]})


@pytest.mark.parametrize("name", SYSTEMS)
def test_print_config_shows_the_settings_of_the_logged_run(name):
    done = run_python([ROOT / "train_gpt.py", "--print-config"], environment(recipe(name)))
    assert done.returncode == 0, done.stderr
    shown = dict(line.split("=", 1) for line in done.stdout.splitlines())
    for n, value in published(name).items():
        target, meanings = t.ALIASES.get(n, (n, {}))
        for canonical in target.split():
            if canonical in shown:
                value = meanings.get(value, value)
                same = shown[canonical] == value or float(shown[canonical]) == float(value)
                assert same, f"{n}: {shown[canonical]} here, {value} published"
    assert t.Config.from_env(shown) == t.Config.from_env(recipe(name)), "what it prints can be set again"


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_published_command_is_accepted_and_means_the_recipe(name):
    command = dict(pair.split("=") for pair in COMMANDS[name].split())
    ours = t.Config.from_env(recipe(name) | command)
    assert ours == t.Config.from_env(recipe(name) | {"SEED": command["SEED"]})
    assert t.Config.from_env(command).seed == ours.seed


@pytest.mark.parametrize(
    "name, parameters, looped",
    [
        ("pr1585", 35_944_602, "0 1 2 3 4 5 3 4 | 5 3 4 5 6 7 8= 9= 10="),
        ("pr1738", 35_944_536, "0 1 2 3 4 5 3 4 | 5 3 4 5 6 7+ 8+ 9+ 10+"),
        ("pr1755", 35_944_536, "0 1 2 3 4 5 3 4 | 5 3 4 5 6 7+ 8+ 9+ 10+"),
        ("pr1693", 35_945_671, "0 1 2 3 4 5 3 4 | 5 3 4 5 6 7 8= 9= 10="),
    ],
)
def test_sizes_and_routes(name, parameters, looped):
    config = t.Config.from_env(recipe(name))
    table = t.parameter_table(config)
    assert sum(math.prod(spec.shape) for spec in table.values()) == parameters
    assert (
        t.show_route(t.make_route(config, config.num_loops)) == looped and len(t.list_matrices(table)) == 67
    )
    hashed = sum(math.prod(s.shape) for s in table.values()) + config.hash_embed_size * config.model_dim
    assert name != "pr1585" or hashed == 44_333_210  # trained by its test-time training


def test_variables_with_one_value_and_aliases():
    with pytest.raises(t.Stop, match="PHASED_TTT_ENABLED=0: every published run has 1"):
        t.Config.from_env({"PHASED_TTT_ENABLED": "0"})
    with pytest.raises(t.Stop, match="EMBEDDING_DIM=256: every published run has 512"):
        t.Config.from_env({"EMBEDDING_DIM": "256"})
    assert (
        t.Config.from_env({"EMBEDDING_DIM": "256", "MODEL_DIM": "256", "VAL_DOC_FRACTION": "1.0"}).model_dim
        == 256
    )
    clips = t.Config.from_env({"MATRIX_CLIP_SIGMAS": "12"})
    assert (clips.attn_clip_sigmas, clips.mlp_clip_sigmas) == (12.0, 12.0)
    with pytest.raises(t.Stop, match="sets PARALLEL_START_LAYER to another value"):
        t.Config.from_env({"PARALLEL_START_LAYER": "7", "PARALLEL_RESIDUAL_START": "8"})
    assert t.Config.from_env({"PARALLEL_RESIDUAL": "0"}).parallel_residual == "none"
    for name in [*t.ALIASES, *t.FIXED]:
        if name != "PARALLEL_RESIDUAL":
            assert name.lower() not in {f.name for f in t.dataclasses.fields(t.Config)}


# === THE READER ===

FORMS = [
    ("A=1", {"A": "1"}),
    ("A=1\nB=2", {"A": "1", "B": "2"}),
    ("export A=1\n  B=2\t\n\texport\tC=3\n", {"A": "1", "B": "2", "C": "3"}),
    ("A=\nB=''\nC=\"\"\n", {"A": "", "B": "", "C": ""}),
    ("A='x $y \\ \"z\" #'\nB=\"x 'y' #\"\n", {"A": 'x $y \\ "z" #', "B": "x 'y' #"}),
    ("# x=1\n\n   # y\nA=1 # one\nB=a#b\n", {"A": "1", "B": "a#b"}),
    ("A=a=b:c,d/e.f-g+h@i%j\nB=\u00fcber/\u00e9\n", {"A": "a=b:c,d/e.f-g+h@i%j", "B": "\u00fcber/\u00e9"}),
]


@pytest.mark.parametrize("text, settings", FORMS)
def test_a_recipe_means_what_a_shell_makes_of_it(tmp_path, text, settings):
    path = tmp_path / "r.env"
    path.write_text(text, encoding="utf-8")
    assert recipes.read(path) == settings
    show = " ".join(f'"${{{name}}}"' for name in settings)
    for command in (f"set -a; . {path}", f'eval "$({sys.executable} {ROOT}/recipes.py {path})"'):
        done = subprocess.run(
            ["sh", "-c", f"{command}; printf '%s\\n' {show}"],
            env={"PATH": os.environ["PATH"]},
            capture_output=True,
            encoding="utf-8",
            check=True,
        )
        assert done.stdout == "".join(value + "\n" for value in settings.values())


def test_carriage_returns_and_a_mark_of_byte_order_are_taken(tmp_path):
    (tmp_path / "r.env").write_bytes(b"\xef\xbb\xbfA=1\r\n# x\r\n\r\nB='2 3'\r\nC=4")
    assert recipes.read(tmp_path / "r.env") == {"A": "1", "B": "2 3", "C": "4"}


@pytest.mark.parametrize(
    "line",
    [
        *(
            "SEED",
            "SEED 1",
            "SEED =1",
            "SEED= 1",
            "seed=1",
            "1A=1",
            "=1",
            "export",
            "export SEED",
            "set SEED=1",
        ),
        *(
            "SEED=1 2",
            "SEED='1",
            'SEED="1',
            "SEED='1'2",
            "SEED=$HOME",
            'SEED="$HOME"',
            "SEED=`id`",
            "SEED=~/x",
        ),
        *("SEED=1; rm x", "SEED=a\\ b", "SEED=1&", "SEED=#1", "SEED=(1)", "SEED=1\r2", "# x\rSEED=1"),
        *("SEED=1\u00a0", "SEED=1\x00", "\x0cSEED=1", "SEED-X=1", "export -n SEED=1"),
    ],
)
def test_every_other_line_is_named(tmp_path, line):
    path = tmp_path / "r.env"
    path.write_bytes(f"# a recipe\nMATRIX_LR=0.02\n{line}\nEMBED_WD=0.1\n".encode())
    with pytest.raises(recipes.RecipeError) as error:
        recipes.read(path)
    assert str(error.value).startswith(f"{path}:3: {line!a} is not NAME=value; ")
    assert "\n" not in str(error.value)


def test_a_name_twice_other_encodings_and_no_file_are_named(tmp_path):
    path = tmp_path / "r.env"
    path.write_text("SEED=1\n\nSEED=2\n")
    with pytest.raises(recipes.RecipeError, match=r"r\.env:3: SEED is set in line 1 already; drop one$"):
        recipes.read(path)
    path.write_bytes(b"SEED=1\nA=\xff\n")
    with pytest.raises(recipes.RecipeError, match=r"r\.env:2: not UTF-8 text"):
        recipes.read(path)
    with pytest.raises(
        recipes.RecipeError, match=r"nothing\.env: cannot be read \(No such file.*pr1585\.env"
    ):
        recipes.read(tmp_path / "nothing.env")


def test_every_tool_reads_a_recipe_alike(tmp_path, monkeypatch):
    (tmp_path / "records" / "recipes").mkdir(parents=True)
    path = tmp_path / "records" / "recipes" / "r.env"
    path.write_text("export SEED='5' # five\r\nMATRIX_LR=0.02")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert gpu.recipes()["r"] == recipes.read(path) == {"SEED": "5", "MATRIX_LR": "0.02"}
    options = sweep.parse_arguments(["--recipe", str(path), "SEED=1"])
    assert sweep.below(options) == recipes.read(path)


def test_damaged_recipes_are_read_as_a_shell_does_or_refused_in_one_line(tmp_path):
    path = tmp_path / "r.env"
    data = (ROOT / "records" / "recipes" / "pr1693.env").read_bytes() + b"export A='x y'\nB=\"z\" # c\n"
    read = 0
    for number, changed in enumerate(mutants(data, 60, 1)):
        path.write_bytes(changed)
        try:
            settings = recipes.read(path)
        except recipes.RecipeError as error:
            assert "\n" not in str(error)
            continue
        read += 1
        path.write_bytes(changed.replace(b"\r\n", b"\n"))
        print_all = (
            f"set -a; . {path}; {sys.executable} -c 'import json, os; print(json.dumps(dict(os.environ)))'"
        )
        if number % 4 == 0:  # a shell and a Python for each take a while
            shell = subprocess.run(["sh", "-c", print_all], env={}, capture_output=True, check=True)
            assert settings.items() <= json.loads(shell.stdout).items()
    assert read > 10
