"""Read finished RL runs from their folders: what the report is made of.

Every number comes from files that the stages wrote (run_config.json, metrics.jsonl, summary.json,
verifier.json); nothing is computed twice. A file that is damaged ends in one line with its name.
"""

from dataclasses import dataclass
from pathlib import Path

from infra.cli import UserError
from infra.runs import read_json, read_metrics
from report.arms import ARMS, arm_of, in_order

# Settings that may differ between runs that are averaged: those that name a place or a machine, and
# every one whose name ends with "seed".
NO_MATTER = (
    "run_dir",
    "policy",
    "verifier",
    "device",
    "threads",
    "tensorboard",
    "workers",
    "slots",
)
PATHS = ("data", "model")  # compared by file name, since a folder may have been moved


@dataclass
class Run:
    """One RL run. rows: all of metrics.jsonl; evaluations: those rows with eval/accuracy; verifier:
    the summary of the verifier beside it, or None; prover_k: that verifier's Best-of-K."""

    seed: str
    folder: Path
    config: dict
    rows: list
    summary: dict | None
    verifier: dict | None
    prover_k: int

    @property
    def evaluations(self):
        return [row for row in self.rows if "eval/accuracy" in row]

    @property
    def steps(self):
        return [row for row in self.rows if row.get("step", 0) > 0]


def load_arms(root):
    """A folder -> {arm: [Run]} in the order of report/arms.py.

    root is what train_rl.py --run-dir was given: seed*/rl_* of a comparison, or the folder of one
    run. Of a comparison only complete runs count. Runs of one arm with other settings become arms
    of their own, named after what differs (see split_by_settings).
    """
    root = Path(root)
    if not root.exists():
        raise UserError(f"{root}: no such folder; give the --run-dir of a train_rl.py run")
    if not root.is_dir():
        raise UserError(f"{root} is a file; give the folder of a run")
    if (root / "run_config.json").exists():
        run = load_run(root)
        if run.summary is None:
            total = run.config.get("steps", "?")
            print(f"{root} is not finished: step {run.rows[-1]['step']} of {total}")
        return {arm_name(run): [run]}
    folders = [*sorted(root.glob("seed*/rl_*")), *sorted(root.glob("rl_*"))]
    arms = {}
    for folder in folders:
        if (folder / "summary.json").exists():
            arms.setdefault(folder.name.removeprefix("rl_"), []).append(load_run(folder))
    if not arms:
        if folders:
            raise UserError(
                f"{root}: none of its {len(folders)} RL runs is finished; the command that started "
                "them goes on, or give the folder of one run"
            )
        raise UserError(
            f"{root} holds no RL run (no seed*/rl_*, no run_config.json); "
            f"start one: python train_rl.py --reward pav --run-dir {root}"
        )
    return {
        label: runs
        for name in in_order(list(arms))
        for label, runs in split_by_settings(name, arms[name]).items()
    }


def load_run(folder):
    """The Run in a folder. UserError: a file is missing, damaged, or not of an RL run."""
    config = read_json(folder / "run_config.json")
    path = folder / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{path} is missing; the run has not begun, or was copied without it")
    rows = read_metrics(folder)
    if not rows:
        raise UserError(f"{path} is empty or damaged in its first line; make the run again")
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'run_config.json'} is damaged: not a table of settings")
    home = folder.resolve().parent.name
    run = Run(
        seed=home if home.startswith("seed") else f"seed{config.get('seed', 0)}",
        folder=folder,
        config=config,
        rows=rows,
        summary=read_if_there(folder / "summary.json"),
        verifier=None,
        prover_k=1,
    )
    if not all("num_tokens" in row for row in run.evaluations) or not run.evaluations:
        raise UserError(f"{path} has no evaluation of an RL run; is {folder} a run of train_rl.py?")
    if place := verifier_folder(run):
        run.verifier = read_if_there(place / "summary.json")
        run.prover_k = best_of_k(place)
    if arm_name(run) == "mrt" and run.summary:  # its prover's tokens are sampled during RL
        run.verifier = dict(sampled_tokens=run.summary.get("mrt_tokens", 0))
    return run


def read_if_there(path):
    return read_json(path) if path.exists() else None


def arm_name(run):
    """The arm of a run: from its folder rl_ARM, or else from its settings."""
    if run.folder.name.startswith("rl_"):
        return run.folder.name.removeprefix("rl_")
    reward = run.config.get("reward", "outcome")
    for name, arm in ARMS.items():
        same = all(run.config.get(flag) == value for flag, value in arm.flags.items())
        if arm.flags and arm.reward == reward and same:
            return name
    return reward


def verifier_folder(run):
    """The folder of the run's verifier, also where both were moved; None if it is not there."""
    given = run.config.get("verifier")
    if not given:
        return None
    places = (Path(given), run.folder.parent / Path(given).name)
    return next((place for place in places if place.is_dir()), None)


def best_of_k(folder):
    """prover_k of the verifier in a folder: of its verifier.json, or of its newest checkpoint's."""
    for place in (folder, *sorted(folder.glob("step_*"), reverse=True)):
        if (place / "verifier.json").exists():
            return int(read_json(place / "verifier.json").get("prover_k", 1))
    return 1


def settings_of(run):
    """The settings that runs must share to be averaged."""
    out = {}
    for name, value in run.config.items():
        if name in NO_MATTER or name.endswith("seed"):
            continue
        if name in PATHS:
            value = [Path(v).name for v in ([value] if isinstance(value, str) else value or [])]
        out[name] = value
    return out


def differences(a, b):
    """Names of the settings in which two runs differ; one that only one of them has is no
    difference (a flag that came later)."""
    first = settings_of(a)
    second = settings_of(b)
    return sorted(k for k in first.keys() & second.keys() if first[k] != second[k])


def split_by_settings(name, runs):
    """Runs of one arm -> {arm: runs of equal settings}. The largest group keeps the arm's name,
    each other is called after what differs, and a line on the screen says so."""
    groups = []
    for run in runs:
        same = next((g for g in groups if not differences(g[0], run)), None)
        if same:
            same.append(run)
        else:
            groups.append([run])
    groups.sort(key=len, reverse=True)  # stable: of equal groups the first seed's
    out = {name: groups[0]}
    for group in groups[1:]:
        changed = differences(groups[0][0], group[0])
        differs = ", ".join(f"{k}={group[0].config[k]}" for k in changed[:3])
        differs += ", ..." if len(changed) > 3 else ""
        key = f"{name} ({differs})"
        while key in out:  # equal in the first three, not in the rest
            key += "+"
        out[key] = group
        flag = changed[0].replace("_", "-")
        new = group[0].config[changed[0]]
        old = groups[0][0].config[changed[0]]
        print(
            f"{arm_of(name).label}: {', '.join(run.seed for run in group)} is not averaged with "
            f"{', '.join(run.seed for run in groups[0])}: --{flag} {new} there, {old} here"
            + (f", and {len(changed) - 1} more settings differ" if len(changed) > 1 else "")
        )
    return out


def unequal_arms(arms):
    """Settings in which an arm differs from the first one, beside those that make it an arm:
    {arm: [name]}. A comparison of such arms is not one of rewards alone."""
    first_name, (first, *_) = next(iter(arms.items()))
    out = {}
    for name, runs in arms.items():
        wanted = {"reward", *arm_of(name).flags, *arm_of(first_name).flags}
        if arm_of(name).longer or arm_of(first_name).longer:
            wanted.add("steps")
        changed = [k for k in differences(first, runs[0]) if k not in wanted]
        if changed and name.split(" (")[0] == name:  # a split arm's name says it already
            out[name] = changed
    return out


def commands(root):
    """The content of commands.json of a comparison (looked for above a single run, too): {stage:
    its command}; {} where there is none. UserError: it is damaged."""
    root = Path(root).resolve()
    for folder in (root, root.parent, root.parent.parent):
        path = folder / "commands.json"
        if path.exists():
            stages = read_json(path)
            if not isinstance(stages, dict):
                raise UserError(f"{path} is damaged: not a table of commands; delete it")
            return stages
    return {}
