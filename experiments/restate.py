"""The claims of every committed results file made anew from the numbers in it.

    python -m experiments.restate            # rewrites the claims in docs/results
    python -m experiments.restate --check    # exit code 2 if a file does not claim what it holds

Nothing is trained or sampled: a claim is a pure function of the file that it stands in, and
tests/test_toolkit.py holds every committed file to that.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from experiments import (
    breaks,
    memorization,
    mrt,
    negatives,
    pav_data,
    pav_search_report,
    provers_report,
    reasoning_report,
    stargraph,
    vbvf_exact,
    vbvf_report,
)
from infra.cli import UserError, opt, parse, script
from infra.runs import write_json

CLAIMS = {
    "breaks/results.json": breaks.claims_of,
    "memorization/curation.json": memorization.curation_claims,
    "memorization/published.json": memorization.published_claims,
    "memorization/robustness.json": memorization.robustness_claims,
    "memorization/runs.json": memorization.runs_claims,
    "mrt/results.json": mrt.claims_of,
    "negatives/results.json": negatives.claims_of,
    "pav_data/results.json": pav_data.claims_of,
    "pav_search/results.json": pav_search_report.claims_of,
    "pav_search_grid/results.json": pav_search_report.claims_of,
    "provers/results.json": provers_report.claims_of,
    "reasoning_countdown/results.json": reasoning_report.claims_of,
    "reasoning_grid/results.json": reasoning_report.claims_of,
    "reasoning_grid_base0.5/results.json": reasoning_report.claims_of,
    "stargraph/results.json": stargraph.claims_of,
    "vbvf/exact.json": vbvf_exact.claims_of,
    "vbvf/results.json": vbvf_report.claims_of,
}


@dataclass
class Config:
    check: bool = opt(False, "change nothing; fail if a file's claims are not those of its numbers")
    results: str = opt("docs/results", "where the result files are")


def restated(path, claims_of):
    """-> the content of a results file with its claims made anew (an experiment's further
    lessons, too)."""
    results = json.loads(Path(path).read_text())
    if "lessons" in results:
        results["lessons"] = breaks.lessons_of(results)
    return results | dict(claims=claims_of(results))


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    for name, claims_of in CLAIMS.items():
        path = Path(cfg.results) / name
        new = restated(path, claims_of)
        if json.loads(path.read_text()) == new:
            continue
        if cfg.check:
            raise UserError(
                f"{path} does not claim what its numbers give; run python -m experiments.restate"
            )
        write_json(path, new)
        print(f"{path}: " + ", ".join(str(c["holds"]) for c in new["claims"]))


if __name__ == "__main__":
    script(main)
