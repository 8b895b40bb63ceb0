"""A chat-completions endpoint that answers by script, for faults no real server makes on demand.

It speaks HTTP/1.1 with server-sent events on a local port, in a thread of its own.
"""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


def text(*pieces: str, finish: str | None = "stop") -> list[dict[str, Any]]:
    """Chunks of a streamed answer."""
    chunks: list[dict[str, Any]] = [{"content": one} for one in pieces]
    return [*chunks, {"finish_reason": finish}] if finish else chunks


def calls(*wanted: tuple[str, str], cut: int = 7) -> list[dict[str, Any]]:
    """Chunks of streamed tool calls; arguments come in pieces of ``cut`` characters."""
    chunks: list[dict[str, Any]] = []
    for index, (name, arguments) in enumerate(wanted):
        head = {"index": index, "id": f"c{index}", "function": {"name": name, "arguments": ""}}
        chunks.append({"tool_calls": [head]})
        for start in range(0, len(arguments), cut):
            piece = {"arguments": arguments[start : start + cut]}
            chunks.append({"tool_calls": [{"index": index, "function": piece}]})
    return [*chunks, {"finish_reason": "tool_calls"}]


class ChatStub:
    """Answers request i with ``answers[i]``, the last one again and again; or with what a function
    gives for the request.

    An answer is a list: chunks; an int is an HTTP status that ends it; "hang" waits until the stub
    is closed; "cut" drops the connection.
    """

    def __init__(self, *answers: list[Any] | Callable[[dict[str, Any]], list[Any]]) -> None:
        self.requests: list[dict[str, Any]] = []
        self._answers = answers
        self._closed = threading.Event()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                stub._answer(self)

            def log_message(self, *_args: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        chosen = self._answers[min(len(self.requests), len(self._answers) - 1)]
        self.requests.append(json.loads(body))
        answer = chosen(self.requests[-1]) if callable(chosen) else chosen
        handler.close_connection = True
        if answer and isinstance(answer[0], int):
            handler.send_response(answer[0])
            handler.send_header("Content-Length", "2")
            handler.end_headers()
            handler.wfile.write(b"{}")
            return
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Connection", "close")
        handler.end_headers()
        try:
            for one in answer:
                if one == "hang":
                    handler.wfile.flush()
                    self._closed.wait()
                    return
                if one == "cut":
                    return
                handler.wfile.write(f"data: {json.dumps(_chunk(one))}\n\n".encode())
                handler.wfile.flush()
            handler.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            return  # the client has gone


def _chunk(delta: dict[str, Any]) -> dict[str, Any]:
    finish = delta.get("finish_reason")
    choice = {
        "index": 0,
        "delta": {key: value for key, value in delta.items() if key != "finish_reason"},
        "finish_reason": finish,
    }
    return {
        "id": "chat",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": "stub",
        "choices": [choice],
    }
