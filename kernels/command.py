"""Commands whose bad input is one line and exit code 2."""

import argparse
import sys
from typing import NoReturn


def fail(error: object, code: int) -> NoReturn:
    print("samebit: error:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(message, 2)
