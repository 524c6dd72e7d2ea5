"""`python -m rl.report OUT_DIR [OTHER]`: writes the page of a run, or of two runs beside each other, from their files."""

import sys
from collections.abc import Sequence
from pathlib import Path

from kernels.host.command import Parser, fail, interruptible
from rl.report import ReportError, write_report


def main(arguments: Sequence[str]) -> None:
    """Writes OUT_DIR/report.html, or with OTHER OUT_DIR/report-against-OTHER.html, and prints its path."""
    parser = Parser(prog="rl.report", description=(__doc__ or "").partition(":")[2].strip())
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="the folder of a run, finished or not")
    parser.add_argument("other", type=Path, metavar="OTHER", nargs="?", help="of another run, to draw beside it")
    args = parser.parse_args(arguments)
    try:
        print(write_report(args.out_dir, args.other))
    except ReportError as error:
        fail(error, 2)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}", 2)


if __name__ == "__main__":
    with interruptible():
        main(sys.argv[1:])
