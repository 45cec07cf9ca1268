"""The trainer stays one readable file."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import train_gpt as t

SOURCE = Path(t.__file__).read_text()
SECTIONS = [
    "CONFIG",
    "ENVIRONMENT",
    "RUN",
    "DATA",
    "LOADERS",
    "KERNELS",
    "LOSS",
    "HEADS",
    "PROJECTION",
    "GATES",
    "RESIDUAL",
    "LANES",
    "TOPOLOGY",
    "ATTENTION",
    "ADAPTERS",
    "MODEL",
    "OPTIMIZERS",
    "QUANTIZE",
    "TUNING",
    "ARTIFACT",
    "EVALUATE",
    "ADAPTATION",
    "PAIRS",
    "CANONICAL",
    "SLOTS",
    "MIXTURE",
    "BUILD",
    "TRAIN",
    "PREFLIGHT",
    "STAGES",
    "MAIN",
]
SCREEN = 60  # lines


def test_the_file_is_readable_source():
    assert SOURCE.isascii()
    assert not SOURCE.encode().startswith(t.PACKED_HEAD)
    assert max(map(len, SOURCE.splitlines())) <= 110


def assigned(node: ast.stmt) -> set[str]:
    """The names that a statement of the module defines, also within `if`."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    names = [found for found in ast.walk(node) if isinstance(found, ast.Name)]
    return {name.id for name in names if isinstance(name.ctx, ast.Store)}


def test_settings_are_read_with_what_is_defined_above_them():
    """A name that comes later fails in the script alone: an import has run the whole file."""
    body = ast.parse(SOURCE).body
    start = next(place for place, node in enumerate(body) if "CONFIG" in assigned(node))
    later = {name for node in body[start + 1 :] for name in assigned(node)}
    definitions = {node.name: node for node in body[:start] if hasattr(node, "name")}
    reached: set[str] = set()
    left = ["command_line", "Config"]
    used = set()
    while left:
        name = left.pop()
        if name not in reached and name in definitions:
            reached.add(name)
            names = {node.id for node in ast.walk(definitions[name]) if isinstance(node, ast.Name)}
            given = {node.arg for node in ast.walk(definitions[name]) if isinstance(node, ast.arg)}
            used |= names - given - assigned(ast.Module(definitions[name].body, []))
            left += names
    assert {"packing_rules", "Check"} <= reached and "Muon" in later
    assert used & later == set()


def test_a_line_holds_one_statement():
    tokens = tokenize.generate_tokens(io.StringIO(SOURCE).readline)
    assert [token.start[0] for token in tokens if token.type == tokenize.OP and token.string == ";"] == []
    first_of_line = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.stmt):
            assert node.lineno not in first_of_line, f"line {node.lineno} starts two statements"
            first_of_line.add(node.lineno)


def test_a_function_fits_on_a_screen():
    functions = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.FunctionDef)]
    lengths = [(function.name, function.end_lineno - function.lineno + 1) for function in functions]
    assert len(lengths) > 150, "the functions were not found"
    assert [(name, length) for name, length in lengths if length > SCREEN] == []


# Longer functions of the tools: to be taken apart, none to be added.
STILL_LONG = {
    "chart",
    "probe_budgets",
    "probe_causality",
    "probe_data",
    "readme",
    "score_alone",
    "_decode_v3",
}


def test_the_functions_of_the_tools_fit_on_a_screen():
    root = Path(t.__file__).parent
    paths = [*root.glob("*.py"), *root.glob("data/*.py"), root / "bench/fuzz.py", root / "bench/kills.py"]
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    long = {node.name for node in functions if node.end_lineno - node.lineno + 1 > SCREEN}
    assert len(functions) > 400 and long == STILL_LONG


def test_the_sections_are_those_of_the_contents_in_order():
    assert re.findall(r"^# === (\w+) ===$", SOURCE, re.M) == SECTIONS
    assert (
        re.findall(r"^    ([A-Z]+)  +\w", ast.get_docstring(ast.parse(SOURCE), clean=False), re.M) == SECTIONS
    )


def test_public_functions_have_docstrings_and_annotations():
    tree = ast.parse(SOURCE)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for node in [*tree.body, *(inner for outer in classes for inner in outer.body)]:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        assert ast.get_docstring(node), node.name
        kernel = re.search("jit|numba_inline", "".join(map(ast.dump, node.decorator_list)))
        if isinstance(node, ast.FunctionDef) and not kernel:
            assert node.returns is not None, node.name
            assert all(a.annotation for a in node.args.args if a.arg not in ("self", "cls")), node.name


def test_settings_are_read_from_the_environment_in_one_place():
    config = SOURCE[SOURCE.index("# === CONFIG ===") : SOURCE.index("# === RUN ===")]
    allowed = {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "TRITON_INTERPRET",
        "RUN_FOLDER_FILE",
        "CUDA_VISIBLE_DEVICES",
    }  # of launchers, triton and CUDA
    rest = SOURCE.replace(config, "")
    assert set(re.findall(r'os\.environ\.get\("(\w+)"', rest)) <= allowed and "getenv" not in SOURCE


def test_the_forward_has_no_branch_on_a_layer_number():
    tree = ast.parse(SOURCE)
    (model,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "GPT")
    (trunk,) = (node for node in model.body if isinstance(node, ast.FunctionDef) and node.name == "trunk")
    for node in ast.walk(trunk):
        if isinstance(node, ast.If | ast.IfExp):
            assert "layer" not in {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}


def test_the_trainer_imports_nothing_else_from_the_repository():
    root, names = Path(t.__file__).parent, set()
    for node in ast.walk(ast.parse(SOURCE)):
        names |= {a.name.split(".")[0] for a in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module.split(".")[0]} if isinstance(node, ast.ImportFrom) and node.module else set()
    assert not names & {path.stem for path in root.iterdir()}
