"""Small programs to copy: each prepares its data and runs distot on it. Start one with ``python -m jobs.NAME``."""
