"""What every script needs once: clear errors, config -> flags, atomic checkpoints, metrics.jsonl."""


class UserError(ValueError):
    """Bad input from a person or a file. One line that names the mend; scripts print it and exit 2."""
