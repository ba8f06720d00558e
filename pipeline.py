"""From nothing to a comparison: which stages an arm of train_rl.py needs, built in order, side by side.

    train_rl.py --reward pav  ->  runs/TASK/seed0/{sft, prover, verifier, rl_outcome, rl_pav}, then the report

Every stage is a plain command line of another script in its own process and directory, so each can be run,
killed and resumed alone; the log of each holds the exact command.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

from infra.cli import UserError, flags, say_next
from infra.runs import write_json
from tasks import TaskFlags, task_class

TASK_FLAGS = (*(f.name for f in fields(TaskFlags)), "max_completion_length", "device", "dtype", "smoke")


def arm_name(cfg):
    return "pav" if cfg.reward == "pav" and cfg.alpha > 0 else cfg.reward


def plan(cfg, given):
    """The jobs of a comparison: list of (label, needs, argv). `given` are the flags that the user typed, which
    win over the table above."""
    here = Path(__file__).parent
    task = task_class(cfg.task)  # its settings alone: no file is read here
    if task.needs_model and not cfg.model and not cfg.policy:
        raise UserError(f"--task {cfg.task} needs a policy to start from: give --model NAME, or --policy DIR")
    table = task.stages
    extra = json.loads(cfg.stage_flags) if cfg.stage_flags else {}
    threads = cfg.threads or (0 if cfg.model else 1)
    shared = [f for f in flags(cfg, TASK_FLAGS) if f not in ("--no-smoke",)] + [f"--threads={threads}"]
    rl_table = table["rl"] | (task.smoke["rl"] if cfg.smoke else {})
    rl = replace(cfg, **{k: v for k, v in rl_table.items() if k not in given or cfg.smoke}, threads=threads)
    rl_flags = flags(rl, [f.name for f in fields(cfg) if f.name not in
                          (*TASK_FLAGS, "run_dir", "seed", "seeds", "arms", "workers", "stage_flags", "reward", "policy",
                           "verifier", "model", "constant_value", "threads", "shard", "tensorboard")
                          and not f.name.startswith("rollout_")])
    rl_flags += ["--tensorboard"] * cfg.tensorboard
    root = Path(cfg.run_dir or f"runs/{cfg.task}")
    jobs = []
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        home, mine = root / f"seed{seed}", [*shared, f"--seed={seed}"]
        policy = cfg.policy or str(home / "sft")

        def stage(name, script, needs, arguments, settings, home=home, mine=mine, seed=seed):
            argv = [str(here / script), *mine, *arguments, f"--run-dir={home / name}"]
            for k, v in settings.items():
                flag = f"--{k.replace('_', '-')}"
                argv += [flag, *map(str, v)] if isinstance(v, list) else [f"{flag}={v}"]
            jobs.append((f"seed{seed}/{name}", [f"seed{seed}/{n}" for n in needs], argv))

        def sft(name, strength, home=home):
            arguments = [f"--model={cfg.model}"] if cfg.model else []
            arguments += [f"--strength={strength}"] if strength is not None and not cfg.model else []
            settings = table["sft"] | extra.get("sft", {}) | (task.smoke["sft"] if cfg.smoke else {})
            stage(name, "train_sft.py", [], arguments, settings)

        def verifier(name, prover, strength, label="q", home=home, policy=policy):
            arguments = [f"--policy={policy}", f"--label={label}", f"--temperature={rl.temperature}"]
            arguments += [f"--prover={home / prover}"] if prover else []
            arguments += [f"--prover-strength={strength}"] if strength is not None else []
            settings = table["verifier"] | extra.get("verifier", {}) | (task.smoke["verifier"] if cfg.smoke else {})
            stage(name, "pav.py", [n for n in ("sft", prover) if n and not cfg.policy], arguments, settings)

        strengths = task.strengths
        if not cfg.policy:
            sft("sft", strengths and strengths["base"])
        arms = [arm_name(cfg)] + [a for a in cfg.arms if a != arm_name(cfg)]
        needed = {v for v in (verifier_of(a) for a in arms) if v}
        scripted = strengths is not None
        for name, prover in [("verifier", "prover"), ("verifier_strong", "strong"), ("verifier_base", None),
                             ("verifier_outcome", None)]:
            if name not in needed or (name == "verifier" and cfg.verifier):
                continue
            if prover and not scripted:
                if name == "verifier_strong":
                    raise UserError(f"--task {cfg.task} has no scripted stronger prover; leave the arm strong-prover out")
                prover = None
            if prover:
                sft(prover, strengths[prover])
            strength = strengths[prover or "base"] if scripted else None
            verifier(name, prover, strength, "outcome" if name == "verifier_outcome" else "q")
        for arm in arms:
            name = verifier_of(arm) or ("verifier" if "verifier" in needed else None)
            path = cfg.verifier if name == "verifier" and cfg.verifier else name and str(home / name)
            needs = ([] if cfg.policy else ["sft"]) + ([name] if name and not (name == "verifier" and cfg.verifier) else [])
            reward = {"constant": "pav", "base-prover": "pav", "strong-prover": "pav", "outcome-long": "outcome"}.get(arm, arm)
            arguments = [*rl_flags, f"--reward={reward}", f"--policy={policy}"]
            arguments += [f"--verifier={path}"] if path else []
            arguments += ["--constant-value"] if arm == "constant" else []
            if arm == "outcome-long":  # as many tokens as PAV's RL and its verifier's rollouts together
                steps = rl.steps * table["long"]
                arguments = [a for a in arguments if not a.startswith("--steps=")] + [f"--steps={steps}"]
            stage(f"rl_{arm}", "train_rl.py", needs, arguments, {})
    return root, jobs


def verifier_of(arm):
    """The verifier that an arm is paid by; None for the outcome arm and for mrt, which asks the policy itself."""
    return {"pav": "verifier", "q": "verifier", "constant": "verifier", "orm": "verifier_outcome",
            "base-prover": "verifier_base", "strong-prover": "verifier_strong"}.get(arm)


def run(cfg, given):
    """Build what is missing, run the arms, draw the report. Returns the run's root."""
    root, jobs = plan(cfg, given)
    workers = cfg.workers or (1 if cfg.model else max(1, os.cpu_count() or 1))
    missing = [j for j in jobs if not (Path(flag_value(j[2], "run-dir")) / "summary.json").exists()]
    if missing:
        print(f"{root}: {len(missing)} of {len(jobs)} stages to build, {workers} at a time: "
              + ", ".join(j[0] for j in missing), flush=True)
    root.mkdir(parents=True, exist_ok=True)
    refuse_other_settings(root, jobs, {j[0] for j in jobs} - {j[0] for j in missing})
    (root / "commands.txt").write_text("".join(f"python {shlex.join(j[2])}\n" for j in jobs))
    done = {j[0] for j in jobs} - {j[0] for j in missing}
    run_jobs([(label, [n for n in needs if n not in done], argv) for label, needs, argv in missing], workers, root / "logs")
    from report import __main__ as report

    report.write(root)
    argv = next((j[2] for j in jobs if j[0].endswith("/rl_pav")), None)
    if argv:
        policy, verifier = flag_value(argv, "run-dir"), flag_value(argv, "verifier")
        say_next(replace(cfg, seed=int(flag_value(argv, "seed"))), ("its solutions, each step with its value and progress",
                 ["sample.py", "--model", policy, "--verifier", verifier, "--show"]))
    return root


def run_jobs(jobs, workers, log_dir):
    """Run command lines side by side, at most `workers` at once; jobs: list of (label, needs, argv).

    `needs` names labels that must have ended first. Output goes to log_dir/LABEL.log, its last line to
    the screen. Each job resumes by itself, so a killed batch is simply run again.
    """
    log_dir = Path(log_dir)
    log_dir.mkdir(parents=True, exist_ok=True)
    waiting, running, done = list(jobs), {}, set()
    try:
        while waiting or running:
            ready = [j for j in waiting if set(j[1]) <= done][: workers - len(running)]
            for job in ready:
                waiting.remove(job)
                log = open(log_dir / f"{job[0].replace('/', '_')}.log", "w")  # noqa: SIM115 (the child's)
                child = subprocess.Popen([sys.executable, *job[2]], stdout=log, stderr=subprocess.STDOUT)
                running[job[0]] = (child, log, time.time())
            time.sleep(0.1)
            for label, (child, log, start) in list(running.items()):
                if child.poll() is None:
                    continue
                log.close()
                del running[label]
                said = last_line(Path(log.name).read_text())
                if child.returncode:
                    raise UserError(f"stage {label} failed ({said}); all of its output: {log.name}")
                done.add(label)
                print(f"  {label:<28} {time.time() - start:6.0f} s   {said}", flush=True)
    finally:
        for child, _, _ in running.values():
            child.terminate()


def last_line(log):
    """A stage's summary: the last line but for what say_next printed below it."""
    lines = [line for line in log.strip().splitlines() if not line.startswith(("next, ", "  python "))]
    return lines[-1] if lines else ""


def refuse_other_settings(root, jobs, complete):
    """A stage that is already there must come from the command that would make it now."""
    path = root / "commands.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    for label, _, argv in jobs:
        changed = [a for a in argv[1:] if a not in old.get(label, argv)]
        if label in complete and changed:
            raise UserError(f"{root}/{label} was made with other settings than {changed[0]}; give another --run-dir, "
                            "or delete that stage and those built on it")
    write_json(path, old | {label: argv for label, _, argv in jobs})


def flag_value(argv, name):
    return next(a.split("=", 1)[1] for a in argv if a.startswith(f"--{name}="))
