"""Every result of `benchmarks/results` as Markdown, so that no table is typed by hand.

python -m benchmarks.tables [NAME ...]
"""

import json
import sys

from benchmarks.harness import RESULTS, markdown


def main(names: list[str]) -> None:
    for path in sorted(RESULTS.glob("*.json")):
        if not names or path.stem in names:
            print(markdown(json.loads(path.read_text())), end="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
