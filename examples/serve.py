"""A small HTTP server with continuous batching: requests join and leave the batch at any step.

    python examples/serve.py                # serves a model at random weights until Ctrl-C
    curl -N -d '{"prompt": "Once", "max_tokens": 40}' http://127.0.0.1:8000/generate
    python examples/serve.py --load 32      # 32 clients against itself, a third of which leave

POST /generate streams one JSON line a token; GET /stats says how full the cache is.  One thread
owns the model and its caches; each connection has a thread that waits for tokens.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import queue
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

import attn_ext


class Layer(torch.nn.Module):
    """Attention with grouped heads and rotary positions, and an MLP."""

    def __init__(self, width: int, heads: int, kv_heads: int):
        super().__init__()
        self.dim = width // heads
        self.norms = torch.nn.ModuleList([torch.nn.RMSNorm(width) for _ in range(2)])
        self.qkv = torch.nn.Linear(width, (heads + 2 * kv_heads) * self.dim, bias=False)
        self.out = torch.nn.Linear(width, width, bias=False)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(width, 4 * width), torch.nn.GELU(), torch.nn.Linear(4 * width, width)
        )
        self.sizes = (heads, kv_heads, kv_heads)

    def forward(self, x, positions, cache, counts, rows):
        """x [B, S, width] -> the same; keys and values go into the cache."""
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (-1, self.dim)).transpose(1, 2)
        q, k, v = heads.split(self.sizes, dim=1)  # [B, H, S, D]
        cache.append(rotated(k, positions), v, counts=counts, rows=rows)
        out = cache.attend(rotated(q, positions), rows=rows)
        x = x + self.out(out.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


def rotated(x, positions):
    """x [B, H, S, D] with rotary positions [B, S]."""
    half = x.shape[-1] // 2
    speed = 10_000 ** (-torch.arange(half, dtype=x.dtype) / half)
    angle = (positions[:, None, :, None] * speed).to(x.dtype)  # [B, 1, S, D / 2]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class Model(torch.nn.Module):
    """A language model of bytes."""

    def __init__(self, layers: int = 2, width: int = 128, heads: int = 4, kv_heads: int = 2):
        super().__init__()
        self.embedding = torch.nn.Embedding(256, width)
        self.layers = torch.nn.ModuleList([Layer(width, heads, kv_heads) for _ in range(layers)])
        self.norm = torch.nn.RMSNorm(width)

    def caches(self, **options) -> list[attn_ext.KVCache]:
        """One for each layer, of the model's dtype."""
        layer = self.layers[0]
        dtype = self.embedding.weight.dtype
        more = dict(heads=layer.sizes[1], head_dim=layer.dim, dtype=dtype)
        return [attn_ext.KVCache(**more, **options) for _ in self.layers]

    @torch.inference_mode()
    def next_tokens(self, caches, prompts: list[list[int]], rows: list[int]) -> list[int]:
        """The token after each of `prompts`, which go into the caches' sequences `rows`."""
        counts = [len(prompt) for prompt in prompts]
        longest = max(counts)
        tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        padding = longest - torch.tensor(counts)
        positions = caches[0].lengths[rows][:, None] + torch.arange(longest) - padding[:, None]
        x = self.embedding(tokens)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, positions.clamp(min=0), cache, counts, rows)
        logits = self.norm(x[:, -1]) @ self.embedding.weight.T
        return logits.argmax(-1).tolist()


@dataclasses.dataclass
class Request:
    """What a client asked for, and what it has got."""

    prompt: list[int]
    max_tokens: int
    tokens: queue.SimpleQueue = dataclasses.field(default_factory=queue.SimpleQueue)
    written: list[int] = dataclasses.field(default_factory=list)
    gone: bool = False  # the client has left

    @property
    def done(self) -> bool:
        """Whether no token is to come."""
        return self.gone or len(self.written) >= self.max_tokens


class Engine(threading.Thread):
    """The thread that owns the model: admits requests, and makes a token for each in each step."""

    def __init__(self, model: Model, batch: int = 8, max_length: int = 512, **options):
        super().__init__(daemon=True)
        self.model, self.max_length = model, max_length
        self.caches = model.caches(batch=batch, max_length=max_length, **options)
        self.most = min(max_length, len(self.caches[0].k_pages) * self.caches[0].page_size)
        self.active: dict[int, Request] = {}  # by row; the oldest first
        self.waiting: collections.deque[Request] = collections.deque()
        self.changed = threading.Condition()
        self.stopped, self.steps, self.preempted = False, 0, 0

    def submit(self, request: Request) -> None:
        """From any thread: its tokens come to request.tokens, None after the last."""
        with self.changed:
            if self.stopped:
                request.tokens.put(None)
            self.waiting.append(request)
            self.changed.notify()

    def stop(self) -> None:
        """From any thread."""
        with self.changed:
            self.stopped = True
            self.changed.notify()

    def run(self) -> None:
        try:
            while self._step():
                pass
        finally:  # nobody waits for ever for tokens that will not come
            with self.changed:
                self.stopped = True
            for request in (*self.active.values(), *self.waiting):
                request.tokens.put(None)

    def _step(self) -> bool:
        """Wait for work and do a step of it; False where there will be none."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopped or self.waiting or self.active)
            if self.stopped:
                return False
            arrived = self._choose()
        self._admit(arrived)
        self._decode()
        return True

    def _choose(self) -> dict[int, Request]:
        """Of those that wait the first ones for which there are rows and pages."""
        free = [row for row in range(self.caches[0].batch) if row not in self.active]
        pages, size = self.caches[0].free_pages, self.caches[0].page_size
        found: dict[int, Request] = {}
        while self.waiting and free:
            request = self.waiting[0]
            needed = (len(request.prompt) + len(request.written)) // size + 1
            if not request.gone and needed > pages:
                break
            self.waiting.popleft()
            if not request.gone:
                pages -= needed
                found[free.pop(0)] = request
        return found

    def _admit(self, arrived: dict[int, Request]) -> None:
        """Prefill; one that was preempted goes on where it was."""
        if arrived:
            prompts = [request.prompt + request.written for request in arrived.values()]
            self.active |= arrived
            self._give(self.model.next_tokens(self.caches, prompts, list(arrived)), list(arrived))

    def _decode(self) -> None:
        """One token for each active request; without a free page the youngest waits again."""
        while self.active:
            rows = list(self.active)
            last = [[request.written[-1]] for request in self.active.values()]
            try:
                tokens = self.model.next_tokens(self.caches, last, rows)
            except attn_ext.CacheFullError:
                self.preempted += 1
                with self.changed:
                    self.waiting.appendleft(self._remove(rows[-1]))
                continue
            self.steps += 1
            return self._give(tokens, rows)

    def _give(self, tokens: list[int], rows: list[int]) -> None:
        for row, token in zip(rows, tokens, strict=True):
            request = self.active[row]
            request.written.append(token)
            request.tokens.put(token)
            if request.done:
                self._remove(row).tokens.put(None)

    def _remove(self, row: int) -> Request:
        for cache in self.caches:
            cache.truncate([0], rows=[row])
        return self.active.pop(row)

    def stats(self) -> dict:
        """How busy it is."""
        cache = self.caches[0]
        return {
            "active": len(self.active), "waiting": len(self.waiting), "steps": self.steps,
            "preempted": self.preempted, "free_pages": cache.free_pages,
            "pages": len(cache.k_pages),
        }  # fmt: skip


def request_of(body: bytes, most: int) -> Request:
    """The request in the body of a POST; ValueError where it cannot be served."""
    asked = json.loads(body)
    if not isinstance(asked, dict) or not isinstance(asked.get("prompt"), str):
        raise ValueError('the body must be {"prompt": text, "max_tokens": number}')
    prompt, count = list(asked["prompt"].encode()), asked.get("max_tokens", 64)
    if not prompt or type(count) is not int or count < 1 or len(prompt) + count > most:
        raise ValueError(
            f"prompt must not be empty, max_tokens at least 1, and both together at most {most} "
            f"bytes, got {len(prompt)} and {count!r}"
        )
    return Request(prompt, count)


class Handler(BaseHTTPRequestHandler):
    """A connection; it has a thread of its own."""

    protocol_version = "HTTP/1.1"
    engine: Engine

    def do_GET(self):
        """GET /stats."""
        known = self.path == "/stats"
        self._answer(200 if known else 404, self.engine.stats() if known else {"error": self.path})

    def do_POST(self):
        """POST /generate: a line of JSON a token."""
        if self.path != "/generate":
            return self._answer(404, {"error": self.path})
        try:
            length = int(self.headers.get("Content-Length") or 0)
            request = request_of(self.rfile.read(length), self.engine.most)
        except ValueError as error:  # also one of JSON or of bytes that are no text
            return self._answer(400, {"error": str(error)})
        self.engine.submit(request)
        try:
            self._stream(request)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            request.gone = True  # its pages are free after the step that runs now

    def _stream(self, request: Request) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while (token := request.tokens.get()) is not None:
            line = json.dumps({"token": token}).encode() + b"\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
        self.wfile.write(b"0\r\n\r\n")

    def _answer(self, code: int, what: dict) -> None:
        body = json.dumps(what).encode() + b"\n"
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Nothing."""


class Server(ThreadingHTTPServer):
    """The server of an engine; port 0: one that is free."""

    daemon_threads, request_queue_size = True, 128

    def __init__(self, engine: Engine, port: int = 8000):
        super().__init__(("127.0.0.1", port), type("Bound", (Handler,), {"engine": engine}))
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


def ask(url: str, prompt: str, max_tokens: int, leave_after: int | None = None) -> list[int]:
    """A client: the tokens it gets, or the first ones, after which it hangs up."""
    body = json.dumps({"prompt": prompt, "max_tokens": max_tokens}).encode()
    found = []
    with urllib.request.urlopen(f"{url}/generate", body, timeout=120) as answer:
        for line in answer:
            found.append(json.loads(line)["token"])
            if len(found) == leave_after:
                break
    return found


def load(url: str, clients: int) -> list[tuple[int, float]]:
    """(tokens, seconds) of each of so many clients at once, a third of which leave early."""
    found: list = [None] * clients

    def client(i: int) -> None:
        start = time.perf_counter()
        tokens = ask(url, f"client {i} " * (1 + i % 5), 60, 7 if i % 3 == 0 else None)
        found[i] = (len(tokens), time.perf_counter() - start)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def main() -> None:
    """Serve, or serve and ask."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=16, help="sequences at a time")
    parser.add_argument("--pages", type=int, default=64, help="of 16 positions, in all")
    parser.add_argument("--load", type=int, default=0, help="clients that the script starts itself")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    engine = Engine(Model().eval(), batch=chosen.batch, page_size=16, pages=chosen.pages)
    engine.start()
    server = Server(engine, 0 if chosen.load else chosen.port)
    if not chosen.load:
        print(f"serving at {server.url}/generate; Ctrl-C stops it")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return
    threading.Thread(target=server.serve_forever, daemon=True).start()
    start = time.perf_counter()
    found = load(server.url, chosen.load)
    seconds = time.perf_counter() - start
    tokens = sum(count for count, _ in found)
    print(
        f"{chosen.load} clients got {tokens} tokens in {seconds:.2f} s ({tokens / seconds:.0f}/s)"
    )
    print(f"the slowest waited {max(wait for _, wait in found):.2f} s; {engine.stats()}")


if __name__ == "__main__":
    main()
