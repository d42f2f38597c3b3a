"""An HTTP server on the loopback interface that can send errors, cut off or stall."""

import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers requests with the steps of the server's plan, then with the whole file."""

    server: "Server"

    def do_GET(self) -> None:
        self.server.requests += 1
        self.close_connection = True
        step = self.server.plan.pop(0) if self.server.plan else whole
        step(self)

    def start(self, status: int, **headers: object) -> None:
        """Send the status line and the headers."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


Step = Callable[[Handler], None]


class Server(http.server.ThreadingHTTPServer):
    """Serves one file on the loopback interface.

    Attributes:
        plan: how to answer the next requests.
        requests: number of requests so far.
        closing: set when the test is over.
    """

    def __init__(self, content: bytes, *plan: Step) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = content
        self.plan = list(plan)
        self.requests = 0
        self.closing = threading.Event()

    def url(self, name: str = "file") -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def handle_error(self, *_: object) -> None:
        """Print nothing: clients of this server close their connections early."""


def whole(handler: Handler) -> None:
    cut_at(len(handler.server.content))(handler)


def cut_at(end: int) -> Step:
    """Announce the whole file, and close the connection after `end` bytes."""

    def step(handler: Handler) -> None:
        content = handler.server.content
        handler.start(200, Content_Length=len(content))
        handler.wfile.write(content[:end])
        handler.wfile.flush()

    return step


def stall_at(end: int) -> Step:
    """Announce the whole file, and send nothing after `end` bytes."""

    def step(handler: Handler) -> None:
        cut_at(end)(handler)
        handler.server.closing.wait(30)

    return step


def answer(status: int) -> Step:
    return lambda handler: handler.start(status, Content_Length=0)


@contextmanager
def running() -> Iterator[Callable[..., Server]]:
    """Yield a function that starts a server. All servers run until the block ends."""
    servers: list[Server] = []

    def start(content: bytes, *plan: Step) -> Server:
        servers.append(Server(content, *plan))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.closing.set()
        server.shutdown()
        server.server_close()
