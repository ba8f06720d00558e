"""The papers' claims as documents: README's index, and docs/claims.md with a paragraph each.

    python -m report.claims            # writes both from the result files
    python -m report.claims --check    # exit code 2 if they do not say what the files say (a test)

Every docs/results/**/*.json may hold a list "claims" of objects with
    paper       arXiv number
    claim       the paper's statement, one sentence, with its number
    short       the same in at most 12 words, for the index
    measured    ours, one sentence, with spread and seeds
    holds       true, false, "partly", "open" (not shown either way) or "not tested": by a rule in
                the script that measured it, not by taste
    command     what makes the file again
    fails_when  the regime where the claim does not hold, one sentence ("" if none was found)
Nothing is typed in here: a number that is not in a file cannot be in a document.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from infra.cli import UserError, opt, parse, script
from infra.runs import read_json

ROOT = Path(__file__).parent.parent
BEGIN = "<!-- claims: written by python -m report.claims -->"
END = "<!-- end of claims -->"
PAPERS = {
    "2410.08146": "PAV",
    "2406.14532": "incorrect data",
    "2411.07681": "learning dynamics",
    "2503.07572": "MRT",
    "2502.12118": "verifier-based or not",
    # The second chapter: robustness and private learning.
    "2302.02931": "BR-DRO",
    "2306.11120": "CosMoS",
    "2302.05441": "Pro^2",
    "2307.10026": "ENP",
    "2310.00873": "OCS",
    "2312.03151": "MTL worst group",
    "2312.03318": "STOC",
    "2312.15551": "private transfer",
}
FIELDS = ("paper", "claim", "measured", "holds", "command", "fails_when")
VERDICT = {
    True: "yes",
    "partly": "partly",
    False: "**no**",
    "open": "open",
    "not tested": "not tested",
}
WORDS = 12  # of a claim's line in the index
INDEX_BYTES = 5100  # of the whole index: README stays short


@dataclass
class Config:
    check: bool = opt(False, "change nothing; fail if a document and the files disagree")
    results: str = opt(str(ROOT / "docs/results"), "where the result files are")
    readme: str = opt(str(ROOT / "README.md"), "the file with the marks, for the index")
    document: str = opt(str(ROOT / "docs/claims.md"), "the file of the paragraphs")


def read_claims(folder):
    """All claims below folder, by paper, then file: [(path, claim)]. UserError: a file that is
    damaged, or a claim without one of FIELDS, of an unknown paper or verdict, or too long for the
    index."""
    found = []
    for path in sorted(Path(folder).rglob("*.json")):
        content = read_json(path)
        for claim in content.get("claims", []) if isinstance(content, dict) else []:
            missing = [field for field in FIELDS if field not in claim]
            if missing or claim["paper"] not in PAPERS or claim["holds"] not in VERDICT:
                raise UserError(
                    f"{path}: a claim needs {', '.join(FIELDS)}, a known paper and a verdict; "
                    f"got {claim}"
                )
            if len(short(claim).split()) > WORDS:
                raise UserError(
                    f'{path}: a claim of more than {WORDS} words needs a "short" one of at most '
                    f"{WORDS}; got {short(claim)!r}"
                )
            found.append((path, claim))
    return sorted(found, key=lambda x: (list(PAPERS).index(x[1]["paper"]), str(x[0])))


def short(claim):
    return claim.get("short") or claim["claim"].removesuffix(".")


def one_line(text):
    return " ".join(str(text).split())


def tally(claims):
    """ "27 claims: 7 yes, 11 partly, 9 no" """
    counts = Counter(claim["holds"] for _, claim in claims)
    parts = [f"{counts[v]} {word.strip('*')}" for v, word in VERDICT.items() if counts[v]]
    return f"{len(claims)} claims: {', '.join(parts)}"


def index(claims, document="docs/claims.md"):
    """README's table, one line a claim. UserError: it is too long for README."""
    lines = [
        f"{tally(claims)}. [docs/claims.md]({document}) has, under each number, what was measured and "
        "where it fails.",
        "",
        "| | paper | claim | here |",
        "|---|---|---|---|",
    ]
    paper = None
    for number, (_, claim) in enumerate(claims, 1):
        name = ""
        if claim["paper"] != paper:  # one link a paper: README stays short
            paper = claim["paper"]
            name = f"[{PAPERS[paper]}]({document}#c{number})"
        text = one_line(short(claim)).replace("|", "\\|")
        lines.append(f"| {number} | {name} | {text} | {VERDICT[claim['holds']]} |")
    table = "\n".join(lines)
    if len(table.encode()) > INDEX_BYTES:
        raise UserError(
            f"the index of claims has {len(table.encode())} bytes, README has room for "
            f'{INDEX_BYTES}: shorten the claims\' "short" texts'
        )
    return table


def paragraphs(claims, folder):
    """docs/claims.md: for each claim the paper's statement, what was measured, where it fails, the
    command and the files."""
    out = [
        "# The papers' claims, measured here",
        "",
        "Written by `python -m report.claims` from the result files; edit those, not this page.",
        f"{tally(claims)}.",
    ]
    paper = None
    for number, (path, claim) in enumerate(claims, 1):
        if claim["paper"] != paper:
            paper = claim["paper"]
            out += ["", f"## {PAPERS[paper]} ([{paper}](https://arxiv.org/abs/{paper}))"]
        place = path.parent.relative_to(folder).as_posix()
        fails = one_line(claim["fails_when"]) or "No such regime was found."
        out += [
            "",
            f'<a id="c{number}"></a>',
            "",
            f"### {number}. {one_line(short(claim))}: {VERDICT[claim['holds']].strip('*')}",
            "",
            f"**The paper says:** {one_line(claim['claim'])}",
            "",
            f"**Measured:** {one_line(claim['measured'])}",
            "",
            f"**Fails when:** {fails}",
            "",
            f"Command: `{one_line(claim['command'])}`. Files: [{place}](results/{place}).",
        ]
    return "\n".join(out) + "\n"


def rewrite(readme, body):
    """readme with what stands between the marks replaced by body."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise UserError(f"README.md needs one line {BEGIN!r} and one line {END!r}")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{body}\n{END}{rest.split(END)[1]}"


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    claims = read_claims(cfg.results)
    readme = Path(cfg.readme)
    document = Path(cfg.document)
    new = {
        readme: rewrite(readme.read_text(), index(claims)),
        document: paragraphs(claims, Path(cfg.results)),
    }
    for path, text in new.items():
        if path.exists() and path.read_text() == text:
            continue
        if cfg.check:
            raise UserError(
                f"{path.name} does not say what the result files say; run python -m report.claims"
            )
        path.write_text(text)
    print(f"{tally(claims)}: {readme.name} and {document.name}")


if __name__ == "__main__":
    script(main)
