"""The paper's claims on real data: `python -m bench study <which>`, each which a module here."""

import argparse
import importlib

# Each is a module bench.study.<name> with add_arguments(parser) and run(args) -> exit code.
STUDIES = {
    "mnist": "the paper's figure 1: accuracy and the last hidden layer, over seeds, against the values expected",
    "inception": "the paper's table: Inception, BN-Baseline, BN-x5, BN-x30, BN-x5-Sigmoid on an image folder",
    "covariate-shift": "what batch norm does: drift of hidden distributions beside smoothness of the loss",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    studies = parser.add_subparsers(dest="study", metavar="study", required=True)
    for name, summary in STUDIES.items():
        one = studies.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        study = importlib.import_module(f"bench.study.{name.replace('-', '_')}")
        study.add_arguments(one)
        one.set_defaults(run_study=study.run)


def run(args: argparse.Namespace) -> int:
    return int(args.run_study(args))
