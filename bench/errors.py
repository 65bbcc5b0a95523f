"""What a user of the benchmarks can put right."""


class BenchError(Exception):
    """Shown as one line, without a traceback; the exit code is 2."""
