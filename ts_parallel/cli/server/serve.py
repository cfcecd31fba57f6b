"""`ts-parallel serve`: archive a checkpoint, start TorchServe on it, stay until told to stop."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer

from ts_parallel.checkpoint.adapter import read_adapter
from ts_parallel.checkpoint.index import read_index
from ts_parallel.checkpoint.quantized import refuse_quantized
from ts_parallel.checkpoint.settings import settings_folder
from ts_parallel.checkpoint.source import locate_checkpoint
from ts_parallel.cli.handler_options import HandlerKeys, takes_handler_keys
from ts_parallel.cli.options import MaxRequestSize, MaxResponseSize, Model, parse_message_size
from ts_parallel.cli.server.archive import Name, default_name, handler_config, write_archive
from ts_parallel.cli.server.beside import GatewayBeside, check_port, gateway_beside
from ts_parallel.cli.server.startup import LogFollower, Startup, shown_startup, silent_startup
from ts_parallel.cli.server.torchserve import MAX_MESSAGE_SIZE, Access, TorchServe, find_java
from ts_parallel.config import API_KEY_VARIABLE, HandlerConfig, check_origin, parse_api_keys
from ts_parallel.partition.model.model_config import max_positions_of, read_model_config
from ts_parallel.partition.prepared import prepare_program
from ts_parallel.partition.program import PipelinePlace
from ts_parallel.runtime.backends.choose import refuse_unquantizable
from ts_parallel.runtime.kv_budget import count_blocks
from ts_parallel.runtime.runner import refuse_unpageable
from ts_parallel.serving.causal_lm import program_request
from ts_parallel.serving.text.model_files import read_eos_ids, read_tokenizer

_MAX_MESSAGE_SIZE = f"{MAX_MESSAGE_SIZE >> 20}MiB"


@takes_handler_keys()
def serve(
    model: Model,
    name: Name = None,
    host: Annotated[
        str,
        typer.Option(help="Address to listen on; any but loopback asks clients for a key."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8080,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="Show Prometheus the metrics on this port of 127.0.0.1; else they are logged."
        ),
    ] = None,
    gateway_port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Run a gateway with bare /v1 on this port of --host, as `gateway` does."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY,…",
            envvar=API_KEY_VARIABLE,
            help="Keys one of which clients need; the variable shows them to no other user of the machine.",
        ),
    ] = None,
    cors_origin: Annotated[
        str | None,
        typer.Option(metavar="ORIGIN", help="Origin whose pages may ask, such as https://chat.local; * for any."),
    ] = None,
    drain_timeout: Annotated[
        float,
        typer.Option(min=0, metavar="SECONDS", help="How long the requests that are open may go on once it is to end."),
    ] = 30,
    max_request_size: MaxRequestSize = _MAX_MESSAGE_SIZE,
    max_response_size: MaxResponseSize = _MAX_MESSAGE_SIZE,
    verbose: Annotated[bool, typer.Option(help="Show TorchServe's own output.")] = False,
    *,
    keys: HandlerKeys,
) -> None:
    """Serve a checkpoint until Ctrl-C or SIGTERM; what is open then may finish, and a second signal ends it at once."""
    sizes = {
        "max_request_size": parse_message_size(max_request_size, "--max-request-size"),
        "max_response_size": parse_message_size(max_response_size, "--max-response-size"),
    }
    parse_api_keys(api_key)
    check_origin(cors_origin)
    access = Access(api_key, cors_origin)
    folder = locate_checkpoint(model)
    settings = handler_config(folder, **keys)
    name = name or default_name(folder)
    if gateway_port is not None:
        check_port(host, gateway_port)
    show = partial(shown_startup, is_plain=verbose)
    with (
        stopped_by_signals() as stop,
        running(settings, folder, name, host, port, verbose, stop, metrics_port, show, access, **sizes) as server,
    ):
        if not stop.is_set():
            _stay(server, stop, host, gateway_port, sizes["max_request_size"], access, drain_timeout)


def _stay(
    server: TorchServe,
    stop: Stop,
    host: str,
    gateway_port: int | None,
    max_request_size: int,
    access: Access,
    drain_timeout: float,
) -> None:
    """Until `stop` is set and what was open then has ended, with a gateway where one is wanted."""
    with ExitStack() as at_the_end:
        beside: GatewayBeside | None = None
        if gateway_port is not None:
            beside = at_the_end.enter_context(gateway_beside(server, host, gateway_port, max_request_size, access))
        print(f"ready: {server.url}", flush=True)
        if beside is not None:
            print(f"gateway: {beside.url}", flush=True)
        if server.key_file is not None:
            print(f"clients need the inference key of {server.key_file}", flush=True)
        server.wait(stop, beside.keep_up if beside is not None else lambda: None)
        if drain_timeout:
            left = server.drain(drain_timeout, stop.at_once, partial(_tell_open, drain_timeout))
            if left:
                print(f"{left} requests are broken off", file=sys.stderr, flush=True)


def _tell_open(seconds: float, count: int) -> None:
    text = f"{count} requests are open and may go on for {seconds:g} s; Ctrl-C or SIGTERM again ends them"
    print(text, file=sys.stderr, flush=True)


@contextmanager
def running(
    config: HandlerConfig,
    folder: Path,
    name: str,
    host: str,
    port: int,
    verbose: bool,
    stop: threading.Event,
    metrics_port: int | None = None,
    show: Callable[[], AbstractContextManager[Startup]] = silent_startup,
    access: Access | None = None,
    **sizes: int,
) -> Iterator[TorchServe]:
    """A TorchServe that answers for `folder`, ended on leaving; it does not answer if `stop` was set meanwhile.

    Args:
        sizes: its limits of a body.

    Raises:
        StartupError: the model cannot be served, or TorchServe did not come up.
        Stopped: `stop` was set by a signal before TorchServe was started.
    """
    with TemporaryDirectory(prefix="tsp-") as workspace, ExitStack() as at_the_end:
        with show() as startup:
            store = Path(workspace) / "store"
            with raising_stopped(stop):
                check(config, folder, startup)
                java_home = find_java()
                startup.begin("starting TorchServe")
                write_archive(config, name, store)
            server = TorchServe(
                Path(workspace), store, name, host, port, java_home, verbose, metrics_port, access=access, **sizes
            )
            at_the_end.callback(server.stop)
            server.start()
            server.wait_until_ready(stop, LogFollower(startup, config.pipeline_parallel_size).follow)
        yield server


def check(config: HandlerConfig, folder: Path, startup: Startup | None = None) -> None:
    """Everything a worker would refuse, before TorchServe is started: a worker's refusal is a line in a log.

    Raises:
        StartupError: what is wrong.
    """
    settings = settings_folder(folder, config.config_folder)
    refuse_quantized(folder, settings)
    model_config = read_model_config(settings)
    index = read_index(folder, config.config_folder)
    max_model_len = config.resolve_max_model_len(max_positions_of(model_config))
    place = PipelinePlace(0, config.pipeline_parallel_size, split_points=config.split_points)
    startup = startup or Startup()
    program = prepare_program(
        program_request(config, folder, 0, place), index, lambda: startup.begin("tracing the model")
    )
    refuse_unpageable(program, max_model_len)
    refuse_unquantizable(config.quantization, torch.device(config.device), program.dtype)
    if config.gpu_memory_utilization is None:  # else the ranks find out what is free beside the weights
        per_token = program.kv_elements_of_ranks
        count_blocks(per_token, program.dtype, config.block_size, config.kv_cache_memory, max_model_len)
    if config.adapter_path is not None:
        read_adapter(Path(config.adapter_path), index, program.stored_names)
    read_eos_ids(settings, model_config, read_tokenizer(settings))


class Stopped(BaseException):
    """Work that could not look at the event was broken off."""


class Stop(threading.Event):
    """Set by the first Ctrl-C or SIGTERM, which also raises `Stopped` where that is safe."""

    raises = False

    def __init__(self) -> None:
        super().__init__()
        self.at_once = threading.Event()
        """Set by the second."""


@contextmanager
def raising_stopped(stop: threading.Event) -> Iterator[None]:
    """Inside, what sets a `Stop` raises `Stopped`: for work that leaves nothing behind wherever it ends."""
    if isinstance(stop, Stop):
        stop.raises = True
    try:
        yield
    finally:
        if isinstance(stop, Stop):
            stop.raises = False


@contextmanager
def stopped_by_signals() -> Iterator[Stop]:
    """An event that Ctrl-C and SIGTERM set, the first time; a third one kills as usual. Ends at `Stopped`."""
    stop = Stop()
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def handler(kind: int, _: object) -> None:
        if stop.is_set():
            stop.at_once.set()
            for each in kinds:
                signal.signal(each, before[each])
            return
        stop.set()
        print(f"stopping ({signal.Signals(kind).name})", file=sys.stderr, flush=True)
        if stop.raises:
            raise Stopped

    for kind in kinds:
        signal.signal(kind, handler)
    try:
        yield stop
    except Stopped:
        pass
    finally:
        for kind in kinds:
            signal.signal(kind, before[kind])
