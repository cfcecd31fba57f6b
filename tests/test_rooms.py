"""The rooms of the code, who may enter which from where, and what a file of them may look like."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from places import ROOT

PACKAGE = ROOT / "ts_parallel"
HANDLERS = sorted((ROOT / "handlers").glob("*.py"))
FILES = sorted(PACKAGE.rglob("*.py")) + HANDLERS
MOST_LINES_OF_A_FUNCTION = 60

MOST_FILES_ON_A_FLOOR = 9

# Room → rooms that it may import beside itself, from top to bottom. `package` is ts_parallel/__init__.py, the public
# face. Below serving nothing may import config: those rooms take values.
MAY_IMPORT: dict[str, set[str]] = {
    "handlers": {"package", "serving"},
    "package": {"serving", "engine", "step_plan", "errors"},
    "cli": {
        "serving",
        "gateway",
        "engine",
        "runtime",
        "step_plan",
        "partition",
        "checkpoint",
        "topology",
        "config",
        "machine",
        "errors",
    },
    "serving": {
        "engine",
        "runtime",
        "step_plan",
        "partition",
        "checkpoint",
        "topology",
        "config",
        "machine",
        "long_json",
        "openapi",
        "errors",
    },
    "gateway": {"config", "machine", "long_json", "openapi", "errors"},
    "engine": {"step_plan", "errors"},
    "runtime": {"step_plan", "partition", "topology", "shared_memory", "native", "errors"},
    "step_plan": set(),
    "partition": {"checkpoint", "topology", "huge_pages", "errors"},
    "checkpoint": {"errors"},
    "topology": {"shared_memory", "errors"},
    "shared_memory": {"native"},
    "native": {"huge_pages"},
    "huge_pages": set(),
    "config": {"errors"},
    "machine": set(),
    "long_json": set(),
    "openapi": set(),
    "errors": set(),
}

# The same within rooms that have rooms of their own: `floor` are the files beside those. What a floor has above its
# rooms and what below them is not said here: `test_no_arrow_runs_back_up_inside_any_folder` sees to it.
MAY_IMPORT_WITHIN: dict[str, dict[str, set[str]]] = {
    "cli": {
        "client": {"server"},
        "doctor": {"server"},
        "server": {"floor"},
        "floor": {"client", "doctor", "server"},
    },
    "serving": {
        "floor": {"batch", "openai", "torchserve", "text"},
        "batch": {"text", "floor"},
        "openai": {"chat", "text", "floor"},
        "chat": {"text", "floor"},
        "torchserve": {"floor"},
        "text": set(),
    },
    "gateway": {
        "floor": {"upstream", "dialects", "batch", "page", "described"},
        "dialects": {"described", "upstream", "floor"},
        "batch": {"described", "upstream", "floor"},
        "described": {"upstream", "floor"},
        "page": set(),
        "upstream": {"floor"},
    },
    "cli.client": {"floor": {"talk"}, "talk": set()},
    "serving.openai": {
        "floor": {"about", "templates", "fields"},
        "about": {"fields", "floor"},
        "templates": {"fields"},
        "fields": set(),
    },
    "serving.chat": {"floor": {"calls"}, "calls": set()},
    "serving.batch": {
        "floor": {"texts", "images", "speech"},
        "texts": {"floor"},
        "images": {"floor"},
        "speech": {"floor"},
    },
    "serving.torchserve": {"floor": {"transports", "ends"}, "transports": {"floor"}, "ends": set()},
    "runtime": {"floor": {"backends"}, "batch": {"floor"}, "backends": set()},
    "runtime.backends": {
        "floor": {"native", "cuda", "torch"},
        "native": {"torch", "floor"},
        "cuda": {"torch", "floor"},
        "torch": {"floor"},
    },
    "runtime.backends.cuda": {"floor": {"kernels"}, "kernels": set()},
    "partition": {
        "floor": {"model", "tensor_parallel", "graph"},
        "model": {"tensor_parallel", "graph", "floor"},
        "tensor_parallel": {"floor"},
        "graph": {"floor"},
    },
    "checkpoint": {
        "floor": {"folders", "formats", "codes", "gguf"},
        "folders": {"gguf", "codes", "formats", "floor"},
        "conversion": {"formats", "floor"},
        "formats": {"floor"},
        "codes": {"floor"},
        "gguf": {"codes", "floor"},
    },
    "checkpoint.codes": {"floor": {"kinds"}, "kinds": {"floor"}},
}

# Who alone may import what: a question that is asked in one place.
ASKED_BY: dict[str, set[str]] = {
    "ts_parallel.native.HAS_KERNELS": set(),
    "ts_parallel.native.VARIANT": {"ts_parallel.runtime.backends.choose"},
    "ts_parallel.native.kernels": {"ts_parallel.runtime.backends.native", "ts_parallel.native"},
    "ts_parallel.runtime.backends.native": {"ts_parallel.runtime.backends"},
    "ts_parallel.runtime.backends.cuda": {"ts_parallel.runtime.backends"},
    "ts_parallel.runtime.backends.torch": {"ts_parallel.runtime.backends"},
}

# Room → libraries that it must not know, by import or by attribute.
KEEPS_OUT: dict[str, set[str]] = {
    "handlers": {"torch", "transformers"},
    "gateway": {"torch", "transformers", "numpy"},
    "engine": {"torch", "transformers"},
    "step_plan": {"torch.nn", "torch.distributed", "transformers"},
    "checkpoint": {"torch.nn", "torch.distributed", "transformers"},
    "topology": {"transformers"},
    "shared_memory": {"torch.nn", "transformers"},
    "config": {"torch", "transformers"},
    "machine": {"torch", "transformers"},
    "long_json": {"torch", "transformers", "numpy"},
    "openapi": {"torch", "transformers", "numpy"},
    "errors": {"torch", "transformers"},
}


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def room_of(module: str) -> str:
    """`ts_parallel.runtime.runner` → `runtime`."""
    first, *rest = module.split(".")
    if first != "ts_parallel":
        return first
    return rest[0] if rest and rest[0] in MAY_IMPORT else "package"


def part_of(module: str, room: str) -> str | None:
    """Which of a room's rooms a module stands in, or its floor; None outside the room."""
    inside = f"ts_parallel.{room}."
    if not module.startswith(inside):
        return None
    first = module.removeprefix(inside).split(".")[0]
    return first if first in MAY_IMPORT_WITHIN[room] else "floor"


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


def arrows() -> Iterator[tuple[str, str]]:
    """Module → module, of this package's files: `from a import b` is an arrow to `a.b` where that is a file."""
    known = {module_of(file) for file in FILES}
    for file in FILES:
        module = module_of(file)
        for name in imports(parse(file)):
            owner = name.rpartition(".")[0]
            to = next((own for own in (name, owner, f"{name}.__init__", f"{owner}.__init__") if own in known), module)
            if to != module:
                yield module, to


def test_every_file_stands_in_a_room_of_the_table() -> None:
    strangers = [
        str(file.relative_to(ROOT))
        for file in FILES
        if room_of(module_of(file)) == "package" and file != PACKAGE / "__init__.py"
    ]
    assert strangers == []
    assert {room_of(module_of(file)) for file in FILES} == MAY_IMPORT.keys()


def test_every_room_inside_a_room_is_in_its_table() -> None:
    for room, table in MAY_IMPORT_WITHIN.items():
        folder = PACKAGE.joinpath(*room.split("."))
        assert {file.parent.name for file in folder.glob("*/__init__.py")} | {"floor"} == table.keys(), room
    with_rooms = {file.parents[1] for file in PACKAGE.glob("*/**/__init__.py")} - {PACKAGE}
    assert {".".join(folder.relative_to(PACKAGE).parts) for folder in with_rooms} == MAY_IMPORT_WITHIN.keys()


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


def test_rooms_inside_a_room_import_only_what_its_table_allows() -> None:
    trespasses = []
    for module, to in arrows():
        for room, table in MAY_IMPORT_WITHIN.items():
            own, other = part_of(module, room), part_of(to, room)
            if own and other and own != other and other not in table[own]:
                trespasses.append(f"{module} imports {to}")
    assert trespasses == []


def test_no_arrow_runs_back_up_inside_any_folder() -> None:
    """Files and folders that lie side by side import each other in one direction, all that is in a folder as one."""
    every = list(arrows())
    for folder in sorted({file.parent for file in FILES if PACKAGE in file.parents}):
        inside = ".".join(folder.relative_to(ROOT).parts) + "."
        order: TopologicalSorter[str] = TopologicalSorter()
        for module, to in every:
            if module.startswith(inside) and to.startswith(inside):
                own, other = (name.removeprefix(inside).split(".")[0] for name in (module, to))
                if own != other:
                    order.add(own, other)
        order.prepare()  # raises where there is a circle, and names it


def test_no_folder_has_more_files_on_one_floor_than_one_can_take_in() -> None:
    kinds = {".py", ".pyi", ".c", ".h", ".xml", ".md", ""}
    pages = {"README.md"}  # of a folder, which say what is there
    files = [file for top in (PACKAGE, ROOT / "handlers", ROOT / "examples") for file in top.rglob("*")]
    counts = Counter(
        file.parent for file in files if file.is_file() and file.suffix in kinds and file.name not in pages
    )
    assert {str(folder): count for folder, count in counts.items() if count > MOST_FILES_ON_A_FLOOR} == {}


def test_no_two_files_of_tests_have_one_name() -> None:
    """Which pytest would import as one module."""
    names = Counter(file.name for file in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_question_that_is_asked_in_one_place_is_asked_there_alone() -> None:
    others = [
        f"{module_of(file)} asks for {name}"
        for file in FILES
        for name in (*imports(parse(file)), *attributes(parse(file)))
        for asked, askers in ASKED_BY.items()
        if is_within(name, asked) and not any(is_within(module_of(file), asker) for asker in askers)
    ]
    assert others == []


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
