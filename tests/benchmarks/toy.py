"""Sides that measure nothing, for the tests of `benchmarks.alternate`."""

import argparse
import os
import sys

from benchmarks import alternate


def prepare(side):
    print("what a library says on its way")
    if side == "broken":
        raise ImportError("no such library")
    rounds = iter(range(1, 10))

    def work():
        number = next(rounds)
        if side == "tired" and number == 2:
            os.kill(os.getpid(), 9)
        return {"speed": (4.0 if side == "ours" else 2.0) * number, "from": os.environ.get("TOY", "")}

    return {"ready": side}, work


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    alternate.add_arguments(parser, rounds=3)
    side = parser.parse_args().side
    alternate.serve(lambda: prepare(side))
    sys.exit(0)
