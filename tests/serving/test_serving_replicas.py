"""How requests are shared out among servers, and what becomes of those that fail."""

from __future__ import annotations

import pytest

from gkd.config import TeacherConfig
from gkd.serving.replicas import NoServerLeftError, Replica, ReplicaPool, Role, ServerFailedError

ROLE = Role("teacher", "no teacher", "gkd teacher", "/teacher", lambda address: "gkd serve-teacher")


def pool(count: int) -> ReplicaPool:
    addresses = [f"http://127.0.0.1:{8300 + i}" for i in range(count)]
    config = TeacherConfig.model_validate({"model": "m", "placement": "served", "addresses": addresses})
    return ReplicaPool(config, ROLE, cool_down_s=60)


class Servers:
    """Fails as often as it is told, by server."""

    def __init__(self, *failures: int) -> None:
        self.left, self.asked = list(failures), list[int]()

    def __call__(self, replica: Replica) -> str:
        index = int(replica.address[-1])
        self.asked.append(index)
        self.left[index] -= 1
        if self.left[index] >= 0:
            raise ServerFailedError("broken off")
        return "done"


@pytest.mark.fault
def test_a_server_that_broke_off_once_is_asked_again_if_the_other_is_down() -> None:
    """Two must not be less robust than one."""
    subject, servers = pool(2), Servers(1, 9)
    subject.set_down(subject.replicas[1], "missed an update")
    assert subject.attempt(servers) == "done"
    assert servers.asked == [0, 1, 0]


@pytest.mark.fault
@pytest.mark.parametrize(("count", "most", "attempts"), [(1, None, 2), (3, None, 4), (1, 3, 2), (2, 3, 3), (8, 3, 3)])
def test_a_request_that_nobody_answers_ends(count: int, most: int | None, attempts: int) -> None:
    servers = Servers(*[9] * count)
    with pytest.raises(NoServerLeftError):
        pool(count).attempt(servers, most)
    assert len(servers.asked) == attempts
