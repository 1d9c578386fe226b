"""Run experiments and print their reports: ``python -m benchmarks.experiments NAME [NAME ...]``, or ``all``."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.experiments.study import conduct, insert

NAMES = tuple(sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if path.stem != "study"))
RESULTS = Path("docs/results/experiments")


def main(argv: list[str] | None = None) -> None:
    """Run the experiments that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments", description=__doc__)
    parser.add_argument("names", nargs="+", choices=[*NAMES, "all"], metavar="NAME", help=", ".join([*NAMES, "all"]))
    parser.add_argument("--smoke", action="store_true", help="in small, into a temporary folder: does it work here?")
    parser.add_argument("--seeds", type=int, metavar="N", help="run seeds 0 to N - 1 (default: the experiment's own)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="number of processes (default: 2)")
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"folder of the results (default: {RESULTS})")
    options = parser.parse_args(argv)
    for name in ("seeds", "workers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.output or (Path(scratch) if options.smoke else RESULTS)
        for name in NAMES if "all" in options.names else options.names:
            text = conduct(name, options.seeds, options.smoke, options.device, options.workers, folder)
            print(f"\n{text}", flush=True)
            if folder == RESULTS:
                insert(Path("docs/experiments.md"), name, text)


if __name__ == "__main__":
    main()
