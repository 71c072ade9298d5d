"""What `gkd author` adds to the requests that it makes: processor time, throughput beside bare httpx, memory.

python -m benchmarks.runs.author [--rows 10000] [--out FILE]

The recipe asks one question a row, reads the answer by a regex, compares it with gold, drops repetitions and writes a
row. First with the transport replaced by one in memory: rows a second of our own process's processor time (templates,
requests, parsing, store, writing), and resident memory after 1,000 rows and to the end. Then against a server in a
process of its own which answers everything at once: rows a second beside as many requests by httpx alone, with the
same concurrency, a thousand of each in turns. Medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks.records import RESULTS, command, rounded, say
from gkd.author import AuthorRun, Recipe
from gkd.files import write_json

CONCURRENCY = 32
ALONE = 3  # rounds of the first part
PIECE_ROWS = 1000  # of the second, in turns: other work on the machine meets both
_SAID = "Two and two are what we are asked to add, and that makes four of them.\nAnswer: 4"
_CHOICE = {"index": 0, "message": {"role": "assistant", "content": _SAID}, "finish_reason": "stop"}
ANSWER = json.dumps({"id": "x", "choices": [_CHOICE], "usage": {"prompt_tokens": 40, "completion_tokens": 20}}).encode()
STEPS = [
    {"ask": {"prompt": "{{ question }}\nThink step by step. End with 'Answer:' and the result."}},
    {"read": {"regex": r"(?s)^(?P<why>.+?)\s*Answer:\s*(?P<result>.+)"}},
    {"keep": {"equal": ["result", "answer"]}},
    {"distinct": {"of": "why", "ngram": 4}},
    {"write": {"prompt": "{{ question }}", "completion": "{{ why }}\nAnswer: {{ result }}", "task": "why"}},
]


class InMemory(httpx.AsyncBaseTransport):
    """Answers at once; notes the process's resident memory at every thousandth request."""

    def __init__(self) -> None:
        self.resident_bytes: list[int] = []
        self._asked = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(404)
        self._asked += 1
        if self._asked % 1000 == 0:
            self.resident_bytes.append(resident_bytes())
        return httpx.Response(200, content=ANSWER)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def prepared(folder: Path, rows: int, address: str, transport: httpx.AsyncBaseTransport | None = None) -> AuthorRun:
    """A run whose every answer is still to be asked for."""
    teacher = {"address": address, "model": "stub", "max_concurrency": CONCURRENCY}
    recipe, data = folder / "recipe.yaml", folder / "data.jsonl"
    recipe.write_text(yaml.safe_dump({"models": {"teacher": teacher}, "steps": STEPS}))
    row = "If there are {} apples of which all but two are gone, and two more come, how many are there?"
    data.write_text(
        "".join(json.dumps({"question": row.format(number), "answer": "4"}) + "\n" for number in range(rows))
    )
    run = AuthorRun(
        Recipe.read(recipe), str(data), folder / "out.jsonl", transport=transport, store=folder / "a.sqlite"
    )
    run.check()
    return run


def in_memory(rows: int) -> dict[str, float]:
    """Of our own process, but for the network: one that has nothing else in its memory."""
    words = [sys.executable, "-m", "benchmarks.runs.author", "--in-memory", "--rows", str(rows)]
    return json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout)


def alone(rows: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        transport = InMemory()
        run = prepared(Path(folder), rows, "http://127.0.0.1:9", transport)
        started_s = time.process_time()
        run.run()
        seconds = time.process_time() - started_s
        assert run.made.tally.written == rows
    first, *later = transport.resident_bytes
    return {
        "rows_per_processor_s": rounded(rows / seconds),
        "resident_mib_after_1000_rows": rounded(first / 2**20),
        "largest_change_after_percent": rounded(100 * max((abs(size / first - 1) for size in later), default=0.0)),
    }


def beside_httpx(rows: int, address: str, *, is_first: bool) -> dict[str, float]:
    """Rows and requests a second, by the clock and by this process's processor time; whether ours come first."""
    with tempfile.TemporaryDirectory() as folder:
        run = prepared(Path(folder), rows, address)
        works = {"ours": run.run, "theirs": lambda: asyncio.run(bare(rows, address))}
        took = {name: timed(works[name]) for name in (works if is_first else reversed(works))}
        assert run.made.tally.written == rows
    ours, theirs = took["ours"], took["theirs"]
    return {
        "rows_per_s": rounded(rows / ours[0]),
        "httpx_requests_per_s": rounded(rows / theirs[0]),
        "share_of_httpx": rounded(theirs[0] / ours[0]),
        "share_of_httpx_by_processor_time": rounded(theirs[1] / ours[1]),
    }


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and processor seconds of this process."""
    started_s, processor_s = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started_s, time.process_time() - processor_s


async def bare(requests: int, address: str) -> None:
    """So many requests of the same size, and nothing else."""
    numbers = iter(range(requests))
    limits = httpx.Limits(max_connections=CONCURRENCY, max_keepalive_connections=CONCURRENCY)
    async with httpx.AsyncClient(limits=limits, timeout=60.0, trust_env=False) as client:

        async def worker() -> None:
            for number in numbers:
                body: dict[str, Any] = {"model": "stub", "messages": [{"role": "user", "content": f"{number} " * 30}]}
                response = await client.post(f"{address}/v1/chat/completions", json=body)
                assert response.json()["choices"]

        await asyncio.gather(*(worker() for _ in range(CONCURRENCY)))


# ---- the server


async def _serve(port: int) -> None:
    said = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(ANSWER), ANSWER)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                if b"content-length:" in head:
                    await reader.readexactly(int(head.partition(b"content-length:")[2].partition(b"\r\n")[0]))
                writer.write(said)
                await writer.drain()
        writer.close()

    async with await asyncio.start_server(connected, "127.0.0.1", port) as server:
        await server.serve_forever()


@contextmanager
def stub_server() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.runs.author", "--stub", str(port)])
    try:
        for _ in range(200):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=RESULTS / "author_cpu.json")
    parser.add_argument("--stub", type=int, metavar="PORT", help="be the server")
    parser.add_argument("--in-memory", action="store_true", help="the first part alone, in this process")
    options = parser.parse_args()
    if options.stub is not None:
        asyncio.run(_serve(options.stub))
    elif options.in_memory:
        say(json.dumps(alone(options.rows)))
    else:
        measure(options)


def measure(options: argparse.Namespace) -> None:
    from benchmarks.machine import environment, warn_if_busy  # with torch, which the parts do without

    warn_if_busy()
    alone = [in_memory(options.rows) for _ in range(ALONE)]
    with stub_server() as address:
        pieces = range(max(1, options.rows // PIECE_ROWS))
        pairs = [beside_httpx(PIECE_ROWS, address, is_first=number % 2 == 0) for number in pieces]
    medians = {
        name: rounded(statistics.median(one[name] for one in rounds)) for rounds in (alone, pairs) for name in rounds[0]
    }
    record = {
        "command": command(),
        "environment": environment("cpu"),
        "rows": options.rows,
        "concurrency": CONCURRENCY,
        "medians": medians,
        "alone": alone,
        "pairs": pairs,
    }
    write_json(options.out, record)
    say(json.dumps(medians, indent=2))


if __name__ == "__main__":
    main()
