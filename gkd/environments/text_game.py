"""A text game: rooms in a tree, a key in one of them and a chest in another.

The row's `task` is {"rooms": 4, "seed": 7}, which alone says how the rooms lie; more rooms are a deeper game. The first
line of a turn that is a command counts:

    go north (south, east, west)    take key    open chest    look

Opening the chest with the key ends the game with reward 1; what is no command is answered with what there is.

    python -c "from gkd.environments import text_game; text_game.print_rows(64, rooms=range(2, 6))" > games.jsonl
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from gkd.environments.base import Environment, EnvironmentKind, Observed, Task
from gkd.seeding import derive_seed

_STEPS = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}
_COMMAND = re.compile(r"(?mi)^\W*(go (?:north|south|east|west)|take key|open chest|look)\W*$")
_MOST_ROOMS = 64
_RULES = (
    "You are in a house of rooms. Somewhere lies a key, and somewhere stands a locked chest: open it. Answer with one "
    "command a turn: go north, go south, go east, go west, take key, open chest or look."
)
Place = tuple[int, int]


@dataclass(frozen=True, slots=True)
class House:
    """Rooms by their places, with the directions that lead out of each."""

    exits: dict[Place, dict[str, Place]]
    key: Place
    chest: Place

    @classmethod
    def of(cls, rooms: int, seed: int) -> House:
        """Every room is built onto one that is there; key and chest are in the last two."""
        exits: dict[Place, dict[str, Place]] = {(0, 0): {}}
        for attempt in count():
            if len(exits) == rooms:
                break
            here = [*exits][derive_seed(seed, "room", attempt) % len(exits)]
            way, (dx, dy) = [*_STEPS.items()][derive_seed(seed, "way", attempt) % len(_STEPS)]
            there = here[0] + dx, here[1] + dy
            if there not in exits:
                back = next(name for name, step in _STEPS.items() if step == (-dx, -dy))
                exits[here][way], exits[there] = there, {back: here}
        *_, key, chest = exits
        return cls(exits, key, chest)

    def describe(self, place: Place, key_is_taken: bool) -> str:
        things = ["a key"] * (place == self.key and not key_is_taken) + ["a locked chest"] * (place == self.chest)
        seen = f" You see {' and '.join(things)}." if things else ""
        return f"A room with ways {', '.join(self.exits[place])}.{seen}"


class TextGameKind(EnvironmentKind):
    def open(self) -> Environment:
        return TextGame()

    def check_task(self, data: Any) -> None:
        _house_of(data)


class TextGame(Environment):
    def reset(self, task: Task) -> None:
        self._house, self._place, self._has_key = _house_of(task.data), (0, 0), False

    def step(self, turn: str) -> Observed:
        found = _COMMAND.search(turn)
        command = found[1].lower() if found else ""
        if command == "open chest" and self._place == self._house.chest and self._has_key:
            return Observed("The chest opens: you have won.", done=True, reward=1.0)
        return Observed(self._after(command), reward=0.0)

    def unfinished(self) -> float | None:
        return 0.0

    def _after(self, command: str) -> str:
        if command == "take key":
            if self._place != self._house.key or self._has_key:
                return "There is no key here."
            self._has_key = True
            return "You have the key."
        if command == "open chest":
            return "It is locked." if self._place == self._house.chest else "There is no chest here."
        if command.startswith("go "):
            there = self._house.exits[self._place].get(command.removeprefix("go "))
            if there is None:
                return "There is no way."
            self._place = there
        elif not command:
            return "That is no command."
        return self._house.describe(self._place, self._has_key)


def rows(games: int, rooms: Sequence[int], seed: int = 0) -> Iterator[dict[str, Any]]:
    """Rows of a data file: games of so many rooms in turn, no two alike."""
    for number in range(games):
        task = {"rooms": rooms[number % len(rooms)], "seed": seed + number}
        opening = f"{_RULES}\n\n{_house_of(task).describe((0, 0), key_is_taken=False)}"
        yield {"prompt": [{"role": "user", "content": opening}], "task": task}


def print_rows(games: int, rooms: Sequence[int], seed: int = 0) -> None:
    """As JSON lines."""
    for row in rows(games, rooms, seed):
        print(json.dumps(row))


def _house_of(data: Any) -> House:
    """Raises ValueError for a task that is no game."""
    expected = f'expected {{"rooms": 2 to {_MOST_ROOMS}, "seed": a whole number}}'
    if not isinstance(data, dict) or {*data} != {"rooms", "seed"}:
        raise ValueError(expected)
    for value in data.values():
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(expected)
    if not 2 <= data["rooms"] <= _MOST_ROOMS:
        raise ValueError(expected)
    return House.of(data["rooms"], data["seed"])
