"""The bars for the tail: a file fits in one sitting, a function on one screen, and tests keep up with the source."""

import ast

from benchmarks.size import ROOT, SOURCE, functions, n_lines, python_files

FILE_LINES, FUNCTION_LINES, TESTS_PER_SOURCE = 350, 60, 0.8


def test_every_file_fits_in_one_sitting():
    long = {str(path.relative_to(ROOT)): n_lines(path) for path in python_files(*SOURCE, "tests")}
    assert not {name: n for name, n in long.items() if n > FILE_LINES}


def test_every_function_fits_on_one_screen():
    long = [(path.name, name, n) for path in python_files(*SOURCE, "tests") for name, n in functions(path)]
    assert not [entry for entry in long if entry[2] > FUNCTION_LINES]


def test_tests_keep_up_with_the_source():
    source = sum(map(n_lines, python_files(*SOURCE)))
    tests = sum(map(n_lines, python_files("tests")))
    assert tests >= TESTS_PER_SOURCE * source, f"{tests} lines of tests for {source} lines of source"


def test_no_file_is_a_drawer_for_odds_and_ends():
    assert not [path for path in python_files(*SOURCE) if path.stem in ("utils", "helpers", "misc", "common")]


def test_nothing_unpickles_or_trusts_remote_code():
    for path in python_files(*SOURCE):
        text = path.read_text()
        assert "import pickle" not in text, path
        assert "trust_remote_code=True" not in text, path
        assert "weights_only=False" not in text, path


def test_no_except_swallows_everything():
    for path in python_files(*SOURCE):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                names = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else {"Exception"}
                assert not names & {"Exception", "BaseException"}, f"{path}:{node.lineno}"
