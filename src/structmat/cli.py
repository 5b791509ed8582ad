"""The command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from structmat import _checks
from structmat._version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``structmat``.

    Args:
        arguments: The words after the command's name; None for those of the process.

    Returns:
        The exit status: 0, 1 for an error that was explained on standard error, 130 for an interrupt.
    """
    parser = argparse.ArgumentParser(prog="structmat", description="Structured matrices for efficient deep learning.")
    parser.add_argument("--version", action="version", version=f"structmat {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="train a small Vision Transformer on digits and compress it with every structure",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--keep", type=float, default=0.3, help="share of the linear layers' parameters to keep, at most")
    demo.add_argument("--formats", nargs="+", metavar="NAME", help="structures to compare; all when not given")
    demo.add_argument("--seeds", type=int, default=1, help="how many seeds to average over")
    demo.add_argument("--out", type=Path, default=Path("structmat-demo"), help="folder for pictures and results")
    demo.add_argument("--quick", action="store_true", help="fewer epochs and one budget: a look, not a comparison")
    demo.set_defaults(run=_demo)

    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, TypeError, ImportError, OSError) as error:
        print(f"structmat: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("structmat: interrupted", file=sys.stderr)
        return 130


def _demo(options: argparse.Namespace) -> int:
    from structmat.demo import STRUCTURES, Settings, run_demo  # noqa: PLC0415 - the demo's own dependencies

    formats = tuple(dict.fromkeys(options.formats or STRUCTURES))
    for name in formats:
        _checks.one_of(name, STRUCTURES, "--formats")
    keep = _checks.fraction(options.keep, "--keep")
    run_demo(Settings(keep, formats, _checks.positive_int(options.seeds, "--seeds"), options.out, options.quick))
    return 0
