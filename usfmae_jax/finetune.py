"""Fine-tune a model on labelled shards, for every fold, seed and label fraction, and test it.

    python -m usfmae_jax.finetune --config=finetune:busbra --config.init=runs/pretrain-tiny
    python -m usfmae_jax.finetune --config=finetune:folder --config.data.path=data/mine
    python -m usfmae_jax.finetune --config=segment:folder --config.data.path=data/mine

Run the same command again to continue an interrupted run. Exit codes: 0 done; 2 bad input or config;
75 stopped by SIGTERM or Ctrl-C, run it again to continue; 1 anything else, such as a NaN loss.
"""

import functools
from typing import Any

import ml_collections

from usfmae_jax import cli


def main(config: ml_collections.ConfigDict, workdir: str, flags: Any) -> int:
    """Joins the processes of the job and runs the loop; returns the exit code."""
    from usfmae_jax.finetuning.loop import compile_for, finetune  # only once the flags are known to be valid

    if flags.compile_for:
        return cli.compile_for(functools.partial(compile_for, config), flags.compile_for, workdir)
    cli.start(flags)
    with cli.alone_in(workdir):
        return cli.train(lambda: finetune(config, workdir, cli.command("usfmae_jax.finetune")), f"{workdir}/members")


def run() -> None:
    """The command's entry point; ends the process."""
    cli.run(__doc__, "finetune", main, trains=True)


if __name__ == "__main__":
    run()
