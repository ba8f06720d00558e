"""One claim a script: python -m experiments.NAME."""
