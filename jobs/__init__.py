"""Small programs to copy: each prepares its data and runs distot on it. Start one with ``python -m jobs.NAME``."""

import distot  # noqa: F401  # first of all: it listens to Ctrl-C while what takes longer is imported
