"""The command line: `packlight profile|plan|train|search|compress|cluster FILE`.

One file per command; each imports torch only when it runs, so that `packlight --help` is quick.
What a user can mend is told in a line or two on the error stream, with exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from packlight.cli import cluster, compress, plan, profile, search, train
from packlight.errors import PacklightError

__all__ = ["build_parser", "main"]

_COMMANDS = {
    "profile": profile, "plan": plan, "train": train, "search": search, "compress": compress,
    "cluster": cluster,
}

_EPILOG = """\
FILE is a Python file with plain functions:
  model() -> nn.Module
  loss(model, batch) -> scalar tensor
  optimizer(model) -> torch.optim.Optimizer
  batches(split="train") -> iterator of batches, endless for "train"
and, if it likes:
  tokens_per_batch(batch) -> int      shown as tokens per second
  sample(model) -> str                printed when training ends
  error(model, batch) -> number       what search and compress watch instead of the loss
  space(trial) -> dict                what search varies; the functions above get those of its
                                      values that they have arguments for
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Exit codes: 0 done, 2 something the user can mend (told on the error stream), 130 interrupted.
    """
    arguments = build_parser().parse_args(argv)
    arguments.command_line = list(sys.argv[1:] if argv is None else argv)
    try:
        return int(_COMMANDS[arguments.command].run(arguments))
    except PacklightError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="packlight",
        description="Train a PyTorch model inside a memory budget.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in _COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
    return parser
