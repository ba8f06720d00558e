"""Flags: one dataclass per script, one line of help per field; and how a script ends.

    @dataclass
    class Config(RunConfig):
        alpha: float = opt(1.0, "weight of the step's progress", "reward", low=0)

    cfg = parse(Config, argv, __doc__)        # --alpha 0.5; an unknown flag or an impossible value ends in one line

Nothing here knows about reasoning, rewards or tasks (tasks/__init__.py has their flags).
"""

import argparse
import dataclasses
import errno
import math
import os
import shlex
import signal
import sys
from pathlib import Path

from safetensors import SafetensorError

from infra import parallel

ROOT = Path(__file__).resolve().parent.parent  # where the scripts lie
STAGE = "NANOPAV_STAGE"  # set in the environment of a pipeline's stages: a stage never plans stages


class UserError(ValueError):
    """Bad input from a person or a file. One line that names the mend; scripts print it and exit 2."""


# ----------------------------------------------------------------------------------------------------
# Flags: one dataclass per script, one line of help per field.


def opt(default, help, group="main", choices=None, low=None, high=None, above=None):
    """A dataclass field that is also a flag. low/high are inclusive bounds, above an exclusive one."""
    meta = dict(help=help, group=group, choices=choices, low=low, high=high, above=above)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print the usage of all sixty flags first
        raise UserError(f"{message}; --help lists the flags")


METAVAR = {int: "N", float: "X", str: "TEXT"}


def _brief(doc):
    """A module's header -> its first line and its commands: what --help needs of it."""
    first, *rest = doc.strip().splitlines() or [""]
    commands = [line for line in rest if line.startswith("    ") and line.split()[0] in ("python", "torchrun")]
    return "\n".join([first, "", *commands])


def _formatter(prog):
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=110)


def _depth(cls, name):
    """How far up its family a config class has this field: what a script is about comes first in --help."""
    return max(i for i, base in enumerate(cls.__mro__) if name in base.__dict__.get("__annotations__", {}))


# Flags that earlier versions had -> what to type now. Recorded commands and old notes meet them.
MOVED = {
    "planted-prompts": "--task-args prompts=N",
    "planted-length": "--task-args length=N",
    "question-field": "--task-args question_field=NAME",
    "answer-field": "--task-args answer_field=NAME",
    "template": "--task-args template=NAME",
    "shots": "--task-args shots=N",
    "search": "python search.py --method ...",
    "eval": "python -m report.evaluate",
    "show": "python -m report.show",
    "rft": "python -m papers.rft",
    "track-memorization": "python -m papers.memorization --snapshots N",
    "gate": "--guards anchor center legal (or outcome)",
    "anchor": "--guards, which lists the guards that are on",
    "center-bonus": "--guards, which lists the guards that are on",
    "credit": "--reward pav-to-go or q-to-go",
    "constant-value": "--verifier constant",
    "kl-estimator": "--beta alone (k2, in the loss)",
    "length-penalty": "python -m papers.mrt --length-penalty X",
    "mu-samples": "python -m papers.mrt",
    "mrt-credit": "python -m papers.mrt",
    "tensorboard": "python -m report.tensorboard RUN_DIR, during or after the run",
}


def _refuse_moved(cls, argv):
    """UserError: a flag of an earlier version that this config does not have."""
    names = {f.name.replace("_", "-") for f in dataclasses.fields(cls)}
    for word in sys.argv[1:] if argv is None else argv:
        name = word.split("=")[0].removeprefix("--")
        plain = name.removeprefix("no-")
        if word.startswith("--") and plain in MOVED and not {name, plain} & names:
            raise UserError(f"--{name} has moved; use {MOVED[plain]}")


def parse(cls, argv=None, description=None):
    """Command line -> config. Unknown flags and impossible values end the program with one line."""
    _refuse_moved(cls, argv)
    parser = _Parser(usage="%(prog)s [--flag value ...]", description=_brief(description or ""),
                     formatter_class=_formatter, allow_abbrev=False)
    groups = {}
    for f in sorted(dataclasses.fields(cls), key=lambda f: _depth(cls, f.name)):
        m = f.metadata
        group = groups.setdefault(m["group"], parser.add_argument_group(m["group"]))
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        flag = "--" + f.name.replace("_", "-")
        help = m["help"].replace("%", "%%")  # argparse would take it for a format
        text = help + (f" (default: {default})" if default not in (None, "", []) else "")
        if isinstance(default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default,
                               help=f"{help} (default: {'on' if default else 'off'})")
        elif isinstance(default, list):
            kind = type(default[0]) if default else str
            group.add_argument(flag, nargs="*", type=kind, default=default, help=text, choices=m["choices"],
                               metavar=None if m["choices"] else METAVAR[kind])
        else:
            kind = type(default) if default is not None else str
            group.add_argument(flag, type=kind, default=default, help=text, choices=m["choices"],
                               metavar=None if m["choices"] else METAVAR[kind])
    cfg = cls(**vars(parser.parse_args(argv)))
    check_bounds(cfg)
    check_places(cfg)
    return cfg


def check_places(cfg):
    """UserError where --out or --run-dir could not be written: before the work, not after it."""
    for name in ("out", "run_dir"):
        path = getattr(cfg, name, "")
        place = Path(path or ".").absolute()
        flag = f"--{name.replace('_', '-')} {path}"
        if name == "run_dir" and place.is_file():
            raise UserError(f"{flag} is a file; give a folder")
        above = next(p for p in (place, *place.parents) if p.exists())
        if above != place and not above.is_dir():
            raise UserError(f"{flag}: {above} is a file; give another place")
        if not os.access(above, os.W_OK):
            raise UserError(f"{flag}: {above} cannot be written; give another place")


def check_bounds(cfg):
    for f in dataclasses.fields(cfg):
        value, m = getattr(cfg, f.name), f.metadata
        flag = "--" + f.name.replace("_", "-")
        for v in value if isinstance(value, list) else [value]:
            if isinstance(v, (int, float)) and not isinstance(v, bool):
                if not math.isfinite(v):
                    raise UserError(f"{flag} must be a finite number, got {v}")
                if m["low"] is not None and v < m["low"]:
                    raise UserError(f"{flag} must be at least {m['low']}, got {v}")
                if m["high"] is not None and v > m["high"]:
                    raise UserError(f"{flag} must be at most {m['high']}, got {v}")
                if m["above"] is not None and v <= m["above"]:
                    raise UserError(f"{flag} must be greater than {m['above']}, got {v}")


def key_values(words, defaults, flag):
    """KEY=VALUE words of a flag -> dict: defaults, with what the words say. A default's type is the value's type.
    UserError: another key, or a value of another type."""
    values = dict(defaults)
    for word in words:
        key, equals, text = word.partition("=")
        if key not in defaults or not equals:
            raise UserError(f"{flag} {word}: write KEY=VALUE with one of {', '.join(defaults) or 'no key at all'}")
        try:
            values[key] = type(defaults[key])(text)
        except ValueError:
            raise UserError(f"{flag} {key}={text}: a {type(defaults[key]).__name__} is wanted") from None
    return values


def flags(cfg):
    """The command line that gives this config: for starting another script with the same settings. Defaults are left
    out, so a recorded command says what was chosen."""
    plain = type(cfg)()
    values = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}
    return flag_words({k: v for k, v in values.items() if v != getattr(plain, k) and v is not None})


def flag_words(settings):
    """{"num_prompts": 4, "guards": ["anchor"]} -> ["--num-prompts=4", "--guards", "anchor"]."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            words += [f"--{flag}", *map(str, value)]
        else:
            words.append(f"--{flag}={value}")
    return words


def typed(argv=None):
    """The names of the flags on a command line."""
    words = sys.argv[1:] if argv is None else argv
    return {w.split("=")[0][2:].replace("-", "_") for w in map(str, words) if w.startswith("--")}


def say_settings(cfg, settings, argv=None):
    """One line where a script typed alone is about to run with other settings than the stage of a comparison does.

    settings: the task's, for this stage. A stage's command is complete, so nothing is said there; nor under --smoke.
    """
    if cfg.smoke or STAGE in os.environ or parallel.rank():
        return
    names = settings.keys() - typed(argv)
    others = {k: v for k, v in settings.items() if k in names and getattr(cfg, k) != v}
    if others:
        print(f"note: a comparison on --task {cfg.task} runs this stage with {shlex.join(flag_words(others))}", flush=True)


def print_next_command(cfg, *commands):
    """Below a script's summary: what to run now. commands: (what it gives, its words but for the flags of the task).
    Called by main() alone: who calls train() from a program wants no advice."""
    about_the_task = {f.name for f in dataclasses.fields(cfg) if f.metadata["group"] == "problems"} | {"seed"}
    plain = type(cfg)()
    others = {f.name: getattr(plain, f.name) for f in dataclasses.fields(cfg) if f.name not in about_the_task}
    same = flags(dataclasses.replace(cfg, **others))
    same = same if any(word.startswith("--task=") for word in same) else [f"--task={cfg.task}", *same]
    for gives, words in commands if parallel.rank() == 0 else ():
        print(f"next, {gives}:\n  {command_line([*map(str, words), *same])}")


def stage_words(cfg, settings):
    """What print_next_command adds to the command of a stage: the task's settings for it, or --smoke after --smoke."""
    return ["--smoke"] if cfg.smoke else flag_words(settings)


def command_line(words):
    """Words behind `python`, a script of ours first -> the line to type in the current folder."""
    if Path.cwd() == ROOT:
        return f"python {shlex.join(words)}"
    if words[0] == "-m":
        return f"PYTHONPATH={shlex.quote(str(ROOT))} python {shlex.join(words)}"
    return f"python {shlex.join([str(ROOT / words[0]), *words[1:]])}"


def run_folder(cfg, name=""):
    """--run-dir, or where a run of that name goes: runs/TASK/NAME. What --smoke makes has a place of its own, so that the
    real command can follow it."""
    return cfg.run_dir or str(Path("runs") / f"{cfg.task}{'-smoke' if cfg.smoke else ''}" / name)


def what_this_is(doc, *commands):
    """The main of a file that holds parts of other scripts: the first sentence of its header, and what to type instead."""
    lines = doc.strip().split("\n\n")[0].split()
    print(f"{' '.join(lines)}\nNothing to run here; instead: {'; '.join(commands)}")


def script(main):
    """Run main(). What a person can mend becomes one line and exit code 2: a UserError, a file or folder that cannot be
    read or written. SIGTERM ends a script as Ctrl-C does, so that nothing it started is left behind."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
        sys.stdout.flush()
    except UserError as e:
        parallel.leave(_complain(e))
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parallel.leave(0)
    except (OSError, SafetensorError) as e:
        if not getattr(e, "filename", None) and getattr(e, "errno", None) not in FULL_DISK and "(os error " not in str(e):
            raise  # no file of anybody's: a fault of ours, whose traceback is wanted
        parallel.leave(_complain(f"{e}; mend it and run the same command again"))
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint, where it writes one", file=sys.stderr)
        parallel.leave(130)
    parallel.leave()


FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _complain(message):
    print(f"error: {message}", file=sys.stderr)
    return 2


@dataclasses.dataclass
class RunConfig:
    """The flags that every training script shares, but for those of the task."""

    max_completion_length: int = opt(0, "tokens a completion may have (0: the task's own)", "run", low=0)
    run_dir: str = opt("", "where the run is written", "run")
    seed: int = opt(0, "fixes every random choice", "run", low=0)
    device: str = opt("auto", "auto, cpu, cuda or cuda:N", "run")
    dtype: str = opt("float32", "of weights and activations; log-probs are float32 always", "run",
                     choices=["float32", "bfloat16"])
    shard: bool = opt(False, "under torchrun: split weights, gradients and moments over the processes (parallel.py)", "run")
    threads: int = opt(0, "CPU threads (0: torch's choice; 1 is best for the tiny models)", "run", low=0)
    smoke: bool = opt(False, "the same road with few steps, for a look in under a minute", "run")
