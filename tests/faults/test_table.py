"""The table in README.md: every id once, every test there."""

import ast
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in Path(__file__).with_name("README.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("|") and not line.startswith(("| id |", "|---"))
]


def test_every_row_has_an_id_of_its_own_and_all_its_cells():
    assert len(ROWS) > 50
    assert [row for row in ROWS if len(row) != 4 or not all(row)] == []
    assert [name for name, count in Counter(row[0] for row in ROWS).items() if count > 1] == []


def test_every_test_that_is_named_exists():
    """And is marked slow where the table says so."""
    there: dict[str, dict[str, bool]] = {}
    wrong = []
    for row in ROWS:
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row[3])
        assert named, row
        for path, test in named:
            if path not in there:
                nodes = ast.walk(ast.parse((ROOT / path).read_text())) if (ROOT / path).exists() else ()
                there[path] = {
                    node.name: any("slow" in ast.unparse(mark) for mark in node.decorator_list)
                    for node in nodes
                    if isinstance(node, ast.FunctionDef)
                }
            wrong += [(row[0], path, test)] * (there[path].get(test) is not row[3].endswith("(slow)"))
    assert wrong == []
