"""The tasks by name. A new task is one file here and one line in TASKS; base.py is the contract."""

import importlib
import sys
from dataclasses import dataclass, replace

from infra import parallel
from infra.cli import UserError, flag_words, opt, say_settings
from infra.runs import recorded_settings
from tasks.answers import answers_equal, extract_answer

__all__ = ["TASKS", "TaskFlags", "adopt_task", "answers_equal", "extract_answer", "get_task", "prepare", "smoked", "task_class"]

TASKS = {  # name: module:class, imported when it is asked for
    "planted": "tasks.planted:Planted",
    "countdown": "tasks.countdown:Countdown",
    "grid": "tasks.grid:Grid",
    "chain": "tasks.chain:Chain",
    "stargraph": "tasks.stargraph:StarGraph",
    "worded": "tasks.worded:Worded",
    "probe": "tasks.probe:Probe",
    "contextual": "tasks.contextual:Contextual",
    "gsm8k": "tasks.files:Gsm8k",
    "math": "tasks.files:Math",
    "jsonl": "tasks.files:Jsonl",
}

GROUP = "problems"  # infra.cli.print_next_command repeats the flags of this group


@dataclass
class TaskFlags:
    """The flags that name a task: class Config(TaskFlags, RunConfig)."""

    task: str = opt("planted", "what to solve", GROUP, choices=TASKS)
    task_seed: int = opt(
        -1, "fixes what planted and contextual hide, and the worked examples (-1: --seed)",
        GROUP, low=-1,
    )
    data: list = opt(
        [], "files of --task gsm8k, math or jsonl; train=, val=, test=FILE name a split", GROUP
    )
    task_args: list = opt(
        [], "KEY=VALUE ... of the task: prompts length (planted); template shots question_field "
        "answer_field (files)", GROUP
    )
    grader: str = opt(
        "exact", "of answers from files; math-verify knows more formulas, and must be installed",
        GROUP, choices=["exact", "math-verify"],
    )


def task_class(name):
    """Name -> the task's class. UserError: a name that TASKS does not have."""
    if name not in TASKS:
        *others, last = TASKS
        raise UserError(f"task {name!r} is unknown; use {', '.join(others)} or {last}")
    module, name = TASKS[name].split(":")
    return getattr(importlib.import_module(module), name)


def get_task(task, seed=0, data=None, **options):
    """The task that a script's config describes, or that has this name, seed and data and is else as
    the flags' defaults say. options go to its class and win over the flags."""
    if isinstance(task, str):
        task_class(task)  # before the flags: an unknown name is an error here
        task = TaskFlags(task=task, task_seed=seed)
    options |= {} if data is None else dict(data=data)
    return task_class(task.task).from_config(task, **options)


def smoked(cfg, stage):
    """The config as --smoke wants it: the task's few steps for this stage (sft, verifier, rl)."""
    return replace(cfg, **task_class(cfg.task).smoke[stage]) if cfg.smoke else cfg


def adopt_task(cfg, *runs):
    """Take --task-seed and --task-args from the runs that a command starts from, where it does not type them.

    runs: folders of policies and verifiers, those first that decide; "" and names of open weights say nothing. What a
    task hides depends on these flags: a policy of another seed is graded wrong however good it is. Changes cfg, and says
    so on stderr; warns where a run was made for other problems than those that were typed or taken.
    """
    for run in filter(None, runs):
        recorded = recorded_settings(run)
        made_for = recorded.get("task", cfg.task)
        if made_for in TASKS and made_for != cfg.task and not task_class(made_for).needs_model:
            print(f"note: {run} was made for --task {made_for}", file=sys.stderr)
        if recorded.get("task") != cfg.task or task_class(cfg.task).needs_model:
            continue
        for name, value in hidden_by(cfg.task, recorded).items():
            now = hidden_by(cfg.task, vars(cfg))[name]
            several = name == "task_seed" and getattr(cfg, "seeds", 1) > 1
            if now == value and not several:
                continue
            untyped = getattr(cfg, name) in (-1, [])
            if untyped:
                setattr(cfg, name, value)
            if parallel.rank() == 0 and (untyped or now != value):
                words = " ".join(flag_words({name: value}))
                print(f"note: {words} is taken from {run}" if untyped else
                      f"warning: {run} was made with {words}: other problems than those asked for now", file=sys.stderr)


def prepare(cfg, stage, argv, *runs):
    """What a stage's script does with its flags before the work -> the config to run with: the task of the runs that it
    starts from, a line on settings that a comparison has otherwise, --smoke."""
    adopt_task(cfg, *runs)
    say_settings(cfg, task_class(cfg.task).stages[stage], argv)
    return smoked(cfg, stage)


def hidden_by(task, settings):
    """{flag: value} of the settings that decide which problems an alphabet task poses."""
    out = dict(task_args=list(settings.get("task_args", [])))
    if task_class(task).hides_by_seed:
        task_seed = settings.get("task_seed", -1)
        out["task_seed"] = settings.get("seed", 0) if task_seed < 0 else task_seed
    return out
