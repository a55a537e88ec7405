"""Makes of a learned augmenter a program that JAX runs without this package, on CPU, GPU and TPU.

It writes the program, StableHLO, and a JSON file beside it that names what it takes and does.

  python -m experiments.export --augmenter=runs/learn-quick/augmenter.npz --to=augmenter.stablehlo
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import cli
from maxent_aug import export_augmenter


def run(arguments: Sequence[str]) -> None:
    """The command line; exit codes as in `cli.run`."""
    parser = cli.Parser("python -m experiments.export", __doc__)
    parser.add_argument("--augmenter", type=Path, required=True, help="augmenter.npz of a run")
    parser.add_argument("--to", type=Path, required=True, help="NAME.stablehlo")
    options = parser.parse_args(arguments)
    if options.to.is_dir():
        parser.error(f"--to: {options.to} is a folder; choose another name")
    if not options.to.parent.is_dir():
        parser.error(f"--to: the folder {options.to.parent} does not exist; create it")
    try:
        about = export_augmenter(options.augmenter, options.to)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        name = str(error.filename2 or error.filename or options.to).removesuffix(".tmp")
        parser.error(f"{name}: {error.strerror}")
    beside = options.to.with_suffix(".json")
    print(f"{options.to} for {', '.join(about['platforms'])}; what it takes and does: {beside}")


if __name__ == "__main__":
    run(sys.argv[1:])
