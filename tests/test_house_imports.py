"""Imports run one way: the plan of the house, read from every file's imports."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("cache_spec", "harvest", "train", "evaluate")
MAY_IMPORT = {
    "cache_spec": ("cache_spec",),
    "harvest": ("harvest", "cache_spec"),
    "train": ("train", "cache_spec"),
    "evaluate": ("evaluate", "train", "cache_spec", "harvest.model", "harvest.embedded"),
}
MAY_NOT_IMPORT = {
    "cache_spec": ("torch", "transformers", "datasets", "safetensors"),
    "train": ("transformers", "datasets", "tokenizers", "huggingface_hub"),
}


def files(*rooms: str) -> list[Path]:
    return [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]


def imports(path: Path) -> list[str]:
    """Every module that a file imports, wherever in the file, with `from a import b` as both `a` and `a.b`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the room"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def within(module: str, allowed: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_through_its_doors(room):
    assert files(room), f"{room} is empty"
    for path in files(room):
        for module in imports(path):
            if module.split(".")[0] in ROOMS:
                assert within(module, MAY_IMPORT[room]), f"{path.relative_to(ROOT)} imports {module}"
            assert not within(module, MAY_NOT_IMPORT.get(room, ())), f"{path.relative_to(ROOT)} imports {module}"


def test_the_rule_itself_catches_a_wrong_import():
    assert within("harvest.model.load_model", MAY_IMPORT["evaluate"])
    assert not within("harvest.text", MAY_IMPORT["evaluate"])
    assert not within("evaluate.report", MAY_IMPORT["train"])
    assert not within("harvest.models", MAY_IMPORT["evaluate"])


def test_nothing_inside_a_package_imports_from_its_own_init():
    for path in files(*ROOMS):
        package = ".".join(path.relative_to(ROOT).parts[:-1])
        if path.name == "__init__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == package:
                taken = [alias.name for alias in node.names if not module_exists(f"{package}.{alias.name}")]
                assert not taken, f"{path.relative_to(ROOT)} takes {taken} from its own __init__"


def module_exists(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def test_no_import_cycles():
    graph: dict[str, set[str]] = {}
    for path in files(*ROOMS):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        targets = set()
        for module in imports(path):
            while module and module.split(".")[0] in ROOMS and not is_file(module):
                module = module.rpartition(".")[0]
            if module.split(".")[0] in ROOMS and module != name:
                targets.add(module)
        graph[name] = targets
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for target in graph.get(name, ()):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def is_file(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def test_caches_and_runs_ask_the_hub_through_one_module_and_only_when_they_must():
    asking = [path for path in files("cache_spec", "train") if "huggingface_hub" in str(imports(path))]
    assert [str(path.relative_to(ROOT)) for path in asking] == ["cache_spec/hub.py"]
    at_the_top = [
        node for node in ast.parse(asking[0].read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert "huggingface_hub" not in " ".join(map(ast.unparse, at_the_top)), "importing it takes a second"
