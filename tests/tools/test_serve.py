"""examples/serve.py: the server of the guide to decoding, under load, with clients that leave."""

import json
import runpy
import socket
import threading
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
import torch
from repository import ROOT

serve = SimpleNamespace(**runpy.run_path(str(ROOT / "examples" / "serve.py")))


@pytest.fixture
def server(request):
    """A running server with few pages, so that requests wait and are preempted."""
    torch.manual_seed(0)
    model = serve.Model(width=32, heads=4).double().eval()  # no near ties between tokens
    engine = serve.Engine(model, batch=4, max_length=64, page_size=4, pages=28)
    engine.start()
    server = serve.Server(engine, 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server, engine
    server.shutdown()
    server.server_close()
    engine.stop()
    engine.join()
    thread.join()


def alone(model, prompt: str, count: int) -> list[int]:
    """What the model writes with nobody else there."""
    caches = model.caches(batch=1, max_length=128)
    found, tokens = [], list(prompt.encode())
    while len(found) < count:
        found += model.next_tokens(caches, [tokens], [0])
        tokens = found[-1:]
    return found


def at_once(*calls):
    """The results of functions that run in a thread each."""
    found = [None] * len(calls)

    def run(i):
        found[i] = calls[i]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a client waits for ever"
    return found


def idle(server) -> dict:
    """The figures of a server whose engine has come to rest, all pages free."""
    for _ in range(1000):
        with urllib.request.urlopen(f"{server.url}/stats") as answer:
            found = json.loads(answer.read())
        if not found["active"] and not found["waiting"] and found["free_pages"] == 28:
            return found
    raise AssertionError(found)


def test_everybody_gets_the_tokens_of_a_client_alone(server):
    """Rows, pages or positions mixed up where requests join, leave and are preempted."""
    server, engine = server
    prompts = [f"{i}" * (1 + 3 * i % 11) for i in range(10)]
    got = at_once(*[lambda p=p: serve.ask(server.url, p, 30) for p in prompts])
    assert got == [alone(engine.model, p, 30) for p in prompts]
    found = idle(server)
    assert found["preempted"] > 0
    assert found["steps"] < 10 * 29, "one after the other"


def test_clients_that_leave(server):
    """Pages of a client that has gone, or a step for nobody; those that stay must not notice."""
    server, engine = server
    calls = [lambda i=i: serve.ask(server.url, f"stay {i}", 25) for i in range(3)]
    calls += [lambda i=i: serve.ask(server.url, f"go {i}", 55, 2) for i in range(5)]

    def hang_up():
        with socket.create_connection(server.server_address) as line:
            body = b'{"prompt": "x", "max_tokens": 60}'
            line.sendall(
                b"POST /generate HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )

    got = at_once(*calls, hang_up)
    for i in range(3):
        assert got[i] == alone(engine.model, f"stay {i}", 25)
    idle(server)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "Expecting property name"), (b"[]", "the body must be"), (b"\xff", "decode byte"),
        (b'{"prompt": ""}', "got 0 and 64"), (b'{"prompt": "x", "max_tokens": 64}', "got 1 and 64"),
        (b'{"prompt": "x", "max_tokens": true}', "got 1 and True"),
    ],
)  # fmt: skip
def test_bad_requests(server, body, message):
    """A request that kills the thread of the model, and with it everybody's."""
    server, _ = server
    with pytest.raises(urllib.error.HTTPError) as found:
        urllib.request.urlopen(f"{server.url}/generate", body)
    assert found.value.code == 400 and message in json.loads(found.value.read())["error"]
    assert len(serve.ask(server.url, "still there", 2)) == 2


def test_an_engine_that_stops_lets_its_clients_go(server, monkeypatch):
    """Clients that wait for ever after the model's thread has ended."""
    server, engine = server
    seen = []
    monkeypatch.setattr(threading, "excepthook", lambda found: seen.append(found.exc_type))
    engine.model.next_tokens = None  # as a fault in the model
    assert at_once(lambda: serve.ask(server.url, "x", 3)) == [[]]
    engine.join()
    assert seen == [TypeError] and serve.ask(server.url, "x", 3) == []
