"""The second table of worst_group.py: the result files of arXiv 2312.03151, aggregated again by
seed.

    published(folder)         {method: {seed: (worst group, average, epoch)}}, folder: a clone of
    theirs published_table(found)    text, and the claim without its command
"""

import json
from pathlib import Path

from infra.cli import UserError
from robustness import common
from robustness.common import cell, lead


def published(folder):
    """{method: {seed: (worst group, average, epoch)}} of the result files of a clone, in percent.
    """
    files = sorted(Path(folder).glob("models_params/civilcomments_small/*/*.json"))
    if not files:
        raise UserError(f"--published {folder} has no models_params/civilcomments_small/*/*.json")
    found = {}
    for path in files:
        try:
            content = json.loads(path.read_text())
            best = content["best_results"]
            row = (100 * best["min_acc_te"], 100 * best["avg_acc_te"], best["epoch"])
            found.setdefault(path.parent.name, {})[content["config"]["seed"]] = row
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{path} is not a result file of that repository ({e!r})") from None
    return found


def published_table(found):
    """The authors' arms again -> (text, claim without its command)."""
    arms = sorted(found)
    seeds = sorted(set.intersection(*(set(rows) for rows in found.values())))

    def at(arm, key):
        return [found[arm][s][("worst", "average", "epoch").index(key)] for s in seeds]

    copies = sum(found["jtt"][s][:2] == found["erm"][s][:2] for s in seeds)
    gains = {rival: lead(at("erm_mt_l1", "worst"), at(rival, "worst")) for rival in ("erm", "jtt")}
    words = [f"{m:+.1f} ({sd:.1f}) over {rival}" for rival, (m, sd, _) in gains.items()]
    note = (f"In {copies} of {len(seeds)} seeds JTT's numbers are those of ERM to every digit: "
            "its best epoch is not after epoch 5, where its first stage, which is ERM, ends.")
    text = "\n\n".join([
        common.matrix("CivilComments-small, the authors' result files, test, percent", arms,
                      ("worst", "average", "epoch"), at),
        common.leads("Worst group", "erm_mt_l1", arms, ["worst"], at),
        note])
    claim = dict(
        paper="2312.03151", holds=common.verdict(ahead for *_, ahead in gains.values()),
        claim="MTL + l1 beats ERM and JTT on the worst group of CivilComments-small (the authors' "
              "result files, aggregated again)",
        short="The same in the authors' published files, paired by seed",
        measured=f"worst group {cell(at('erm_mt_l1', 'worst'))}, ERM {cell(at('erm', 'worst'))}, "
                 f"JTT {cell(at('jtt', 'worst'))} percent; paired {', '.join(words)} "
                 f"({len(seeds)} seeds, sd)",
        fails_when=note)
    return text, claim
