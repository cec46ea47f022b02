"""A server that thousands of small requests reach, many of which are cancelled, abandoned or wrong.

    python benchmarks/serve_soak.py runs/demo/ensemble --requests 2000

`atoll serve` runs as its own process. Clients at several addresses of loopback send, in a random order:

- image: a generation; some with deadlines.
- job: a job, whose events are read to the end; half with previews.
- cancel: a job that is given up at a random moment.
- leave: a generation whose connection is closed at a random moment.
- reread: a job whose stream is closed in the middle, and read on from there.
- repeat: a generation that is sent twice at once, with one Idempotency-Key.
- bad: a body or an address that is not accepted.

The report says whether every request had one answer and every job one last event, whether the server's counts agree,
what is left in the server at the end (jobs, streams, connections, threads), and its memory after each 200 requests.
Memory may grow while the server fills its store of 1,024 finished jobs, which is the warm-up. Some images are compared
with `atoll.Pipeline`. The exit code is 1 if anything of this is wrong. Linux only.
"""

import argparse
import asyncio
import base64
import io
import json
import random
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from atoll.pipeline import Pipeline

KINDS = {"image": 30, "job": 20, "cancel": 15, "leave": 15, "reread": 5, "repeat": 5, "bad": 10}
ADDRESSES = 4
WORDS = ("moss", "sand", "rain", "rust")
ROUTINGS = ("top-1", "top-2", "full", "threshold-0.2", "nucleus-0.9")
BAD = (
    b"",
    b"[]",
    b"{",
    b"[" * 5000,
    b'{"prompt": "moss", "prompt": "rain"}',
    b'{"prompt": "moss", "guidance_scale": NaN}',
    b'{"prompt": "moss", "n": 1e400}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "moss", "routing": "oracle-999"}',
    b'{"prompt": "moss", "nothing": 1}',
    b"\xff\xfe",
    b"x" * 200_000,
)
PART = 200  # requests
CHECKED = 60  # images that are compared with the pipeline's
TOLERANCE = 0.05  # growth of memory after warm-up


class Soak:
    """The clients of one run.

    Attributes:
        sent: requests by kind.
        wrong: what was not as it should be.
        accepted: jobs that the server has accepted as its answers say; a repetition counts once.
        left: generations whose connection was closed, of which only the server knows whether it read them.
        images: (body, PNG files) to compare.
    """

    def __init__(self, port: int, seed: int):
        self.port, self.random = port, random.Random(seed)
        self.clients = [
            httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{port}",
                timeout=None,
                transport=httpx.AsyncHTTPTransport(local_address=f"127.0.0.{number + 1}"),
            )
            for number in range(ADDRESSES)
        ]
        self.sent, self.statuses = Counter[str](), Counter[int]()
        self.wrong: list[str] = []
        self.accepted = self.left = self.repeated = 0
        self.images: list[tuple[dict[str, Any], list[bytes]]] = []
        self.latencies: list[float] = []

    def body(self, **changes: Any) -> dict[str, Any]:
        """A random body within the limits."""
        draw = self.random
        body: dict[str, Any] = {
            "prompt": " ".join(draw.choices(WORDS, k=draw.randint(0, 6))) + draw.choice(("", f" {draw.random()}")),
            "n": draw.randint(1, 4),
            "seed": draw.randrange(2**31),
            "steps": draw.randint(1, 12),
            "method": draw.choice(("euler", "heun", "midpoint", "dpm++2m")),
            "routing": draw.choice(ROUTINGS),
            "guidance_scale": draw.choice((1.0, 1.0, 2.0, 4.0)),
        }
        if body["guidance_scale"] != 1 and draw.random() < 0.5:
            body["negative_prompt"] = draw.choice(WORDS)
        return body | changes

    def expect(self, holds: bool, message: str) -> None:
        """Note what is wrong."""
        if not holds:
            self.wrong.append(message)

    async def worker(self, kinds: list[str]) -> None:
        """Send one request after the other."""
        while kinds:
            kind = kinds.pop()
            self.sent[kind] += 1
            try:
                await getattr(self, f"_{kind}")(self.random.choice(self.clients))
            except (httpx.HTTPError, OSError, ValueError, KeyError) as error:
                self.wrong.append(f"{kind}: {error!r}")

    async def _image(self, client: httpx.AsyncClient) -> None:
        body = self.body(response_format=self.random.choice(("url", "b64_json")))
        if self.random.random() < 0.1:
            body["deadline"] = self.random.choice((1e-9, 1.0, 60.0))
        start = time.monotonic()
        answer = await client.post("/v1/images/generations", json=body)
        self.latencies.append(time.monotonic() - start)
        self.accepted += 1
        self.statuses[answer.status_code] += 1
        if answer.status_code != 200:
            self.expect(answer.status_code == 504 and "deadline" in body, f"image: {answer.text[:200]}")
            return
        await self._take(client, body, answer.json()["data"])

    async def _take(self, client: httpx.AsyncClient, body: dict[str, Any], data: list[dict[str, Any]]) -> None:
        """Check an answer's seeds, and fetch its images."""
        seeds = [body["seed"] + index for index in range(body["n"])]
        self.expect([one["seed"] for one in data] == seeds, f"images of other seeds: {data!r:.200}")
        files = []
        for one in data:
            if "url" in one:
                answer = await client.get(re.sub(r"^http://[^/]*", "", one["url"]))
                self.expect(answer.status_code == 200, f"file: {answer.status_code}")
                files.append(answer.content)
            else:
                files.append(base64.b64decode(one["b64_json"]))
        if len(self.images) < CHECKED:
            self.images.append((body, files))

    async def _start(self, client: httpx.AsyncClient, **changes: Any) -> dict[str, Any]:
        answer = await client.post("/v1/jobs", json=self.body(**changes))
        self.expect(answer.status_code == 202, f"job: {answer.text[:200]}")
        self.accepted += 1
        job: dict[str, Any] = answer.json()
        return job

    async def _events(self, client: httpx.AsyncClient, path: str, after: int = 0) -> AsyncIterator[tuple[int, str]]:
        """Yield (number, name) of a job's events above a number."""
        async with client.stream("GET", path, headers={"Last-Event-ID": str(after)}) as answer:
            number = after
            async for line in answer.aiter_lines():
                if line.startswith("id: "):
                    number = int(line[4:])
                elif line.startswith("event: "):
                    name = line[7:]
                elif not line and number > after:
                    yield number, name
                    after = number

    def _whole(self, events: list[tuple[int, str]], last: tuple[str, ...]) -> None:
        """Expect rising numbers, and one last event at the end."""
        numbers, names = [number for number, _ in events], [name for _, name in events]
        self.expect(numbers == sorted(set(numbers)), f"numbers of events: {numbers}")
        ends = [name for name in names if name in ("finished", "failed")]
        self.expect(len(ends) == 1 and names[-1] in last, f"events: {names}")

    async def _job(self, client: httpx.AsyncClient) -> None:
        job = await self._start(client, preview_every=self.random.choice((0, 3)))
        self._whole([event async for event in self._events(client, job["events"])], ("finished",))

    async def _cancel(self, client: httpx.AsyncClient) -> None:
        job = await self._start(client, steps=self.random.choice((3, 200)))
        reader = asyncio.create_task(self._read(client, job["events"]))
        await asyncio.sleep(self.random.choice((0, 0.01, 0.1, 0.5)))
        answer = await client.delete(f"/v1/jobs/{job['id']}")
        self.expect(answer.status_code == 200, f"cancel: {answer.text[:200]}")
        self._whole(await reader, ("failed", "finished"))

    async def _read(self, client: httpx.AsyncClient, path: str) -> list[tuple[int, str]]:
        return [event async for event in self._events(client, path)]

    async def _leave(self, _: httpx.AsyncClient) -> None:
        content = json.dumps(self.body(steps=self.random.choice((5, 200)))).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
        # Some leave within the body.
        writer.write(head.encode() + content[: len(content) if self.random.random() < 0.8 else 20])
        await writer.drain()
        await asyncio.sleep(self.random.choice((0, 0.01, 0.1, 0.5)))
        writer.close()
        self.left += 1

    async def _reread(self, client: httpx.AsyncClient) -> None:
        job = await self._start(client, steps=40)
        events = []
        async for event in self._events(client, job["events"]):
            events.append(event)
            if len(events) == 2:
                break
        events += [event async for event in self._events(client, job["events"], events[-1][0])]
        self._whole(events, ("finished",))

    async def _repeat(self, client: httpx.AsyncClient) -> None:
        headers = {"Idempotency-Key": str(self.random.random())}
        body = self.body(response_format="url")
        answers = await asyncio.gather(
            *(client.post("/v1/images/generations", json=body, headers=headers) for _ in range(2))
        )
        self.accepted, self.repeated = self.accepted + 1, self.repeated + 1
        data = [answer.json().get("data") for answer in answers]
        self.expect(data[0] is not None and data[0] == data[1], f"a repetition differs: {data!r:.200}")

    async def _bad(self, client: httpx.AsyncClient) -> None:
        if self.random.random() < 0.3:
            path = self.random.choice(("/v1/jobs/x", "/v1/files/x.png", "/v1/jobs/x/events", "/static/..%2fapp.py"))
            answer = await client.get(path)
        else:
            path = self.random.choice(("/v1/jobs", "/v1/images/generations"))
            answer = await client.post(path, content=self.random.choice(BAD))
        self.expect(answer.status_code in (400, 404, 413), f"bad: {answer.status_code}")
        self.expect("message" in answer.json()["error"], "bad: another format")


class ServerProcess:
    """`atoll serve`; its log goes to a file."""

    def __init__(self, ensemble: Path, log: Path):
        self.log = log
        command = [sys.executable, "-c", "from atoll.cli import main; main()", "serve", f"tiny={ensemble}"]
        self._log_file = log.open("w")
        self.process = subprocess.Popen(
            [*command, "--port", "0", "--rate", "0"], stdout=subprocess.PIPE, stderr=self._log_file, text=True
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline().rpartition(":")[2])
        self.proc = Path("/proc") / str(self.process.pid)

    def resident(self) -> float:
        """Return the resident memory in MB."""
        return int((self.proc / "statm").read_text().split()[1]) * 4096 / 1e6

    def left(self) -> tuple[int, int]:
        """Return the numbers of threads and of open files."""
        return len(list((self.proc / "task").iterdir())), len(list((self.proc / "fd").iterdir()))

    def numbers(self) -> dict[str, float]:
        """Return the numbers of /metrics."""
        text = httpx.get(f"http://127.0.0.1:{self.port}/metrics", timeout=60).text
        lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in lines}

    def settle(self) -> dict[str, float]:
        """Wait, at most a minute, until the server has nothing to do; return its numbers."""
        for _ in range(600):
            numbers = self.numbers()
            busy = [numbers[name] for name in ("atoll_jobs_unfinished", "atoll_event_streams")]
            if not any(busy) and not any(v for n, v in numbers.items() if n.startswith("atoll_engine_images{")):
                break
            time.sleep(0.1)
        return numbers

    def stop(self) -> tuple[int, float]:
        """End by SIGTERM; return the exit code and the seconds until it ended."""
        start = time.monotonic()
        self.process.terminate()
        code = self.process.wait()
        self._log_file.close()
        return code, time.monotonic() - start


def total(numbers: dict[str, float], start: str, *parts: str) -> int:
    """Return the sum of a counter's values whose labels have all parts."""
    return int(sum(v for name, v in numbers.items() if name.startswith(start) and all(part in name for part in parts)))


def largest_difference(ensemble: Path, images: list[tuple[dict[str, Any], list[bytes]]]) -> tuple[int, int]:
    """Return the number of images, and the largest difference from the pipeline's in units of 1/255."""
    warnings.filterwarnings("ignore", message=".*too long")
    pipeline, count, largest = Pipeline.from_pretrained(ensemble), 0, 0
    for body, files in images:
        expected = pipeline(
            body["prompt"],
            body["steps"],
            body["guidance_scale"],
            images_per_prompt=body["n"],
            seeds=[body["seed"] + index for index in range(body["n"])],
            negative_prompt=body.get("negative_prompt"),
            method=body["method"],
            routing=body["routing"],
        ).images
        for file, image in zip(files, expected, strict=True):
            difference = np.asarray(Image.open(io.BytesIO(file)), int) - np.asarray(image, int)
            count, largest = count + 1, max(largest, int(np.abs(difference).max()))
    return count, largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ensemble", type=Path)
    parser.add_argument("--requests", type=int, default=2000, help="after the warm-up")
    parser.add_argument("--warm-up", type=int, default=2400, help="requests until the store of jobs is full")
    parser.add_argument("--clients", type=int, default=16, help="requests at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path("serve-soak.log"))
    arguments = parser.parse_args()

    # The requests in parts: after each, the server is at rest and its memory is read.
    server = ServerProcess(arguments.ensemble, arguments.log)
    soak = Soak(server.port, arguments.seed)
    threads_before, files_before, warm_up = 0, 0, arguments.warm_up // PART
    memory = []
    start = time.monotonic()

    async def run() -> None:
        nonlocal threads_before, files_before
        for part in range(warm_up + arguments.requests // PART):
            kinds = soak.random.choices(list(KINDS), list(KINDS.values()), k=PART)
            await asyncio.gather(*(soak.worker(kinds) for _ in range(arguments.clients)))
            await asyncio.to_thread(server.settle)
            memory.append(server.resident())
            print(f"{(part + 1) * PART} requests: {memory[-1]:.1f} MB", flush=True)
            if part == warm_up - 1:
                threads_before, files_before = server.left()
        for client in soak.clients:
            await client.aclose()

    asyncio.run(run())
    seconds = time.monotonic() - start

    # The server's own counts: what it accepted ended once, and nothing is left.
    numbers = server.settle()
    generations = ("/v1/images/generations", 'method="POST"')
    begun = sum(
        total(numbers, "atoll_http_requests_total", *generations, f'status="{status}"') for status in (200, 499, 504)
    )
    begun += total(numbers, "atoll_http_requests_total", '"/v1/jobs"', 'status="202"') - soak.repeated
    ended = total(numbers, "atoll_jobs_total")
    outcomes = {
        name: total(numbers, "atoll_jobs_total", f'"{name}"')
        for name in ("finished", "cancelled", "deadline", "failed")
    }
    soak.expect(begun == ended, f"{begun} jobs were accepted and {ended} ended")
    soak.expect(soak.accepted <= ended <= soak.accepted + soak.left, f"{soak.accepted} to + {soak.left}, not {ended}")
    soak.expect(outcomes["failed"] == 0, f"{outcomes['failed']} jobs failed")
    for name in ("atoll_jobs_unfinished", "atoll_event_streams"):
        soak.expect(numbers[name] == 0, f"{name} is {numbers[name]}")
    time.sleep(6)  # idle connections are closed after 5 s
    threads, files = server.left()
    soak.expect(threads <= threads_before, f"{threads} threads, {threads_before} before")
    soak.expect(files <= files_before, f"{files} open files, {files_before} before")
    warm = memory[warm_up - 1]
    growth = memory[-1] / warm - 1
    soak.expect(growth <= TOLERANCE, f"memory grew by {growth:.1%} after the warm-up")
    code, ending = server.stop()
    soak.expect(code == 0, f"exit code {code}")
    errors = [line for line in arguments.log.read_text().splitlines() if re.search("ERROR|Traceback|never|WARN", line)]
    soak.expect(not errors, f"the log has {errors[:3]}")

    # The report.
    count, largest = largest_difference(arguments.ensemble, soak.images)
    soak.expect(largest <= 1, f"an image differs by {largest}/255")
    latencies = sorted(soak.latencies)
    print(f"{sum(soak.sent.values())} requests {dict(soak.sent)} in {seconds:.0f} s, {arguments.clients} at a time")
    print(f"jobs: {begun} accepted, {ended} ended {outcomes}; {soak.repeated} repetitions sampled nothing")
    print(f"latency of a generation: median {latencies[len(latencies) // 2]:.3f} s, largest {latencies[-1]:.2f} s")
    print(f"memory: {warm:.1f} MB after the warm-up, {memory[-1]:.1f} MB at the end ({growth:+.1%})")
    print(f"left: {threads} threads ({threads_before} after the warm-up), {files} open files ({files_before})")
    print(f"images: {count} compared with the pipeline, largest difference {largest}/255")
    print(f"SIGTERM: exit code {code} after {ending:.1f} s")
    print("wrong:", *(soak.wrong or ["nothing"]), sep="\n  ")
    sys.exit(bool(soak.wrong))


if __name__ == "__main__":
    main()
