"""Commands whose bad input is one line and exit code 2."""

import argparse
import sys
from typing import NoReturn

import torch


def fail(error: object, code: int) -> NoReturn:
    print("samebit: error:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(message, 2)

    def require_card(self) -> None:
        """For --device cuda."""
        if not torch.cuda.is_available():
            self.error("--device cuda: there is no CUDA device")
