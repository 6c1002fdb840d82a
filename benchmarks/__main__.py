"""Runs the comparisons listed in `ROWS`, one after another, and collects their tables.

    python -m benchmarks [--only=step-base,start] [--ultrasound=DIR] [--quick] [--list]

Writes `NAME.json` for each, and `tables.md`, to `--output`. Finished comparisons are not repeated, so that the same
command resumes after an interruption. A comparison that fails is reported and skipped.
"""

import argparse
import json
import os
import pathlib
import shlex
import subprocess
import sys

from benchmarks import alternate

#: Module and arguments by name; {png} stands for BUS-BRA's images, {shards} for shards of it.
ROWS = {
    "input-grey": "input_pipeline {png}",
    "input-rgb": "input_pipeline {png} --rgb=560x470",
    "step-base": "train_step --model=base --batch=16 --rounds=4 --sides={full}",
    "step-base-cross": "train_step --model=base --batch=16 --rounds=4 --sides={cross}",  # memory for both is rare
    "step-ti128": "train_step --model=ti128 --batch=256",
    "step-tiny": "train_step --model=tiny --batch=64",
    "step-bfloat16": "train_step --model=ti128 --batch=64 --dtypes=float32,bfloat16 --sides={plain} --rounds=4",
    "memory-tiny": "train_step --model=tiny --batch=64 --allocators --rounds=3",
    "memory-ti128": "train_step --model=ti128 --batch=256 --allocators --warm=6 --rounds=3",
    "memory-base": "train_step --model=base --batch=16 --allocators --rounds=2",
    "start": "start",
    "demo": "start --demo",
    "features-base": "features {shards} --model=base --images=64 --batch=32",
    "features-tiny": "features {shards} --model=tiny",
    "finetune-tiny": "finetune {shards} --model=tiny --epochs=1",
}


def main() -> None:
    """Runs the requested comparisons that are not finished yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names, separated by commas; default: all")
    parser.add_argument("--list", action="store_true", help="say what there is, and the commands")
    parser.add_argument(
        "--ultrasound",
        type=pathlib.Path,
        default=os.environ.get("ULTRASOUND_DATA"),
        help="folder that has BUS-BRA as it is downloaded; default: $ULTRASOUND_DATA, or simulated frames",
    )
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/benchmarks"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see whether they work")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(ROWS)
    unknown = set(names) - set(ROWS)
    if unknown:
        sys.exit(f"--only: no {', '.join(sorted(unknown))} among {', '.join(ROWS)}")
    raw = args.ultrasound / "BUS-BRA" if args.ultrasound and (args.ultrasound / "BUS-BRA").is_dir() else None
    shards = args.output / "data" / ("bus_bra" if raw else "phantom")
    sides = {
        "plain": "ours;ours, bfloat16;transformers;transformers, bfloat16",
        "full": "ours;transformers;transformers, huge pages;transformers, compiled",
        "cross": "ours, cross decoder;transformers;transformers, huge pages",
    }
    known = sides | {"png": f"--png={raw / 'Images'}" if raw else "", "shards": f"--data={shards}"}
    for name in names:
        command = shlex.split(ROWS[name].format_map({key: shlex.quote(value) for key, value in known.items()}))
        command = [part for part in command if part] + ["--quick"] * args.quick
        if args.list:
            print(f"{name:16} python -m benchmarks.{shlex.join(command)}")
            continue
        file = args.output / f"{name}.json"
        if file.exists():
            alternate.tell(f"{name}: is in {file} already")
            continue
        if "{shards}" in ROWS[name] and not shards.exists():
            build(shards.parent, raw)
        alternate.tell(f"--- {name}: python -m benchmarks.{shlex.join(command)}")
        subprocess.run([sys.executable, "-m", f"benchmarks.{command[0]}", *command[1:], f"--json={file}"], check=False)
    found = {name: args.output / f"{name}.json" for name in ROWS}
    for name, file in found.items() if not args.list else ():
        if name in names and not file.exists():
            alternate.tell(f"{name}: failed, see above")
    read = [json.loads(file.read_text()) for file in found.values() if file.exists()]
    if read and not args.list:
        tables = args.output / "tables.md"
        tables.write_text("\n".join(f"{one['title']}, {one['date']}\n\n{one['table']}\n" for one in read))
        alternate.tell(f"all tables: {tables}")


def build(output: pathlib.Path, raw: pathlib.Path | None) -> None:
    """Builds labelled shards of BUS-BRA or, without it, of phantoms."""
    alternate.tell("building labelled shards ...")
    how = ["--dataset=bus_bra", f"--input={raw}"] if raw else ["--dataset=phantom"]
    done = subprocess.run([sys.executable, "-m", "data_prep.build", f"--output={output}", *how], check=False)
    if done.returncode:
        sys.exit("labelled shards could not be built, see above")


if __name__ == "__main__":
    main()
