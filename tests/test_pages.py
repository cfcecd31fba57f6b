"""What the pages say is there: links, files, keys and options; and README's commands work as they stand."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import psutil
import pytest
import typer
import yaml
from deployment import wait_until
from http_client import get
from places import ROOT
from pydantic import BaseModel
from typer.core import TyperGroup

from ts_parallel.cli.main import COMMANDS, app
from ts_parallel.cli.server.torchserve import free_ports
from ts_parallel.config import BatchConfig, HandlerConfig, ModelConfig, Seq2SeqConfig

README = ROOT / "README.md"
KEYS = ROOT / "model-configs" / "README.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
SOURCES = (".py", ".pyi", ".c", ".h", ".yaml", ".yml", ".md", ".png", ".toml")
# Files that are not there: TorchServe and archives bring some, and one is never to be.
OTHERS_FILES = {"metrics.yaml", "model-config.yaml", "utils.py"}
# Options that pages name of programs which are not ours.
OTHERS_OPTIONS = {"--disable-token-auth", "--extra-files"}


@cache
def tracked() -> frozenset[str]:
    """The files that a checkout has, and those that are about to be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return frozenset(name for name in names if (ROOT / name).exists())


@cache
def places() -> frozenset[str]:
    """Those files, and the folders that they are in."""
    folders = {str(folder) for name in tracked() for folder in Path(name).parents}
    return tracked() | folders


PAGES = sorted(name for name in tracked() if name.endswith(".md"))


def without_code(text: str) -> str:
    """Blocks are gone, and so is what is indented like one at the beginning of a paragraph."""
    text = FENCE.sub("", text)
    return re.sub(r"(?<=\n\n)(?: {4}.*\n)+", "", text)


def blocks(text: str) -> Iterator[str]:
    yield from (match[2] for match in FENCE.finditer(text))
    yield from re.findall(r"(?<=\n\n)(?: {4}.*\n)+", FENCE.sub("", text))


def commands(text: str) -> Iterator[str]:
    """The lines of its blocks, each with those that continue it and without its comment."""
    for block in blocks(text):
        for line in block.replace("\\\n", " ").splitlines():
            yield re.sub(r"\s#.*", "", line).strip()


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    found = set()
    for title in re.findall(r"^#+ (.+)$", without_code(page.read_text()), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
        found.add(re.sub(r"[^\w\- ]", "", words).replace(" ", "-"))
    return found


@pytest.mark.parametrize("name", PAGES)
def test_every_relative_link_of_a_page_leads_somewhere(name: str) -> None:
    page, broken = ROOT / name, []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        is_there = target == ROOT or (ROOT in target.parents and str(target.relative_to(ROOT)) in places())
        if not is_there or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def is_in_checkout(path: str, page: Path) -> bool:
    """From the page's folder, the root, the package or its tests; `file.py:name` is a function or class of it."""
    path, _, name = path.partition(":")
    for base in (page.parent, ROOT, ROOT / "ts_parallel", ROOT / "tests"):
        found = (base / path).resolve()
        if ROOT in found.parents and str(found.relative_to(ROOT)) in places():
            last = name.rpartition(".")[2]
            return not name or re.search(rf"^\s*(def|class) {last}\b", found.read_text(), re.MULTILINE) is not None
    return "/" not in path and not name and any(Path(known).name == path for known in tracked())


def looks_like_a_file(text: str, page: Path) -> bool:
    path = text.partition(":")[0]
    if not re.fullmatch(r"\.?\w[\w./-]*(:[\w.]+)?", text) or text in OTHERS_FILES or path.startswith("build/"):
        return False
    if path.endswith(SOURCES):
        return True
    first, _, rest = path.partition("/")
    return bool(rest) and is_in_checkout(first, page)


@pytest.mark.parametrize("name", PAGES)
def test_every_file_of_this_repository_that_a_page_names_is_there(name: str) -> None:
    page = ROOT / name
    text = re.sub(r"`[^`]+` →", "", without_code(page.read_text()))  # what has moved is named where it was
    named = [own for own in INLINE.findall(text) if looks_like_a_file(own, page)]
    assert [own for own in named if not is_in_checkout(own, page)] == []


def options_of_commands() -> dict[str, set[str]]:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    return {
        name: {"--help", *(option for own in command.params for option in (*own.opts, *own.secondary_opts))}
        for name, command in ((name, group.get_command(None, name)) for name in COMMANDS)
    }


@pytest.mark.parametrize("name", PAGES)
def test_every_option_of_the_command_that_a_page_names_exists(name: str) -> None:
    text, known, wrong = (ROOT / name).read_text(), options_of_commands(), []
    inline = INLINE.findall(without_code(text))
    for line in (*commands(text), *inline):
        for words in re.findall(r"ts-parallel ((?!COMMAND)[a-z]+\b.*)", line):
            command, options = words.split()[0], re.findall(r"(?<!\S)--[a-z][a-z-]*", words)
            wrong += [f"{command} {option}" for option in options if option not in known.get(command, ())]
            if command not in known:
                wrong.append(command)
    if name == "ts_parallel/cli/README.md":  # which names no other program's
        every = set().union(*known.values())
        found = [option for own in inline for option in re.findall(r"^--[a-z][a-z-]*", own)]
        wrong += [option for option in found if option not in every | OTHERS_OPTIONS]
    assert wrong == []


def test_page_of_the_command_names_every_command() -> None:
    page = (ROOT / "ts_parallel" / "cli" / "README.md").read_text()
    assert set(re.findall(r"^\| \[`([a-z]+)`\]", page, re.MULTILINE)) == options_of_commands().keys()


def rows(section: str) -> dict[str, str]:
    """Key → default, of the tables of keys in a section of the page of keys."""
    text = KEYS.read_text()
    start = text.index(f"\n### {section}\n")
    body = re.split(r"\n##", text[start + 5 :])[0]
    return {key: cells.split(" | ")[-1] for key, cells in re.findall(r"^\| `(\w+)` \| (.+) \|$", body, re.MULTILINE)}


SECTIONS: dict[str, tuple[set[str], tuple[type[BaseModel], ...]]] = {
    "For every handler": (set(), (ModelConfig,)),
    "For text generation": (set(ModelConfig.model_fields), (HandlerConfig,)),
    "For batch inference": (set(ModelConfig.model_fields), (BatchConfig, Seq2SeqConfig)),
}


@pytest.mark.parametrize("section", SECTIONS)
def test_page_of_keys_has_a_row_for_each_and_no_other(section: str) -> None:
    shared, kinds = SECTIONS[section]
    assert rows(section).keys() == {key for kind in kinds for key in kind.model_fields} - shared


@pytest.mark.parametrize("section", SECTIONS)
def test_defaults_of_the_page_of_keys_are_those_of_the_classes(section: str) -> None:
    fields = {key: field for kind in SECTIONS[section][1] for key, field in kind.model_fields.items()}
    told = {key: yaml.safe_load(default) for key, default in rows(section).items() if re.fullmatch(r"[\w.]+", default)}
    numbers = {key: value for key, value in told.items() if isinstance(value, (bool, int, float))}
    assert numbers == {key: fields[key].default for key in numbers}
    assert numbers


def readme_blocks(language: str) -> list[str]:
    return [block for kind, block in FENCE.findall(README.read_text()) if kind == language]


def block_with(text: str) -> str:
    (found,) = [block for block in (*readme_blocks("sh"), *readme_blocks("python")) if text in block]
    return found


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which README's commands find what they name, and leave what they make."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("handlers", "model-configs", "examples"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def environment(checkout: Path) -> dict[str, str]:
    temporary = checkout / "tmp"
    temporary.mkdir(exist_ok=True)
    scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": scripts, "TMPDIR": str(temporary), "TEMP": str(temporary)}


def run(script: str, checkout: Path) -> str:
    """What a block prints, every line of which has to succeed."""
    command = ["bash", "-euo", "pipefail", "-c", script]
    result = subprocess.run(
        command, cwd=checkout, env=environment(checkout), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def started_by_torchserve(checkout: Path) -> list[psutil.Process]:
    """TorchServe's own process, whose number `torchserve --start` has left, and all below it."""
    try:
        parent = psutil.Process(int((checkout / "tmp" / ".model_server.pid").read_text()))
        return [*parent.children(recursive=True), parent]
    except (FileNotFoundError, psutil.NoSuchProcess):
        return []


@contextmanager
def torchserve_of_readme(checkout: Path) -> Iterator[int]:
    """The pair of commands as it stands there; the port of inference, which is a free one, as all others are."""
    inference, management, metrics, grpc, grpc_management, ranks, rendezvous = free_ports(7)
    properties = checkout / "config.properties"
    properties.write_text(
        f"inference_address=http://127.0.0.1:{inference}\nmanagement_address=http://127.0.0.1:{management}\n"
        f"metrics_address=http://127.0.0.1:{metrics}\ngrpc_inference_port={grpc}\n"
        f"grpc_management_port={grpc_management}\ninitial_distribution_port={ranks}\n"
    )
    own = {
        "TS_CONFIG_FILE": str(properties),
        "PET_RDZV_ENDPOINT": f"127.0.0.1:{rendezvous}",
        "LOG_LOCATION": str(checkout / "logs"),
        "METRICS_LOCATION": str(checkout / "logs"),
    }
    log = checkout / "torchserve.log"
    command = ["bash", "-euo", "pipefail", "-c", block_with("torchserve --start")]
    family: list[psutil.Process] = []
    try:
        with log.open("wb") as output:
            subprocess.run(
                command, cwd=checkout, env=environment(checkout) | own, stdout=output, stderr=output, timeout=300
            ).check_returncode()
        health = f"http://127.0.0.1:{inference}/predictions/demo/1.0/health"
        wait_until(lambda: answers(health), lambda: log.read_text(errors="replace")[-5000:], seconds=300)
        yield inference
    finally:
        family = started_by_torchserve(checkout)
        for process in family:
            _signal(process, signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=15)
        for process in alive:
            _signal(process, signal.SIGKILL)
        psutil.wait_procs(alive, timeout=15)


def _signal(process: psutil.Process, kind: signal.Signals) -> None:
    try:
        process.send_signal(kind)
    except psutil.NoSuchProcess:
        pass


def answers(url: str) -> bool:
    try:
        return get(url)[0] == 200
    except OSError:
        return False


@pytest.mark.torchserve
def test_readmes_pair_of_commands_serves_what_its_curl_lines_ask(checkout: Path) -> None:
    with torchserve_of_readme(checkout) as port:
        output = run(block_with("curl ").replace(":8080/", f":{port}/"), checkout)
    text, _, completion = output.partition("{")
    assert text.strip()
    assert '"text_completion"' in completion and '"finish_reason"' in completion


@pytest.mark.torchserve
def test_readmes_first_command_answers_once(checkout: Path) -> None:
    assert os.access(ROOT / "examples" / "quickstart", os.X_OK)
    assert any(line.startswith("./examples/quickstart") for line in commands(README.read_text()))
    assert "Return a new list containing" in run("python examples/quickstart.py --once", checkout)


def test_readmes_python_answers(checkout: Path) -> None:
    script = checkout / "program.py"
    script.write_text(block_with("open_model"))
    assert run("python program.py", checkout).strip()


def test_readme_plans_without_serving(checkout: Path) -> None:
    (line,) = [own for own in commands(README.read_text()) if own.startswith("ts-parallel plan")]
    assert "parameter" in run(shlex.join(shlex.split(line)), checkout)


def test_readme_is_one_screen() -> None:
    assert len(README.read_text().splitlines()) <= 110
    assert len(README.read_text().split()) <= 950
