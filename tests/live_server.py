"""A camera on loopback for tests: an HTTP server in a thread whose connections do what a test says."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Callable, Iterable

import numpy as np
from PIL import Image

BOUNDARY = b"frame"
Connection = Callable[["Camera", socket.socket], None]
"""What one connection does, from the request on; it is closed afterwards."""


def picture(level: int, size: tuple[int, int] = (48, 64)) -> bytes:
    """A JPEG picture of one grey level."""
    file = io.BytesIO()
    Image.fromarray(np.full((*size, 3), level, np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()


class Camera:
    """Serves MJPEG. The n-th connection does the n-th of `connections`, and later ones what the last one does.

    Attributes:
        asked: how many connections there were.
        url: its address.
    """

    def __init__(self, *connections: Connection, login: str = "", query: str = "") -> None:
        self.asked, self.leave = 0, threading.Event()
        self._connections = connections
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://{login}127.0.0.1:{self.port}/live{query}"
        self._threads = [threading.Thread(target=self._serve, name="camera")]

    def __enter__(self) -> Camera:
        self._threads[0].start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.leave.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        while not self.leave.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            act = self._connections[min(self.asked, len(self._connections) - 1)]
            self.asked += 1
            self._threads.append(threading.Thread(target=self._answer, args=(act, client), name="camera"))
            self._threads[-1].start()

    def _answer(self, act: Connection, client: socket.socket) -> None:
        with client:
            try:
                client.recv(65536)
                act(self, client)
            except OSError:  # the reader has left
                return


def frames(
    levels: Iterable[int], then: Connection | None = None, size: tuple[int, int] = (48, 64), pause: float = 0.0
) -> Connection:
    """Send a picture for each level, `pause` seconds apart, then do something else; by default, end the connection."""

    def act(camera: Camera, client: socket.socket) -> None:
        kind = b"multipart/x-mixed-replace; boundary=" + BOUNDARY
        client.sendall(b"HTTP/1.0 200 OK\r\nContent-Type: " + kind + b"\r\n\r\n")
        for level in levels:
            data = picture(level, size)
            head = b"--" + BOUNDARY + b"\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(data)
            client.sendall(head + data + b"\r\n")
            if camera.leave.wait(pause):
                return
        if then is not None:
            then(camera, client)

    return act


def stream(data: bytes, kind: str = "video/mp2t") -> Connection:
    """Send a stream of unknown length, and end it."""

    def act(camera: Camera, client: socket.socket) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n{len(data):x}\r\n"
        client.sendall(head.encode() + data + b"\r\n0\r\n\r\n")

    return act


def stall(camera: Camera, client: socket.socket) -> None:
    """Send nothing, and keep the connection."""
    camera.leave.wait(30)


def hang_up(camera: Camera, client: socket.socket) -> None:
    """Reset the connection."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")


def answer(status: str) -> Connection:
    """Refuse, such as with "503 Service Unavailable"."""

    def act(camera: Camera, client: socket.socket) -> None:
        client.sendall(f"HTTP/1.0 {status}\r\nContent-Length: 0\r\n\r\n".encode())

    return act


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
