"""README's table of claims, written from the result files: what a paper says, what we measured, with which command.

    python experiments/claims.py            # rewrites the table between the marks in README.md
    python experiments/claims.py --check    # exit code 1 if README does not say what the files say (a test runs it)

Every docs/results/**/*.json may hold a list "claims" of objects with
    paper       arXiv number
    claim       the paper's statement, one sentence, with its number
    measured    ours, one sentence, with spread and seeds
    holds       true, false or "partly": by a rule in the script that measured it, not by taste
    command     what makes the file again
    fails_when  the regime where the claim does not hold, one sentence ("" if none was found)
Nothing is typed in here: a number that is not in a file cannot be in the table.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from infra.cli import UserError, opt, parse, script  # noqa: E402

BEGIN, END = "<!-- claims: written by experiments/claims.py -->", "<!-- end of claims -->"
PAPERS = {"2410.08146": "PAV", "2406.14532": "incorrect data", "2411.07681": "learning dynamics", "2503.07572": "MRT",
          "2502.12118": "verifier-based or not", "2302.02931": "BR-DRO", "2306.11120": "CosMoS", "2302.05441": "Pro^2",
          "2307.10026": "ENP", "2310.00873": "OCS", "2312.03151": "MTL", "2312.03318": "STOC", "2312.15551": "private transfer"}
FIELDS = ("paper", "claim", "measured", "holds", "command", "fails_when")
VERDICT = {True: "yes", False: "**no**", "partly": "partly"}


@dataclass
class Config:
    check: bool = opt(False, "change nothing; fail if README and the files disagree")
    results: str = opt(str(ROOT / "docs/results"), "where the result files are")
    readme: str = opt(str(ROOT / "README.md"), "the file with the marks")


def read_claims(folder):
    """All claims below folder, by paper, then file: [(path, claim)]. UserError: a claim without one of FIELDS."""
    found = []
    for path in sorted(Path(folder).rglob("*.json")):
        content = json.loads(path.read_text())
        for claim in content.get("claims", []) if isinstance(content, dict) else []:
            missing = [f for f in FIELDS if f not in claim]
            if missing or claim["paper"] not in PAPERS or claim["holds"] not in VERDICT:
                raise UserError(f"{path}: a claim needs {', '.join(FIELDS)}, a known paper and a verdict; got {claim}")
            found.append((path, claim))
    return sorted(found, key=lambda x: (list(PAPERS).index(x[1]["paper"]), str(x[0])))


def table(claims, folder):
    """Markdown; a cell must not break the row."""
    cell = lambda text: " ".join(str(text).replace("|", "\\|").split())  # noqa: E731
    lines = ["| paper | it says | here | holds | fails when | command, files |", "|---|---|---|---|---|---|"]
    for path, c in claims:
        where = path.parent.relative_to(folder)
        lines.append("| " + " | ".join([
            f"[{PAPERS[c['paper']]}](https://arxiv.org/abs/{c['paper']})", cell(c["claim"]), cell(c["measured"]),
            VERDICT[c["holds"]], cell(c["fails_when"]), f"`{cell(c['command'])}` ([files](docs/results/{where}))"]) + " |")
    return "\n".join(lines)


def rewrite(readme, body):
    """readme with what stands between the marks replaced by body."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise UserError(f"README.md needs one line {BEGIN!r} and one line {END!r}")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{body}\n{END}{rest.split(END)[1]}"


def main():
    cfg = parse(Config, None, __doc__)
    readme = Path(cfg.readme)
    old = readme.read_text()
    claims = read_claims(cfg.results)
    new = rewrite(old, table(claims, Path(cfg.results)))
    if cfg.check:
        if new != old:
            raise UserError(f"{readme.name} does not say what the result files say; run python experiments/claims.py")
        print(f"{len(claims)} claims, as {readme.name} has them")
        return
    readme.write_text(new)
    print(f"{len(claims)} claims -> {readme}")


if __name__ == "__main__":
    script(main)
