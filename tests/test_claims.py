"""README's table of claims says what the result files say, and refuses what is no claim."""

import json
import sys
from pathlib import Path

import pytest

from experiments import claims
from infra.cli import UserError
from infra.runs import lock_file

ROOT = Path(__file__).parent.parent

CLAIM = dict(paper="2410.08146", claim="a | b", measured="0.9 (sd 0.1)", holds="partly", command="python x.py",
             fails_when="never")


def put(folder, **change):
    path = folder / "docs/results/x/results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(claims=[CLAIM | change])))
    return folder / "docs/results"


def test_readme_is_up_to_date():
    readme = (ROOT / "README.md").read_text()
    found = claims.read_claims(ROOT / "docs/results")
    assert found and claims.rewrite(readme, claims.table(found, ROOT / "docs/results")) == readme


def test_a_row_holds_every_field_and_cannot_break_the_table(tmp_path):
    folder = put(tmp_path)
    row = claims.table(claims.read_claims(folder), folder).splitlines()[2]
    assert row.replace("\\|", "").count("|") == 7
    for text in ("a \\| b", "0.9 (sd 0.1)", "partly", "`python x.py`", "docs/results/x"):
        assert text in row


@pytest.mark.parametrize("change", [dict(paper="1"), dict(holds="perhaps")])
def test_what_is_no_claim_is_refused(tmp_path, change):
    with pytest.raises(UserError, match="results.json"):
        claims.read_claims(put(tmp_path, **change))


def test_marks_are_needed_once():
    assert claims.rewrite(f"a{claims.BEGIN}old{claims.END}b", "new") == f"a{claims.BEGIN}\nnew\n{claims.END}b"
    with pytest.raises(UserError, match="needs one line"):
        claims.rewrite("nothing", "new")


def test_a_run_is_locked_also_without_fcntl(tmp_path, monkeypatch):
    """Windows has msvcrt instead."""
    calls = []

    class Msvcrt:
        LK_NBLCK = 2

        @staticmethod
        def locking(fileno, mode, n):
            calls.append((mode, n))
            if len(calls) > 1:
                raise PermissionError

    monkeypatch.setitem(sys.modules, "fcntl", None)  # an import of it now raises ImportError
    monkeypatch.setitem(sys.modules, "msvcrt", Msvcrt)
    with open(tmp_path / "lock", "w") as f:
        assert lock_file(f) and not lock_file(f)
    assert calls == [(2, 1)] * 2
