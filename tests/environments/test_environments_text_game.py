"""Every game can be won, by a walk through its rooms, and what is no command is answered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gkd.environments import Task
from gkd.environments.text_game import House, TextGame, TextGameKind, rows

PROMPTS = Path(__file__).parents[2] / "configs" / "prompts"


def started(rooms: int, seed: int) -> TextGame:
    game = TextGame()
    game.reset(Task("", {"rooms": rooms, "seed": seed}, 0))
    return game


def way(house: House, start: tuple[int, int], end: tuple[int, int]) -> list[str]:
    """Commands, by a search in breadth."""
    waiting: list[tuple[tuple[int, int], list[str]]] = [(start, [])]
    seen = {start}
    for place, commands in waiting:
        if place == end:
            return commands
        for name, there in house.exits[place].items():
            if there not in seen:
                seen.add(there)
                waiting.append((there, [*commands, f"go {name}"]))
    raise AssertionError("no way")


@pytest.mark.parametrize("rooms", [2, 3, 5, 12, 64])
def test_every_game_can_be_won(rooms: int) -> None:
    lengths: list[int] = []
    for seed in range(6):
        game, house = started(rooms, seed), House.of(rooms, seed)
        assert len(house.exits) == rooms and house.key != house.chest
        commands = [*way(house, (0, 0), house.key), "take key", *way(house, house.key, house.chest)]
        for command in commands:
            observed = game.step(command)
            assert not observed.done and observed.reward == 0 and "no" not in observed.observation.split()
        last = game.step("Now I  \n> Open Chest.\n")
        assert last.done and last.reward == 1.0
        lengths.append(len(commands))
    assert max(lengths) >= min(rooms, 4)


def test_what_does_not_help_is_said() -> None:
    seed = next(seed for seed in range(99) if len(House.of(3, seed).exits[(0, 0)]) == 1)
    game, house = started(3, seed), House.of(3, seed)
    missing = next(name for name in ("north", "south", "east", "west") if name not in house.exits[(0, 0)])
    for turn, said in (
        ("", "That is no command."), ("I would like to open chest", "That is no command."), ("take key", "no key here"),
        ("open chest", "no chest here"), (f"go {missing}", "There is no way."), ("look", "A room with ways"),
    ):  # fmt: skip
        observed = game.step(turn)
        assert said in observed.observation and not observed.done
    for command in way(house, (0, 0), house.chest):
        game.step(command)
    assert game.step("open chest").observation == "It is locked."


@pytest.mark.parametrize(
    "data", [None, {}, {"rooms": 1, "seed": 0}, {"rooms": 65, "seed": 0}, {"rooms": True, "seed": 0}, {"rooms": 3}, 4]
)
def test_a_task_that_is_no_game_is_refused(data: object) -> None:
    with pytest.raises(ValueError, match="rooms"):
        TextGameKind(kind="text_game").check_task(data)


def test_the_shipped_rows_are_what_it_makes() -> None:
    for name, made in (("games", rows(96, range(2, 6))), ("games_heldout", rows(16, range(2, 6), seed=1000))):
        assert [json.loads(line) for line in (PROMPTS / f"{name}.jsonl").read_text().splitlines()] == [*made]
