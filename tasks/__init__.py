"""The tasks by name. A new task is one file here and one line in TASKS; base.py is the contract."""

import importlib
from dataclasses import dataclass

from infra.cli import UserError, opt
from tasks.answers import answers_equal, extract_answer

__all__ = ["TASKS", "TaskFlags", "answers_equal", "extract_answer", "get_task", "task_class"]

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
