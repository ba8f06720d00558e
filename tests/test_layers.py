"""The house: at most ten files on top, each short and narrow; imports run one way.

A room is a file on top or a folder. FLOORS lists the rooms from the ground up: a room imports from the floors below it and
from itself, never from its own floor or above. Imports inside functions count too: a circle that waits is a circle.
"""

import ast
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    {"infra"},
    {"kernels", "open_weights"},
    {"model", "tasks"},
    {"rollouts"},
    {"engines"},
    {"sample"},
    {"verifier"},
    {"report"},
    {"pav", "search", "train_sft"},
    {"pipeline"},
    {"train_rl"},
    {"papers"},
    {"experiments", "bench", "exercise"},
]
APART = {"robustness": {"infra", "report"}}  # the second chapter: flags, seeds and figures, nothing of language models
WORKING_FILES = {"tests", "runs", "docs", "build"}


def room_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def sources():
    paths = [p for p in ROOT.rglob("*.py") if not any(part.startswith(".") for part in p.relative_to(ROOT).parts)]
    return [p for p in paths if room_of(p) not in WORKING_FILES]


def imported(path):
    """[(line, dotted module)] of every import in the file, those inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


ROOMS = set().union(*FLOORS) | set(APART)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def arrows_up(paths):
    """Imports that do not go down: ["FILE:LINE imports MODULE"]."""
    bad = []
    for path in paths:
        room = room_of(path)
        for line, module in imported(path):
            target = module.split(".")[0]
            if target not in ROOMS or target == room:
                continue
            allowed = target in APART[room] if room in APART else FLOOR_OF.get(target, 99) < FLOOR_OF[room]
            if not allowed:
                bad.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    return bad


def test_every_file_has_a_room():
    assert {room_of(p) for p in sources()} <= ROOMS


def test_arrows_run_one_way():
    assert arrows_up(sources()) == []


def test_an_arrow_back_up_is_seen(tmp_path, monkeypatch):
    (tmp_path / "model.py").write_text("def f():\n    from train_rl import update\n    return update\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert arrows_up([tmp_path / "model.py"]) == ["model.py:2 imports train_rl.update"]


def modules():
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in sources()}


def circles(graph):
    """Modules that reach themselves. graph: {module: set of modules}."""
    reach = {m: set(to) for m, to in graph.items()}
    changed = True
    while changed:
        changed = False
        for m in reach:
            more = set().union(*(reach.get(n, set()) for n in reach[m])) - reach[m]
            reach[m] |= more
            changed |= bool(more)
    return sorted(m for m in reach if m in reach[m])


def test_there_is_no_circle_between_files():
    files = modules()
    graph = {}
    for name, path in files.items():
        targets = set()
        for _, module in imported(path):
            target = module if module in files else module.rpartition(".")[0]
            targets |= {target} & files.keys() - {name}
        graph[name] = targets
    assert circles(graph) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


TOP = sorted(ROOT.glob("*.py"))


def test_at_most_ten_files_stand_on_top():
    assert 5 <= len(TOP) <= 10, [p.name for p in TOP]


def count_tokens(path):
    """Tokens of code: no comments, no line ends; a docstring is one."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    with open(path) as file:
        return sum(token.type not in layout for token in tokenize.generate_tokens(file.readline))


@pytest.mark.parametrize("path", TOP, ids=lambda p: p.name)
def test_a_top_file_fits_into_a_head(path):
    assert count_tokens(path) <= 3500
    assert max(map(len, path.read_text().splitlines())) <= 100


# What is shared or reads the data may be longer; a paper's file, or one beside it, is read in one go.
PAPERS = [p for p in sorted((ROOT / "robustness").glob("*.py")) if p.stem not in ("common", "data")]


@pytest.mark.parametrize("path", PAPERS, ids=lambda p: p.name)
def test_a_file_of_an_earlier_paper_fits_into_a_head(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 250
    assert max(map(len, lines), default=0) <= 100


def test_what_the_earlier_papers_share_stays_readable():
    lines = (ROOT / "robustness" / "common.py").read_text().splitlines()
    assert len(PAPERS) >= 8 and len(lines) <= 350 and max(map(len, lines)) <= 100


# Loops are meant to be seen whole: of training, of decoding, of a search.
LOOPS = {"train", "main", "fit", "update", "decode_all", "beam", "table_rl", "reinforce"}


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_function_is_longer_than_a_screen(path):
    long = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name not in LOOPS and not node.name.endswith("_kernel"):
            lines = node.end_lineno - node.lineno + 1
            long += [f"{node.name}: {lines} lines"] if lines > 60 else []
    assert long == []


@pytest.mark.parametrize("path", TOP, ids=lambda p: p.name)
def test_top_files_have_one_statement_a_line(path):
    tree = ast.parse(path.read_text())
    lambdas = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Assign) and isinstance(n.value, ast.Lambda)]
    assert lambdas == []


def test_the_rl_script_has_at_most_forty_flags():
    import dataclasses

    import train_rl

    assert len(dataclasses.fields(train_rl.Config)) <= 40
