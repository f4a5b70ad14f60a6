"""python -m benchmarks.plots [RESULTS.json ...]"""

import sys
from pathlib import Path

from benchmarks.plots import draw


def main() -> int:
    paths = [Path(argument) for argument in sys.argv[1:]]
    paths = paths or [Path(__file__).parent.parent / "results" / "latest.json"]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        print(f"no such file: {', '.join(missing)}; `make bench` writes benchmarks/results/latest.json")
        return 2
    for png in draw(paths):
        print(png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
