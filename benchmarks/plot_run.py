"""Draws a run's loss and probe scores from its `metrics.jsonl`.

python -m benchmarks.plot_run runs/pretrain-tiny --output=curves.png
"""

import argparse
import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SCORES = {
    "probe/logistic_auroc": "logistic regression",
    "probe/knn_auroc": "k-NN",
}


def plot(workdir: pathlib.Path, output: pathlib.Path, title: str) -> None:
    """Writes a PNG with the loss on the left and, if the run was probed, AUROC on the right."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    probed = [line for line in lines if "probe/rankme" in line]
    figure, axes = plt.subplots(1, 2 if probed else 1, figsize=(9 if probed else 5, 3.2), squeeze=False)
    axes[0, 0].plot(*zip(*losses, strict=True), color="#1f5f8b", linewidth=1.2)
    axes[0, 0].set(xlabel="step", ylabel="loss (hidden patches, standardised)", title=title)
    if probed:
        steps = [line["step"] for line in probed]
        for (name, label), colour in zip(SCORES.items(), ("#b5442e", "#d99a2b"), strict=True):
            axes[0, 1].plot(steps, [line[name] for line in probed], "o-", color=colour, markersize=3, label=label)
        axes[0, 1].set(xlabel="step", ylabel="AUROC (5 folds by patient)", title="frozen features")
        axes[0, 1].legend(frameon=False)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(output, dpi=130)


def main() -> None:
    """Reads the arguments and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("curves.png"))
    parser.add_argument("--title", default="pretraining")
    args = parser.parse_args()
    plot(args.workdir, args.output, args.title)


if __name__ == "__main__":
    main()
