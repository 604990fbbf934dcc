"""Object stores for tests: in memory, and servers of Cloud Storage and S3 on this machine that can fail."""

import http
import http.client
import http.server
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import fsspec
import pytest

_numbers = count()
KINDS = ("memory", "gs", "s3")
SLOW_SECONDS = 0.5


class Request(NamedTuple):
    """A request to a server, and the bytes of its answer."""

    method: str
    path: str
    bytes: int


class Proxy:
    """A server that passes requests on to another one, or fails as `fault` says.

    Attributes:
        fault: gets the number of a request, from 0, and its path; returns "503", "403", "cut" (half of the
            answer), "lost" (all of it, after the server did what was asked), "slow", or None.
        requests: what was asked and answered.
    """

    def __init__(self, port: int):
        self.fault: Callable[[int, str], str | None] = lambda number, path: None
        self.requests: list[Request] = []
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, port))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(proxy: Proxy, port: int) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # clients wait for it to say that they may continue

        def do_GET(self) -> None:
            number = len(proxy.requests)
            fault = proxy.fault(number, self.path)
            proxy.requests.append(Request(self.command, self.path, 0))
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length)
            if len(body) < length:  # the client was killed, and the server would wait for the rest
                self.close_connection = True
                return
            if fault is None and _exists_already(port, self.path, body):
                fault = "412"
            if fault in ("503", "403", "412"):
                self.send_response(int(fault))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if fault == "slow":
                time.sleep(SLOW_SECONDS)
            connection = http.client.HTTPConnection("127.0.0.1", port)
            headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            if fault == "lost":
                self.close_connection = True
                return
            proxy.requests[number] = Request(self.command, self.path, len(content))
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
            size = answer.getheader("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", size or str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
            self.close_connection = fault == "cut"

        def handle(self) -> None:
            with suppress(ConnectionError):  # a client may end at any time
                super().handle()

        def log_message(self, *_: object) -> None:
            pass

    for method in ("HEAD", "PUT", "POST", "DELETE", "PATCH"):
        setattr(Handler, f"do_{method}", Handler.do_GET)
    return Handler


def _exists_already(port: int, path: str, body: bytes) -> bool:
    """Whether a request to Cloud Storage creates a file that exists; its emulator would replace the file."""
    name = re.search(rb'"name": "([^"]+)"', body)
    if "ifGenerationMatch=0" not in path or name is None:
        return False
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", f"/storage/v1/b/bucket/o/{quote(name[1], safe='')}")
    status = connection.getresponse().status
    connection.close()
    return status == http.HTTPStatus.OK


class Store(NamedTuple):
    """A folder of a store."""

    url: str
    """Its URL."""
    proxy: Proxy | None
    """What is in front of its server; None if it is in memory."""

    def empty_folder(self) -> "Store":
        """Returns a new folder of the store, whose server works."""
        if self.proxy is not None:
            self.proxy.requests.clear()
            self.proxy.fault = lambda number, path: None
        return Store(f"{self.url}/{next(_numbers)}", self.proxy)

    def put(self, name: str, content: bytes) -> str:
        """Writes a file and returns its URL."""
        url = f"{self.url}/{name}"
        files, path = fsspec.url_to_fs(url, use_listings_cache=False)
        files.pipe_file(path, content)
        return url

    def put_folder(self, name: str, folder: Path) -> str:
        """Writes the files of a folder and returns its URL."""
        for path in sorted(folder.iterdir()):
            self.put(f"{name}/{path.name}", path.read_bytes())
        return f"{self.url}/{name}"

    def get(self, name: str) -> bytes:
        """Reads a file."""
        files, path = fsspec.url_to_fs(f"{self.url}/{name}", use_listings_cache=False)
        content: bytes = files.cat_file(path)
        return content

    def remove(self, name: str) -> None:
        """Deletes a file."""
        files, path = fsspec.url_to_fs(f"{self.url}/{name}", use_listings_cache=False)
        files.rm_file(path)


@contextmanager
def open_store(kind: str) -> Iterator[Store]:
    """Starts a store, and yields its bucket; skips the test if its library or its server is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        if kind == "memory":
            yield Store("memory://bucket", None)
        elif kind == "gs":
            with _cloud_storage(patch) as proxy:
                yield Store("gs://bucket", proxy)
        else:
            with _s3(patch) as proxy:
                yield Store("s3://bucket", proxy)


@contextmanager
def _cloud_storage(patch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks Google what kind of bucket it is
    gcsfs = pytest.importorskip("gcsfs")
    servers = pytest.importorskip("gcp_storage_emulator.server")
    server = servers.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    proxy = Proxy(server._api._httpd.server_address[1])
    patch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
    patch.setenv("TENSORSTORE_GCS_HTTP_URL", proxy.url)
    gcsfs.GCSFileSystem.clear_instance_cache()
    yield proxy
    gcsfs.GCSFileSystem.clear_instance_cache()
    proxy.close()
    server.stop()


@contextmanager
def _s3(patch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    s3fs = pytest.importorskip("s3fs")
    servers = pytest.importorskip("moto.server")
    server = servers.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    proxy = Proxy(server.get_host_and_port()[1])
    patch.setenv("AWS_ENDPOINT_URL", proxy.url)
    patch.setenv("AWS_ACCESS_KEY_ID", "key")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().makedirs("bucket", exist_ok=True)  # all servers of a process have the same buckets
    yield proxy
    s3fs.S3FileSystem.clear_instance_cache()
    proxy.close()
    server.stop()
