"""A server on the loopback that answers as a plan says: cut off, stalled, redirected, endless."""

import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers each request as the next step of the server's plan says, then as `whole`."""

    server: "Server"

    def do_GET(self) -> None:
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.server.requests.append(begin)
        self.close_connection = True
        step = self.server.plan.pop(0) if self.server.plan else whole
        step(self, begin)

    def start(self, status: int, **headers: object) -> None:
        """Send the head of an answer."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    """Serves one file on the loopback.

    Attributes:
        plan: how to answer the next requests.
        requests: the first byte that each request asked for.
        closing: set when the test is over.
    """

    def __init__(self, content: bytes, *plan: Callable[[Handler, int], None]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = content
        self.plan = list(plan)
        self.requests: list[int] = []
        self.closing = threading.Event()

    def url(self, name: str = "file") -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def handle_error(self, *_: object) -> None:
        """Say nothing: clients of this server hang up by design."""


def whole(handler: Handler, begin: int) -> None:
    cut_at(len(handler.server.content))(handler, begin)


def cut_at(end: int) -> Callable[[Handler, int], None]:
    """Announce everything from `begin` on, and hang up at `end`."""

    def step(handler: Handler, begin: int) -> None:
        content = handler.server.content
        ranges = {"Content_Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"}
        status = 206 if begin else 200
        handler.start(status, Content_Length=len(content) - begin, **(ranges if begin else {}))
        handler.wfile.write(content[begin:end])
        handler.wfile.flush()

    return step


def stall_at(end: int) -> Callable[[Handler, int], None]:
    def step(handler: Handler, begin: int) -> None:
        cut_at(end)(handler, begin)
        handler.server.closing.wait(30)

    return step


def without_ranges(handler: Handler, begin: int) -> None:
    whole(handler, 0)


def answer(status: int, **headers: object) -> Callable[[Handler, int], None]:
    return lambda handler, begin: handler.start(status, Content_Length=0, **headers)


def endless(handler: Handler, begin: int) -> None:
    handler.start(200)
    while not handler.server.closing.is_set():
        handler.wfile.write(bytes(1 << 16))


@contextmanager
def running() -> Iterator[Callable[..., Server]]:
    """Give what starts a server; within the block they serve."""
    servers: list[Server] = []

    def start(content: bytes, *plan: Callable[[Handler, int], None]) -> Server:
        servers.append(Server(content, *plan))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.closing.set()
        server.shutdown()
        server.server_close()
