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
import shlex
import sys

from safetensors import SafetensorError

from infra import parallel


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


def parse(cls, argv=None, description=None):
    """Command line -> config. Unknown flags and impossible values end the program with one line."""
    formatter = lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=110)  # noqa: E731
    parser = _Parser(usage="%(prog)s [--flag value ...]", description=_brief(description or ""), formatter_class=formatter,
                     allow_abbrev=False)
    groups = {}
    inherited = {f.name for base in cls.__mro__[1:] if dataclasses.is_dataclass(base) for f in dataclasses.fields(base)}
    for f in sorted(dataclasses.fields(cls), key=lambda f: f.name in inherited):  # what the script is about comes first
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
    return cfg


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


def flags(cfg, names=None):
    """The command line that gives this config: for starting another script with the same settings."""
    out = []
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        if (names is not None and f.name not in names) or value is None:
            continue
        flag = f.name.replace("_", "-")
        if isinstance(value, bool):
            out.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            out += [f"--{flag}", *map(str, value)] if value else []
        else:
            out.append(f"--{flag}={value}")
    return out


def say_next(cfg, *commands):
    """Below a script's summary: what to run now. commands: (what it gives, its argv but for the flags that name the task).
    Called by main() alone: who calls train() from a program wants no advice."""
    plain = type(cfg)()
    names = [f.name for f in dataclasses.fields(cfg) if f.metadata["group"] == "problems" or f.name == "seed"]
    same = [n for n in names if n == "task" or getattr(cfg, n) != getattr(plain, n)]
    for gives, argv in commands if parallel.rank() == 0 else ():
        print(f"next, {gives}:\n  python {shlex.join([*map(str, argv), *flags(cfg, same)])}")


def script(main):
    """Run main(); a UserError or a full disk becomes one line and exit code 2."""
    try:
        main()
    except UserError as e:
        parallel.leave(_complain(e))
    except (OSError, SafetensorError) as e:
        mendable = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
        if getattr(e, "errno", None) not in mendable and "(os error " not in str(e):  # safetensors wraps them in text
            raise
        parallel.leave(_complain(f"{e}; nothing saved before is lost, mend it and run the same command again"))
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        parallel.leave(130)
    parallel.leave()


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
    tensorboard: bool = opt(False, "write the metrics for TensorBoard too, to RUN_DIR/tensorboard", "run")
    shard: bool = opt(False, "under torchrun: split weights, gradients and moments over the processes (parallel.py)", "run")
    threads: int = opt(0, "CPU threads (0: torch's choice; 1 is best for the tiny models)", "run", low=0)
    smoke: bool = opt(False, "the same road with few steps, for a look in under a minute", "run")
