"""From nothing to a comparison: the stages that the arms of train_rl.py need, each a run directory.

    train_rl.py --reward pav
        ->  runs/TASK/seed0/{sft, prover, verifier, rl_outcome, rl_pav}, then the report

Every stage is one command of its own (runs/TASK/commands.txt), so each can be run, killed and
resumed alone; speedrun.sh is this file for one seed of the planted task, written out. Three steps:
plan() makes the jobs, run_jobs() runs those that are missing, report draws what is there.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pav
import report.__main__ as report
import train_sft
from infra.cli import (
    ROOT,
    STAGE,
    UserError,
    command_line,
    flag_words,
    flags,
    opt,
    parse,
    print_next_command,
    run_folder,
    typed,
    what_this_is,
)
from infra.runs import choose_device, different_settings, lock_folder, read_json, write_json
from model import resolve
from report.arms import ARMS
from tasks import TaskFlags, adopt_task, get_task


@dataclass
class Comparison:
    """The flags of train_rl.py that are about several runs; a single arm's config does not have
    them."""

    model: str = opt(
        "", "open weights to start from: a folder or smollm2 (default: tiny)", "pipeline"
    )
    arms: list = opt(
        ["outcome"],
        "other arms to run beside --reward for comparison",
        "pipeline",
        choices=list(ARMS),
    )
    seeds: int = opt(1, "repeat the whole pipeline with this many seeds", "pipeline", low=1)
    workers: int = opt(
        0, "jobs side by side (0: one per core for tiny models, else one)", "pipeline", low=0
    )
    stage_flags: str = opt(
        "", 'JSON of flags for the stages, e.g. \'{"sft": {"steps": 100}}\'', "pipeline"
    )


def with_flags(config):
    """A script's config class -> the same with the pipeline's flags."""
    return dataclasses.make_dataclass(config.__name__, [], bases=(Comparison, config))


def fields_of(cfg, cls):
    """The settings that cfg and the config class cls share, as a dict."""
    shared = {f.name for f in dataclasses.fields(cfg)} & {f.name for f in dataclasses.fields(cls)}
    return {name: getattr(cfg, name) for name in shared}


# ------------------------------------------------------------------------------------------------
# 1. Plan.

# Verifier -> its prover (a clone of the demonstrator, or the base policy), --label. The main one's
# prover may be another: a stage's flag, as all others.
VERIFIERS = {
    "verifier": ("prover", "q"),
    "verifier_strong": ("strong", "q"),
    "verifier_base": ("base", "q"),
    "verifier_outcome": ("base", "outcome"),
}
SHARED = ("max_completion_length", "device", "dtype", "threads", "smoke", "seed")


@dataclass
class Job:
    """One stage: words that name its script, its config, the labels of the jobs that must have
    ended before it."""

    label: str
    script: list
    config: object
    needs: list

    def command(self):
        """Words of the command line after `python`."""
        return [*self.script, *flags(self.config)]

    def done(self):
        return (Path(self.config.run_dir) / "summary.json").exists()


def stage_flags(text):
    """--stage-flags -> {"sft": {...}, "verifier": {...}}. UserError: not that, or a flag that the
    stage lacks."""
    example = '\'{"sft": {"steps": 100}}\''
    try:
        stages = json.loads(text or "{}")
    except ValueError as e:
        raise UserError(f"--stage-flags is not JSON ({e}); write {example}") from None
    known = dict(sft=train_sft.Config, verifier=pav.Config)
    stages_only = isinstance(stages, dict) and all(isinstance(v, dict) for v in stages.values())
    if not stages_only or set(stages) - set(known):
        raise UserError(f"--stage-flags maps a stage (sft, verifier) to its flags: {example}")
    for stage, settings in stages.items():
        unknown = settings.keys() - {f.name for f in dataclasses.fields(known[stage])}
        if unknown:
            raise UserError(
                f"--stage-flags: the stage {stage} has no flag {min(unknown)!r}; --help of its "
                "script lists them, with _ for -"
            )
        try:
            config = parse(known[stage], flag_words(settings))
        except UserError as e:
            raise UserError(f"--stage-flags, {stage}: {e}") from None
        stages[stage] = {name: getattr(config, name) for name in settings}
    return stages


def stage_settings(cfg, task, given):
    """What the stages are run with: the task's table, under what was typed, under --smoke."""
    asked = stage_flags(cfg.stage_flags)
    settings = dict(long=task.stages.get("long", 5))
    for stage in ("sft", "verifier", "rl"):
        smoke = task.smoke[stage] if cfg.smoke else {}
        settings[stage] = task.stages[stage] | asked.get(stage, {}) | smoke
    if not cfg.smoke:
        settings["rl"] = {k: v for k, v in settings["rl"].items() if k not in given}
    return settings


def plan(cfg, scripts, given):
    """-> root folder, jobs in an order in which they could run one by one.

    cfg: the settings of the arms with the pipeline's; scripts: {arm: (words that name its script,
    class of its config)}, "" for any other arm; given: names of the flags that were typed, which
    win over the task's table.
    """
    task = get_task(cfg)
    settings = stage_settings(cfg, task, given)
    root = Path(run_folder(cfg))
    threads = cfg.threads or (0 if cfg.model else 1)
    jobs = []
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        of_seed = dataclasses.replace(cfg, seed=seed, threads=threads)
        jobs += SeedPlan(of_seed, scripts, root / f"seed{seed}", settings, task).jobs.values()
    return root, jobs


class SeedPlan:
    """The jobs of one seed, by name: base policy, verifiers (each after its prover), arms."""

    def __init__(self, cfg, scripts, home, settings, task):
        self.cfg, self.scripts, self.home, self.settings, self.task = (
            cfg,
            scripts,
            home,
            settings,
            task,
        )
        self.shared = fields_of(cfg, TaskFlags) | {name: getattr(cfg, name) for name in SHARED}
        self.jobs = {}
        self.verifiers = {}  # name: folder
        main_arm = "outcome" if cfg.reward == "pav" and cfg.alpha == 0 else cfg.reward
        arms = list(dict.fromkeys([main_arm, *cfg.arms]))
        self.start_of("sft")
        for name in VERIFIERS:
            if name in {ARMS[arm].verifier for arm in arms}:
                self.add_verifier(name)
        for arm in arms:
            self.add_arm(arm)

    def add(self, name, script, config, needs):
        config = dataclasses.replace(config, run_dir=str(self.home / name))
        needs = [f"{self.home.name}/{n}" for n in needs if n in self.jobs]
        self.jobs[name] = Job(f"{self.home.name}/{name}", script, config, needs)

    def start_of(self, name):
        """The folder of a policy: --policy for sft where it is given; else a clone of the
        demonstrator (sft: its base strength), or the open weights fine-tuned."""
        if name == "sft" and self.cfg.policy:
            return self.cfg.policy
        if name not in self.jobs:
            strengths = self.task.strengths
            if strengths and name == "sft":
                start = dict(strength=strengths["base"]) | self.settings["sft"]
            elif strengths:
                start = dict(strength=strengths[name])
            elif name == "sft":
                start = dict(model=self.cfg.model)
            else:
                raise UserError(
                    f"--task {self.cfg.task} has no scripted demonstrator, so no {name}; leave "
                    f"that arm out"
                )
            self.add(
                name,
                ["train_sft.py"],
                train_sft.Config(**self.shared | self.settings["sft"] | start),
                [],
            )
        return str(self.home / name)

    def add_verifier(self, name):
        """A verifier and its prover. The main one's is what the settings of the stage say: "base",
        a folder, or the stage "prover", which is the default where there is a demonstrator."""
        if name == "verifier" and self.cfg.verifier:
            self.verifiers[name] = self.cfg.verifier
            return
        prover, label = VERIFIERS[name]
        stage = self.settings["verifier"]
        if name == "verifier":
            prover = stage.get("prover", self.task.main_prover())
        config = pav.Config(**self.shared | stage)
        config.policy, config.label = self.start_of("sft"), label
        config.temperature = self.settings["rl"].get("temperature", self.cfg.temperature)
        config.prover = self.start_of(prover) if prover in ("prover", "strong") else prover
        if self.task.strengths:
            base = self.settings["sft"].get("strength", self.task.strengths["base"])
            strengths = self.task.strengths | dict(base=base)
            config.prover_strength = strengths.get(prover, config.prover_strength)
        if label == "outcome":
            config.prover_k = 1  # an outcome model has no prover
        self.add(name, ["pav.py"], config, ["sft", prover])
        self.verifiers[name] = self.jobs[name].config.run_dir

    def add_arm(self, name):
        arm = ARMS[name]
        if arm.reward == "mrt" and name not in self.scripts:
            raise UserError(f"the arm {name} has a loop of its own: python -m papers.mrt")
        script, config_class = self.scripts.get(name) or self.scripts[""]
        config = dataclasses.replace(
            config_class(**fields_of(self.cfg, config_class)), **self.settings["rl"]
        )
        config.policy = self.start_of(arm.policy)
        if arm.longer:
            config.steps *= self.settings["long"]
        # An arm that is paid by no verifier is still watched by the main one, where there is one.
        verifier = arm.verifier or "verifier"
        if hasattr(config, "verifier"):
            config.reward = arm.reward
            config.verifier = self.verifiers.get(verifier, "")
        self.add(
            f"rl_{name}", script, dataclasses.replace(config, **arm.flags), [arm.policy, verifier]
        )


# ------------------------------------------------------------------------------------------------
# 2. Run.


def run(cfg, scripts, argv):
    """Build what is missing, run the arms, draw the report; see plan. Returns the run's root."""
    if STAGE in os.environ:
        raise UserError(
            "a stage of a pipeline lacks --policy, --verifier or --run-dir; report/arms.py says "
            "what each arm is paid by"
        )
    adopt_task(cfg, cfg.policy, getattr(cfg, "verifier", ""))  # MRT has none
    check(cfg)
    root, jobs = plan(cfg, scripts, typed(argv))
    run_plan(root, jobs, cfg.workers or (1 if cfg.model else max(1, os.cpu_count() or 1)))
    rl_pav = next((job.config for job in jobs if job.label.endswith("/rl_pav")), None)
    if rl_pav:
        show = ["-m", "report.show", "--model", rl_pav.run_dir, "--verifier", rl_pav.verifier]
        print_next_command(rl_pav, ("its solutions, each step with its value and progress", show))
    return root


def check(cfg):
    """UserError: what is wrong with the device, the task, its data or the runs that are given,
    before any stage is built."""
    choose_device(cfg.device, cfg.threads)
    task = get_task(cfg)
    if task.needs_model and not cfg.model and not cfg.policy:
        raise UserError(
            f"--task {cfg.task} has no alphabet of its own: give --model (a folder, or smollm2)"
        )
    for split in ("train", "val", cfg.eval_split):
        task.problems(split, 1, 0)
    if cfg.policy:
        resolve(cfg.policy)
    if getattr(cfg, "verifier", "") not in ("", "constant"):
        resolve(cfg.verifier, verifier=True)
    prover = stage_flags(cfg.stage_flags).get("verifier", {}).get("prover", "base")
    if prover not in ("base", "prover", "strong"):
        resolve(prover)


def run_plan(root, jobs, workers):
    """Run the jobs that are missing below root, at most `workers` side by side; then the report."""
    lock = lock_folder(root)  # noqa: F841 (held until the end)
    complete = {job.label for job in jobs if job.done()}
    for job in jobs:
        if job.label in complete:
            refuse_other_settings(root, job)
    missing = [job for job in jobs if job.label not in complete]
    if missing:
        labels = ", ".join(job.label for job in missing)
        print(
            f"{root}: {len(missing)} of {len(jobs)} stages to build, {workers} at a time: "
            f"{labels}\n"
            f"what each prints: {root}/logs/",
            flush=True,
        )
    write_commands(root, jobs)
    run_jobs(missing, workers, root / "logs", complete)
    report.write(root)


def refuse_other_settings(root, job):
    """UserError where a complete stage was made with other settings than the job's."""
    folder = Path(job.config.run_dir)
    ignore = (
        {"device", "threads", "verifier"}
        if getattr(job.config, "reward", "") == "outcome"
        else {"device", "threads"}
    )
    for name, old, new in different_settings(folder, job.config, ignore):
        raise UserError(
            f"{folder} was made with --{name.replace('_', '-')} {old!r}, not {new!r}: give "
            f"another --run-dir, or "
            f"delete it and the stages built on it: rm -r {folder}"
        )


def write_commands(root, jobs):
    """root/commands.json and commands.txt: how every stage below root was made, of earlier calls
    too."""
    path = root / "commands.json"
    commands = read_json(path) if path.exists() else {}
    commands |= {job.label: job.command() for job in jobs}
    write_json(path, commands)
    lines = [f"{command_line(command)}\n" for command in commands.values()]
    (root / "commands.txt").write_text("".join(lines))


def run_jobs(jobs, workers, log_dir, done=()):
    """Run jobs side by side, at most `workers` at once, each after those that it needs; done:
    labels that have ended.

    What a job prints goes to log_dir/LABEL.log, its last line to the screen, and every ten seconds
    how far each is. Each job resumes by itself, so a killed batch is simply run again.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    waiting = list(jobs)
    done = set(done)
    running = {}  # label: (process, path of its log, time of its start)
    told = time.time()
    try:
        while waiting or running:
            for job in [j for j in waiting if set(j.needs) <= done][: workers - len(running)]:
                waiting.remove(job)
                path = log_dir / f"{job.label.replace('/', '_')}.log"
                running[job.label] = (start_job(job, path), path, time.time())
            time.sleep(0.1)
            for label, (process, path, start) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[label]
                last = last_line(path)
                if process.returncode:
                    raise UserError(f"stage {label} failed ({last}); all of its output: {path}")
                done.add(label)
                print(f"  {label:<28} {time.time() - start:6.0f} s   {last}", flush=True)
            if time.time() - told > 10 and running:
                told = time.time()
                print(
                    "  ... "
                    + "; ".join(
                        f"{label}: {last_line(path)}" for label, (_, path, _) in running.items()
                    ),
                    flush=True,
                )
    finally:
        stop([process for process, *_ in running.values()])


def start_job(job, log):
    """Start a stage in a process of its own; its output is appended to the log."""
    with open(log, "a") as output:
        script = job.script if job.script[0] == "-m" else [str(ROOT / job.script[0])]
        command = [sys.executable, *script, *flags(job.config)]
        environment = os.environ | {STAGE: "1", "PYTHONPATH": python_path()}
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)


def python_path():
    """For `python -m` in any folder: the scripts' own first."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def stop(processes):
    """End processes and wait for them: an orphan would hold its run's lock."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


def last_line(path):
    """A stage's newest line in its log, but for what print_next_command printed below its
    summary."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4000))
        lines = file.read().decode("utf-8", "replace").strip().splitlines()
    lines = [line for line in lines if not line.startswith(("next, ", "note: ", "warning: "))]
    lines = [line.strip() for line in lines if " python " not in line]
    return lines[-1] if lines else "starting"


if __name__ == "__main__":
    what_this_is(__doc__, "python train_rl.py --reward pav", "bash speedrun.sh")
