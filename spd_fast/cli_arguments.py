"""How the commands of `spd-fast` are described to argparse."""

import argparse


def positive(text: str) -> int:
    value = int(text) if text.lstrip("-").isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return value


def seed(text: str) -> int:
    value = int(text) if text.isdigit() else -1
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number in 0..2^63 - 1, got {text}")
    return value


def command(commands, name: str, run, help: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help,
        description=help,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def given_by(options: argparse.Namespace) -> dict:
    """The arguments of a command."""
    return {k: v for k, v in vars(options).items() if k not in ("command", "run")}
