"""README's index of claims and docs/claims.md say what the result files say; what is no claim is refused."""

import json
import re
import sys
from pathlib import Path

import pytest

from infra.cli import UserError
from infra.runs import lock_file
from report import claims

ROOT = Path(__file__).parent.parent

CLAIM = dict(paper="2410.08146", claim="a | b", measured="0.9 (sd 0.1)", holds="partly",
             command="python x.py", fails_when="never")


def put(folder, *changes):
    path = folder / "docs/results/x/results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(claims=[CLAIM | change for change in changes or ({},)])))
    return folder / "docs/results"


def test_the_documents_are_up_to_date():
    """What `python -m report.claims --check` says in CI."""
    found = claims.read_claims(ROOT / "docs/results")
    readme = (ROOT / "README.md").read_text()
    assert len(found) > 20 and claims.rewrite(readme, claims.index(found)) == readme
    assert (ROOT / "docs/claims.md").read_text() == claims.paragraphs(found, ROOT / "docs/results")


def test_every_committed_claim_has_a_short_text():
    for path, claim in claims.read_claims(ROOT / "docs/results"):
        assert claim.get("short"), f"{path}: {claim['claim']}"


def test_the_index_is_one_line_a_claim_and_its_links_lead_somewhere(tmp_path):
    folder = put(tmp_path, {}, dict(short="less | more", holds=True), dict(paper="2312.15551", holds=False))
    found = claims.read_claims(folder)
    lines = claims.index(found).splitlines()
    assert lines[0].startswith("3 claims: 1 yes, 1 partly, 1 no.")
    rows = lines[4:]
    assert len(rows) == 3 and {row.replace("\\|", "").count("|") for row in rows} == {5}
    assert rows[0] == "| 1 | [PAV](docs/claims.md#c1) | a \\| b | partly |" and "less \\| more" in rows[1]
    assert "private transfer" in rows[2] and "**no**" in rows[2]
    page = claims.paragraphs(found, folder)
    anchors = re.findall(r'<a id="(\w+)">', page)
    assert anchors == ["c1", "c2", "c3"]
    assert re.findall(r"docs/claims\.md#(\w+)", claims.index(found)) == ["c1", "c3"]  # one a paper
    for text in ("0.9 (sd 0.1)", "never", "`python x.py`", "[x](results/x)", "arxiv.org/abs/2312.15551"):
        assert text in page


def test_the_index_stays_short(tmp_path):
    with pytest.raises(UserError, match="more than 12 words"):
        claims.read_claims(put(tmp_path, dict(claim="word " * 13)))
    many = [dict(short="word " * 11 + "x" * 60)] * 60
    with pytest.raises(UserError, match="shorten"):
        claims.index(claims.read_claims(put(tmp_path, *many)))


@pytest.mark.parametrize("change", [dict(paper="1"), dict(holds="perhaps")])
def test_what_is_no_claim_is_refused(tmp_path, change):
    with pytest.raises(UserError, match="results.json"):
        claims.read_claims(put(tmp_path, change))
    (tmp_path / "docs/results/x/results.json").write_text("{")
    with pytest.raises(UserError, match="results.json cannot be read"):
        claims.read_claims(tmp_path / "docs/results")


def test_check_fails_until_the_documents_are_written(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"a\n{claims.BEGIN}\nold\n{claims.END}\nb")
    argv = ["--results", str(put(tmp_path)), "--readme", str(readme), "--document", str(tmp_path / "c.md")]
    with pytest.raises(UserError, match="README.md does not say"):
        claims.main([*argv, "--check"])
    assert "old" in readme.read_text() and not (tmp_path / "c.md").exists()
    claims.main(argv)
    claims.main([*argv, "--check"])
    (tmp_path / "c.md").write_text("edited by hand")
    with pytest.raises(UserError, match="c.md does not say"):
        claims.main([*argv, "--check"])


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
