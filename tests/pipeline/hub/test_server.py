"""The Hub on localhost refuses what the real one refuses."""

import base64
import hashlib
import json
import urllib.error
import urllib.request

import pytest

from tests.pipeline.hub.server import READ, STRANGER, WRITE, serve
from tests.pipeline.hub.store import LARGEST_REGULAR, Hub
from tests.support import PATIENCE


@pytest.fixture
def ask(tmp_path):
    """A function that sends a request and gives status, headers and body."""
    server = serve(Hub(tmp_path))
    server.RequestHandlerClass.hub.create("me/data")

    def send(method, path, content=None, token=WRITE, headers=None):
        body = content if isinstance(content, bytes) or content is None else json.dumps(content).encode()
        headers = (headers or {}) | ({"Authorization": f"Bearer {token}"} if token else {})
        request = urllib.request.Request(server.url + path, body, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    yield send
    server.shutdown()


def commit(ask, *lines, parent=None, **options):
    header = {"key": "header", "value": {"summary": "s", "parentCommit": parent}}
    content = b"\n".join(json.dumps(line).encode() for line in (header, *lines))
    return ask("POST", "/api/datasets/me/data/commit/main", content, **options)[0]


def regular(path, content):
    return {"key": "file", "value": {"path": path, "content": base64.b64encode(content).decode()}}


def large(path, content):
    return {"key": "lfsFile", "value": {"path": path, "oid": hashlib.sha256(content).hexdigest()}}


def test_accounts(ask):
    new = {"name": "new", "organization": "me", "type": "dataset"}
    assert ask("GET", "/api/datasets/me/data", token="hf_of_nobody")[0] == 401
    assert ask("POST", "/api/repos/create", new, token="")[0] == 401
    assert ask("POST", "/api/repos/create", new, token=READ)[0] == 403
    assert ask("POST", "/api/repos/create", new, token=STRANGER)[0] == 403
    assert ask("POST", "/api/repos/create", new)[0] == 200
    assert ask("POST", "/api/repos/create", new)[0] == 409
    assert commit(ask, regular("a", b"a"), token=READ) == 403
    assert commit(ask, regular("a", b"a"), token=STRANGER) == 403


def test_what_is_not_there(ask):
    for path, code in (
        ("/api/datasets/me/none", "RepoNotFound"),
        ("/api/datasets/me/data/revision/none", "RevisionNotFound"),
        ("/datasets/me/data/resolve/main/none", "EntryNotFound"),
    ):
        status, headers, _ = ask("GET", path)
        assert (status, headers["X-Error-Code"]) == (404, code)
    assert (
        ask("GET", "/api/datasets/me/none", token="")[0] == 401
    )  # missing or private: not said to strangers


def test_large_files(ask):
    content = b"x" * 1000
    oid = hashlib.sha256(content).hexdigest()
    assert ask("PUT", f"/_lfs/{oid}", b"y" * 1000)[0] == 400
    assert commit(ask, large("a.parquet", content)) == 422
    assert ask("PUT", f"/_lfs/{oid}", content)[0] == 200
    assert ask("POST", f"/_lfs/{oid}/verify", {"oid": oid, "size": 999})[0] == 422
    assert commit(ask, large("a.parquet", content)) == 200
    status, headers, body = ask(
        "GET", "/datasets/me/data/resolve/main/a.parquet", headers={"Range": "bytes=10-19"}
    )
    assert (status, headers["Content-Range"], body) == (206, "bytes 10-19/1000", b"x" * 10)
    beyond = {"Range": "bytes=1000-"}
    assert ask("GET", "/datasets/me/data/resolve/main/a.parquet", headers=beyond)[0] == 416


def test_commits(ask):
    head = json.loads(ask("GET", "/api/datasets/me/data")[2])["sha"]
    assert commit(ask, regular("a", b"a"), parent=head) == 200
    assert commit(ask, regular("b", b"b"), parent=head) == 412
    assert commit(ask, regular("b", b"x" * (LARGEST_REGULAR + 1))) == 413
    assert commit(ask, regular("b.parquet", b"PAR1")) == 413
    assert commit(ask, regular("../b", b"b")) == 400
    assert commit(ask, regular(".git/config", b"b")) == 400
    assert commit(ask, {"key": "deletedFile", "value": {"path": "none"}}) == 404


def test_branches_and_cards(ask):
    branch = "/api/datasets/me/data/branch/"
    assert ask("POST", branch + "new", {})[0] == 200
    assert ask("POST", branch + "new", {})[0] == 409
    assert ask("POST", branch + "a%20b", {})[0] == 400
    for card in ("---\nlicense: mine\n---\n", "---\n[\n---\n", "---\nsize_categories: [many]\n---\n"):
        assert ask("POST", "/api/validate-yaml", {"content": card})[0] == 400
    assert ask("POST", "/api/validate-yaml", {"content": "---\nlicense: mit\n---\n"})[0] == 200
