"""Some of the bodies at and around every limit, on every route: each is answered, and nobody beside is harmed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from bodies_at_limits import OPTIONS, bodies, limits_of, post_all, workers_of
from serve_process import Served, chat_folder, served_with_gateway

pytestmark = pytest.mark.torchserve

NUM_BODIES = 100


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served_with_gateway(chat_folder(tmp_path_factory.mktemp("limits") / "model"), *OPTIONS) as served:
        yield served


def test_bodies_around_every_limit_are_answered_and_the_worker_lives_on(served: Served) -> None:
    before, limits = workers_of(served), limits_of(served)
    own = bodies(served, limits)
    assert len(own) > 2000 and {body.limit for body in own[:NUM_BODIES]} == limits.keys()
    outcome = post_all(served, own[:NUM_BODIES])
    assert outcome.failures == []
    assert sum(outcome.statuses.values()) == NUM_BODIES
    assert {200, 400, 404, 413} <= outcome.statuses.keys() <= {200, 400, 404, 405, 413, 429}
    assert outcome.num_streams and workers_of(served) == before
