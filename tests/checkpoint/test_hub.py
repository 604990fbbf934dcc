"""Models are found by name, on a small local server with the part of the Hub's API that is used."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from phi3_jax.checkpoint.source import CheckpointError
from phi3_jax.sources.hub import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "phi3"}',
    "model.safetensors": b"weights",
    "tokenizer.model": b"pieces",
    "cl100k_base.tiktoken": b"ranks",
    "chat_template.jinja": b"{{ messages }}",
    "pytorch_model.bin": b"pickle",
    "README.md": b"# tiny",
}
WORDS = Tokenizer(models.WordLevel({"the": 0, "dog": 1, "<unk>": 2}, unk_token="<unk>"))
WORDS.pre_tokenizer = pre_tokenizers.Whitespace()
REPOSITORIES = {
    **dict.fromkeys(("org/tiny", "org/private"), FILES),
    "org/empty": {"README.md": FILES["README.md"]},
    "org/configured": {
        "config.json": b'{"model_type": "phi3", "num_hidden_layers": 7}',
        "generation_config.json": b'{"max_new_tokens": 5}',
        "model.safetensors": b"weights",
    },
    "org/words": {
        "tokenizer.json": WORDS.to_str().encode(),
        "tokenizer_config.json": b'{"unk_token": "<unk>", "model_max_length": 8}',
        "model.safetensors": b"weights",
    },
}


class _Hub(http.server.BaseHTTPRequestHandler):
    """A hub: org/tiny is open, org/private needs the token "good", org/gated refuses everyone."""

    requests: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        type(self).requests.append(self.path)
        path = self.path.partition("?")[0].strip("/")
        parts = path.removeprefix("api/models/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        files = REPOSITORIES.get(name, FILES)
        if name == "org/gated":
            self._send(403, {"X-Error-Code": "GatedRepo"})
        elif name == "org/private" and self.headers.get("Authorization") != "Bearer good":
            self._send(401, {"X-Error-Code": "RepoNotFound"})
        elif name == "org/broken":
            self._send(500, {})
        elif name not in REPOSITORIES:
            self._send(404, {"X-Error-Code": "RepoNotFound"})
        elif rest[0] == "resolve":
            content = files[rest[2]]
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self._send(200, headers, content, body)
        elif rest[1] not in ("main", COMMIT):
            self._send(404, {"X-Error-Code": "RevisionNotFound"})
        elif rest[0] == "revision":
            siblings = [{"rfilename": file} for file in files]
            self._json({"id": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False})
        else:
            oids = {file: hashlib.sha1(content).hexdigest() for file, content in files.items()}
            entries = [
                {"type": "file", "path": f, "size": len(files[f]), "oid": oid} for f, oid in oids.items()
            ]
            self._json(entries)

    def _json(self, content: object) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def _send(self, status: int, headers: dict[str, str], content: bytes = b"", body: bool = True) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


class Server:
    """Serves the hub above on a free local port until it is stopped."""

    def __init__(self) -> None:
        self.handler = type("Hub", (_Hub,), {"requests": []})
        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self.handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def stop(self) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


SCRIPT = """
import json, sys
from phi3_jax.sources.hub import resolve
from phi3_jax.checkpoint.source import CheckpointError
for name, options in json.load(sys.stdin):
    try:
        print(json.dumps({"path": str(resolve(name, **options))}))
    except CheckpointError as error:
        print(json.dumps({"error": str(error)}))
"""


TOKENIZE = """
import json, sys
from phi3_jax.tokenizer import Phi3Tokenizer
for name, options in json.load(sys.stdin):
    try:
        tokenizer = Phi3Tokenizer.from_pretrained(name, **options)
        print(json.dumps({"ids": tokenizer.encode("the dog"), "length": tokenizer.model_max_length}))
    except (ValueError, OSError) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
print(json.dumps({"jax": "jax" in sys.modules}))
"""


def run(
    url: str, home: Path, *calls: tuple[str, dict[str, Any]], script: str = SCRIPT, **variables: str
) -> list[dict[str, Any]]:
    """Resolves names in a new process, since huggingface_hub reads its variables when it is imported."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()
    }
    environment = kept | {"HF_ENDPOINT": url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"} | variables
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(calls),
        env=environment | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_fetched_once_then_offline(server: Server, tmp_path: Path) -> None:
    home = tmp_path / "home"
    # The same name from the network, and then in the three ways of being offline.
    (fetched,) = run(server.url, home, ("org/tiny", {}))
    folder = Path(fetched["path"])
    wanted = {name: FILES[name] for name in FILES if name not in ("pytorch_model.bin", "README.md")}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == wanted
    assert not any("pytorch_model.bin" in request for request in server.handler.requests)
    assert folder.is_relative_to(home)

    before = len(server.handler.requests)
    again, absent = run(
        server.url,
        home,
        ("org/tiny", {"local_files_only": True}),
        ("org/private", {"local_files_only": True}),
    )
    assert again == fetched
    assert "org/private is not complete in the cache and this run is offline" in absent["error"]
    again, absent = run(server.url, home, ("org/tiny", {}), ("org/private", {}), HF_HUB_OFFLINE="1")
    assert again == fetched
    assert "this run is offline" in absent["error"]
    assert "hf download org/private" in absent["error"]
    assert len(server.handler.requests) == before

    server.stop()
    again, absent = run(server.url, home, ("org/tiny", {}), ("org/private", {}))
    assert again == fetched
    assert "org/private is neither a local directory nor complete in the cache" in absent["error"]
    assert "the Hub cannot be reached" in absent["error"]


def test_errors_give_advice(server: Server, tmp_path: Path) -> None:
    calls: list[tuple[str, dict[str, Any]]] = [
        ("org/unknown", {}),
        ("org/gated", {}),
        ("org/private", {}),
        ("org/private", {"token": "good", "cache_dir": str(tmp_path / "elsewhere")}),
        ("org/tiny", {"revision": "v9"}),
        ("org/tiny", {"revision": COMMIT}),
        ("org/empty", {}),
        ("org/a--b", {}),
        ("org/broken", {}),
    ]
    answers = run(server.url, tmp_path / "home", *calls)
    unknown, gated, private, opened, revision, pinned, empty, invalid, broken = answers
    assert "org/unknown is neither a local directory nor a public repository on the Hub" in unknown["error"]
    assert "org/gated is gated: accept its conditions" in gated["error"]
    assert "HF_TOKEN" in gated["error"]
    assert "pass a token" in private["error"]
    assert Path(opened["path"]).is_relative_to(tmp_path / "elsewhere")
    assert "org/tiny has no revision 'v9'" in revision["error"]
    assert Path(pinned["path"]).name == COMMIT
    assert "org/empty holds no config.json" in empty["error"]
    assert "nor a valid name on the Hub" in invalid["error"]
    assert "answered with status 500" in broken["error"]


def test_every_kind_of_vocabulary_is_fetched_with_the_tokenizer_alone(server: Server, tmp_path: Path) -> None:
    (fetched,) = run(server.url, tmp_path, ("org/tiny", {"tokenizer_only": True}))
    names = {path.name for path in Path(fetched["path"]).iterdir()}
    assert names == {"tokenizer.model", "cl100k_base.tiktoken", "chat_template.jinja"}


def test_tokenizer_by_name_fetches_its_files_only(server: Server, tmp_path: Path) -> None:
    calls: list[tuple[str, dict[str, Any]]] = [
        ("org/words", {}),
        ("org/words", {"local_files_only": True, "model_max_length": 5}),
        ("org/words", {"revision": "v9"}),
        ("org/private", {"token": "bad"}),
        ("org/empty", {}),
        ("org/words.gguf", {}),
    ]
    fetched, again, revision, private, empty, file, modules = run(
        server.url, tmp_path, *calls, script=TOKENIZE
    )
    assert fetched == {"ids": [0, 1], "length": 8}
    assert again == {"ids": [0, 1], "length": 5}
    assert "CheckpointError: org/words has no revision 'v9'" in revision["error"]
    assert "CheckpointError: org/private is neither" in private["error"]
    assert "CheckpointError: org/empty holds no tokenizer" in empty["error"]
    assert "FileNotFoundError: no tokenizer at org/words.gguf" in file["error"]
    assert not any("safetensors" in request for request in server.handler.requests)
    assert modules == {"jax": False}


CONFIGURE = """
import json, sys
from phi3_jax import Phi3Config
from phi3_jax.config.generation_config import GenerationConfig
for name, options in json.load(sys.stdin):
    try:
        config = Phi3Config.from_pretrained(name, **options)
        tokens = GenerationConfig.from_pretrained(name).max_new_tokens
        print(json.dumps({"layers": config.num_hidden_layers, "tokens": tokens}))
    except (ValueError, OSError) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
"""


def test_configs_by_name_fetch_one_file_each(server: Server, tmp_path: Path) -> None:
    calls: list[tuple[str, dict[str, Any]]] = [
        ("org/configured", {}),
        ("org/configured", {"local_files_only": True, "num_hidden_layers": 3}),
        ("org/tiny", {}),
        ("org/empty", {}),
        ("org/unknown", {}),
        ("org/unknown.json", {}),
    ]
    fetched, again, plain, empty, unknown, file = run(server.url, tmp_path, *calls, script=CONFIGURE)
    assert fetched == {"layers": 7, "tokens": 5}
    assert again == {"layers": 3, "tokens": 5}
    assert plain["error"] == "CheckpointError: org/tiny holds no generation_config.json"
    assert empty["error"] == "CheckpointError: org/empty holds no config.json"
    assert "CheckpointError: org/unknown is neither" in unknown["error"]
    assert "FileNotFoundError: no config at org/unknown.json" in file["error"]
    assert not any("safetensors" in request for request in server.handler.requests)


def test_token_from_the_environment(server: Server, tmp_path: Path) -> None:
    (answer,) = run(server.url, tmp_path, ("org/private", {}), HF_TOKEN="good")
    assert (Path(answer["path"]) / "config.json").is_file()


def test_returns_local_paths_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org/tiny").mkdir(parents=True)
    assert resolve("org/tiny") == Path("org/tiny")
    assert resolve(tmp_path) == tmp_path
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert resolve("a.gguf") == Path("a.gguf")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/org") == tmp_path / "org"


@pytest.mark.parametrize(
    "name",
    [
        "model",
        "./out/model",
        "/no/such/place",
        "out/a/b",
        "out/model.gguf",
        "../x",
        "org/",
        "",
        Path("org/tiny"),
    ],
)
def test_rejects_paths_that_do_not_exist(
    name: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no network: none of these is treated as a name on the Hub."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist; give a directory"):
        resolve(name)


def test_rejects_a_file_that_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"neither a model's directory nor a \.gguf file"):
        resolve(tmp_path / "notes.txt")
