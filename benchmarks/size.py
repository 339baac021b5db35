"""The size of the tail: lines of each room, its longest file and longest function, and tests per line of source.

python -m benchmarks.size
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ("cache_spec", "harvest", "train", "evaluate", "completions", "benchmarks")
TESTS = "tests"


def python_files(*folders: str) -> list[Path]:
    """Every Python file under the folders of the checkout."""
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def n_lines(path: Path) -> int:
    """Lines of a file, blank ones and comments too."""
    return len(path.read_text().splitlines())


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and number of lines of every function in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def main() -> None:
    """Print the table."""
    print(f"{'room':<12}{'files':>6}{'lines':>8}   {'longest file':<42}longest function")
    total = {}
    for room in (*SOURCE, TESTS):
        paths = python_files(room)
        total[room] = sum(map(n_lines, paths))
        file = max(paths, key=n_lines)
        n, name, home = max((n, name, path.name) for path in paths for name, n in functions(path))
        longest = f"{file.relative_to(ROOT)} {n_lines(file)}"
        print(f"{room:<12}{len(paths):>6}{total[room]:>8}   {longest:<42}{home}:{name} {n}")
    source = sum(total[room] for room in SOURCE)
    print(f"tests : source = {total[TESTS]:,} : {source:,} = {total[TESTS] / source:.2f}")


if __name__ == "__main__":
    main()
