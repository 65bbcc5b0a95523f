"""The command line: `python -m bench <command>`."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from bench.errors import BenchError

# Each is a module bench.<name> with add_arguments(parser) and run(args) -> exit code.
SUBJECTS = {
    "mnist": "train the paper's MNIST network without batch norm, with torch's and with ours",
    "ops": "the operation alone against every other batch norm at hand, on the layers of networks",
    "models": "training and inference of whole networks: without batch norm, with torch's, with ours",
    "study": "the paper's claims on real data: MNIST, BN-Inception, what batch norm does",
    "tune": "measure plans for the layers of a network and keep the fastest",
    "environment": "the GPU, its driver, versions, and what is not there",
    "bandwidth": "what bounds every plan: copies, second readings, launches, barriers",
    "calibrate": "measure the constants that plans are made of, and keep them",
    "codegen": "what the compiler makes of every kernel: registers, widths, what it keeps busy; needs no GPU",
    "overhead": "what a call costs on the CPU, launch by launch; needs no GPU",
    "report": "bench/results/*/*.json as one page with plots",
    "gpu": "the tests and benchmarks that need a GPU, each with a log and a time limit",
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of the chosen command, and in `run` what carries it out."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of tritonbn.")
    commands = parser.add_subparsers(dest="subject", metavar="command", required=True)
    subjects = {
        name: commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        for name, summary in SUBJECTS.items()
    }
    chosen = next((word for word in argv if not word.startswith("-")), None)
    if chosen in subjects:
        # Only the chosen subject is imported: --help must not wait for torch and matplotlib.
        subject = importlib.import_module(f"bench.{chosen}")
        subject.add_arguments(subjects[chosen])
        subjects[chosen].set_defaults(run=subject.run)
    args, unknown = parser.parse_known_args(argv)
    if unknown:  # `parse_args` would show the usage of `parser` and no option of the subject
        subjects[args.subject].error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        return int(args.run(args))
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("bench", "tritonbn"):
            raise
        print(f'error: {error.name} is missing: pip install -e ".[bench]"', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
