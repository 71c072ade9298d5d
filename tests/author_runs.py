"""Recipes run in this process, against a server that is a function."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from gkd.author import AuthorRun, Recipe

Reply = Callable[[dict[str, Any]], "httpx.Response | str"]


@dataclass
class Server(httpx.AsyncBaseTransport):
    """Answers `reply` of each request's body: a text, or a whole response."""

    reply: Reply
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[httpx.Headers] = field(default_factory=list)
    models: httpx.Response | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return self.models or httpx.Response(200, json={"data": [{"id": "stub"}]})
        body = json.loads(await request.aread())
        self.asked.append(body)
        self.headers.append(request.headers)
        said = self.reply(body)
        return said if isinstance(said, httpx.Response) else chat(said)


def chat(text: str, reason: str = "stop", **usage: int) -> httpx.Response:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
    tokens = {"prompt_tokens": 10, "completion_tokens": 5} | usage
    return httpx.Response(200, content=json.dumps({"choices": [choice], "usage": tokens}))


def question_of(body: Mapping[str, Any]) -> str:
    return body["messages"][-1]["content"]


@dataclass
class Bench:
    """A folder with an input, where recipes are written and run."""

    folder: Path

    def data(self, *rows: Mapping[str, Any], name: str = "data.jsonl") -> Path:
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def recipe(self, *steps: Mapping[str, Any], **others: Any) -> Path:
        """With one model, `teacher`, of a server; its keys are `teacher`."""
        model = {"address": "http://127.0.0.1:9", "model": "stub", "retry_s": 0.0, **others.pop("teacher", {})}
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump({"models": {"teacher": model}, "steps": list(steps), **others}))
        return path

    def run(
        self, recipe: Path, data: Path, server: Server | Reply, *, out: str = "out.jsonl", heldout: str | None = None
    ) -> tuple[AuthorRun, list[dict[str, Any]]]:
        """The run after its end, and the rows that it wrote."""
        transport = server if isinstance(server, Server) else Server(server)
        path = self.folder / out
        run = AuthorRun(
            Recipe.read(recipe), str(data), path, heldout=heldout, transport=transport,
            store=self.folder / "answers.sqlite",
        )  # fmt: skip
        run.check()
        run.run()
        return run, [json.loads(line) for line in path.read_text().splitlines()]


def dropped(run: AuthorRun) -> dict[str, int]:
    """reason -> how many."""
    return {reason: count for _, reason, count in run.made.tally.reasons()}
