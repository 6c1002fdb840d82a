"""Pretrain a masked autoencoder on ultrasound shards.

    python -m usfmae_jax.main --config=pretrain:demo
    python -m usfmae_jax.main --config=pretrain:tiny --config.data.path=data/mine
    python -m usfmae_jax.main --config=pretrain --config.data.path='data/openus46/*'
    python -m usfmae_jax.main --config=pretrain --compile_for=v5e:4x4    # does it fit there?

Run the same command again to continue an interrupted run. Exit codes: 0 done; 2 bad input or config;
75 stopped by SIGTERM or Ctrl-C, run it again to continue; 1 anything else, such as a NaN loss.
"""

import functools
from typing import Any

import ml_collections

from usfmae_jax import cli


def main(config: ml_collections.ConfigDict, workdir: str, flags: Any) -> int:
    """Joins the processes of the job and runs the loop; returns the exit code."""
    from usfmae_jax.pretraining.loop import compile_for, pretrain  # only once the flags are known to be valid

    if flags.compile_for:
        return cli.compile_for(functools.partial(compile_for, config), flags.compile_for, workdir)
    cli.start(flags)
    with cli.alone_in(workdir):
        return cli.train(lambda: pretrain(config, workdir), f"{workdir}/checkpoints")


def run() -> None:
    """The command's entry point; ends the process."""
    cli.run(__doc__, "pretrain", main, trains=True)


if __name__ == "__main__":
    run()
