"""Compiles the C beside it while the package is installed: a hook of hatchling. Where that fails, the package does
without."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompileNative(BuildHookInterface[Any]):  # type: ignore[misc]
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        for source in sorted(Path(self.root, "ts_parallel", "native").glob("*.c")):
            library = source.with_suffix(sysconfig.get_config_var("EXT_SUFFIX"))
            if _compile(source, library):
                build_data["artifacts"].append(str(library.relative_to(self.root)))
                build_data["pure_python"], build_data["infer_tag"] = False, True


def _compile(source: Path, library: Path) -> bool:
    compiler = shlex.split(os.environ.get("CC") or "cc")
    headers = [f"-I{source.parent}", f"-I{sysconfig.get_paths()['include']}"]
    flags = ["-O3", "-std=gnu11", "-shared", "-fPIC", "-pthread", *headers]
    partial = library.with_suffix(".partial")
    try:
        subprocess.run([*compiler, *flags, str(source), "-o", str(partial)], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"{source.name} is not compiled, torch's own functions take its place: {error}", file=sys.stderr)
        library.unlink(missing_ok=True)
        return False
    partial.replace(library)  # a process that runs the old one keeps it
    return True
