"""The rooms of the code, who may enter which from where, and what a file of them may look like."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ts_parallel"
HANDLERS = sorted((ROOT / "handlers").glob("*.py"))
FILES = sorted(PACKAGE.rglob("*.py")) + HANDLERS
MOST_LINES_OF_A_FUNCTION = 60

# Room → rooms that it may import beside itself, from top to bottom.
# `step` is runtime/step.py, the data that engine and runtime exchange; `package` is ts_parallel/__init__.py.
# Below serving nothing may import config: those rooms take values.
MAY_IMPORT: dict[str, set[str]] = {
    "handlers": {"serving"},
    "cli": {
        "serving",
        "engine",
        "runtime",
        "step",
        "partition",
        "checkpoint",
        "topology",
        "config",
        "errors",
        "package",
    },
    "serving": {"engine", "runtime", "step", "partition", "checkpoint", "topology", "config", "errors"},
    "engine": {"step", "errors"},
    "runtime": {"step", "partition", "topology", "shared_memory", "native", "errors"},
    "step": set(),
    "partition": {"checkpoint", "topology", "native", "errors"},
    "checkpoint": {"native", "errors"},
    "topology": {"shared_memory", "native", "errors"},
    "shared_memory": {"native"},
    "config": {"errors"},
    "errors": set(),
    "package": set(),
    "native": set(),
}

# Room → libraries that it must not know, by import or by attribute.
KEEPS_OUT: dict[str, set[str]] = {
    "handlers": {"torch", "transformers"},
    "engine": {"torch", "transformers"},
    "step": {"torch.nn", "torch.distributed", "transformers"},
    "checkpoint": {"torch.nn", "torch.distributed", "transformers"},
    "topology": {"transformers"},
    "shared_memory": {"torch.nn", "transformers"},
    "config": {"torch", "transformers"},
    "errors": {"torch", "transformers"},
}


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def room_of(module: str) -> str:
    """`ts_parallel.runtime.runner` → `runtime`."""
    if is_within(module, "ts_parallel.runtime.step"):
        return "step"
    first, *rest = module.split(".")
    if first != "ts_parallel":
        return first
    return rest[0] if rest and rest[0] in MAY_IMPORT else "package"


def is_within(name: str, module: str) -> bool:
    return f"{name}.".startswith(f"{module}.")


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def imports(tree: ast.AST) -> Iterator[str]:
    """Every imported name in full, `from a import b` as `a.b`, wherever in the file it is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names)


def attributes(tree: ast.AST) -> Iterator[str]:
    yield from (ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute))


def test_every_file_stands_in_a_room_of_the_table() -> None:
    strangers = [
        str(file.relative_to(ROOT))
        for file in FILES
        if room_of(module_of(file)) == "package" and file != PACKAGE / "__init__.py"
    ]
    assert strangers == []
    assert {room_of(module_of(file)) for file in FILES} == MAY_IMPORT.keys()


def test_table_goes_only_downwards() -> None:
    rooms = list(MAY_IMPORT)
    upwards = [(room, other) for room in rooms for other in MAY_IMPORT[room] if rooms.index(other) <= rooms.index(room)]
    assert upwards == []


def test_rooms_import_only_what_the_table_allows() -> None:
    trespasses = []
    for file in FILES:
        room = room_of(module_of(file))
        for name in imports(parse(file)):
            if is_within(name, "ts_parallel") and room_of(name) not in MAY_IMPORT[room] | {room}:
                trespasses.append(f"{file.relative_to(ROOT)} ({room}) imports {name} ({room_of(name)})")
    assert trespasses == []


def test_imports_are_absolute_so_that_the_table_sees_them() -> None:
    assert [str(file) for file in FILES if any(name.startswith(".") for name in imports(parse(file)))] == []


def test_rooms_know_no_library_that_they_keep_out() -> None:
    known = []
    for file in FILES:
        tree = parse(file)
        for library in KEEPS_OUT.get(room_of(module_of(file)), set()):
            names = [name for name in (*imports(tree), *attributes(tree)) if is_within(name, library)]
            known += [f"{file.relative_to(ROOT)} knows {name}" for name in names]
    assert known == []


def test_handler_files_hold_no_decision() -> None:
    assert HANDLERS
    decisions = (ast.If, ast.IfExp, ast.Match)
    assert [file.name for file in HANDLERS if any(isinstance(node, decisions) for node in ast.walk(parse(file)))] == []


def test_every_module_says_what_it_does() -> None:
    assert [str(file.relative_to(ROOT)) for file in FILES if not ast.get_docstring(parse(file))] == []


def test_no_function_is_longer_than_a_screen() -> None:
    long = []
    for file in FILES:
        for node in ast.walk(parse(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if num_lines > MOST_LINES_OF_A_FUNCTION:
                    long.append(f"{file.relative_to(ROOT)}: {node.name} has {num_lines} lines")
    assert long == []
