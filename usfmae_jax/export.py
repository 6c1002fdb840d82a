"""Write the encoder of a run, finished or not, as safetensors with its architecture and preprocessing.

python -m usfmae_jax.export --checkpoint=runs/pretrain-tiny
python -m usfmae_jax.export --checkpoint=runs/pretrain-tiny --step=1500 --output=encoder-1500
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence

from usfmae_jax.errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the door; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m usfmae_jax.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, metavar="WORKDIR", help="of the run")
    parser.add_argument("--step", type=int, help="default: the newest checkpoint")
    parser.add_argument("--format", default="safetensors", choices=["safetensors"], help="default: %(default)s")
    parser.add_argument("--output", metavar="DIR", help="default: WORKDIR/encoder")
    args = parser.parse_args(argv)
    try:
        export(args.checkpoint, args.output or os.path.join(args.checkpoint, "encoder"), args.step)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def export(workdir: str, output: str, step: int | None = None) -> None:
    """Exports one checkpoint of a run, the newest unless a step is given.

    Raises:
      InputError: no run there, or no such checkpoint.
    """
    import ml_collections  # after the flags are known to be right
    from etils import epath

    from usfmae_jax.training import checkpoints, setup
    from usfmae_jax.training.mesh import make_mesh
    from usfmae_jax.training.pretrain import export as write
    from usfmae_jax.training.state import abstract_state

    try:
        config = ml_collections.ConfigDict(json.loads((epath.Path(workdir) / "config.json").read_text()))
    except (OSError, ValueError) as error:
        raise InputError(
            f"--checkpoint={workdir} is not the workdir of a run: it has no readable config.json"
        ) from error
    saver = checkpoints.open_checkpoints(setup.make_workdir(workdir) + "/checkpoints", read_only=True)
    steps = [checkpoint.step for checkpoint in saver.checkpoints]
    if not steps or (step is not None and step not in steps):
        raise InputError(f"{workdir} has the checkpoints {steps}" + (f", not {step}" if step is not None else ""))
    step = steps[-1] if step is None else step
    make_model = setup.model_maker(config)
    optimizer = setup.make_optimizer(config, total_steps=1)[1]
    state = checkpoints.restore(saver, abstract_state(make_model, optimizer, make_mesh(), config.seed), step)
    write(config, state["params"]["encoder"], workdir, output, step)


if __name__ == "__main__":
    sys.exit(main())
