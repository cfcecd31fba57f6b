"""Where the repository's own things lie, for tests on whatever floor."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
BENCHMARKS = EXAMPLES / "benchmarks"
DEMO_MODEL = EXAMPLES / "demo_model"
RANKS = ROOT / "tests" / "ranks"
"""Programs that torchrun starts on each rank."""
