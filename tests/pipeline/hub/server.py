"""A Hugging Face Hub on localhost: its HTTP protocol for datasets, and its refusals.

`Hub.log` holds every request that was answered; `Hub.hold_puts_after` makes uploads hang, so that a client can be
killed in the middle of one.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.pipeline.hub.store import Hub, RefusedError

WRITE, READ, STRANGER = "hf_write_of_me", "hf_read_of_me", "hf_write_of_another"
USERS = {WRITE: ("me", "write"), READ: ("me", "read"), STRANGER: ("another", "write")}
LICENSES = {"mit", "apache-2.0", "cc-by-4.0", "other"}
SIZES = re.compile(r"n<1K|n>1T|(1|10|100)[KMB]<n<(1|10|100)[KMBT]")
_BRANCH = re.compile(r"(?!.*(\.\.|//|@\{|\.lock$))[A-Za-z0-9_][\w./-]*(?<![./])")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def answer(self):
        address = urlsplit(self.path)
        self.query, self.base = parse_qs(address.query), f"http://{self.headers['Host']}"
        self.cdn = f"http://localhost:{self.server.server_address[1]}/_cdn"  # another host, as the Hub's is
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            for method, pattern, function in ROUTES:
                match = re.fullmatch(pattern, address.path)
                if match and self.command in method:
                    self.user = self.authenticated()
                    function(self, **{k: unquote(v) for k, v in match.groupdict().items() if v is not None})
                    return
            raise RefusedError(404, "no such route")
        except RefusedError as refused:
            headers = {"X-Error-Message": refused.message} | (
                {"X-Error-Code": refused.code} if refused.code else {}
            )
            self.send(refused.status, {"error": refused.message}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

    def send(self, status, content=b"", headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": len(data)} | (headers or {})
        ).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.hub.log.append((self.command, urlsplit(self.path).path, status))
        if self.command != "HEAD":
            self.wfile.write(data)

    def authenticated(self):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return USERS.get(token, (None, None))

    def repo(self, name, write=False):
        repo = self.hub.repos.get(name)
        owner = self.user[0] == name.split("/")[0]
        if repo is None or (repo["private"] and not owner):
            raise RefusedError(404 if self.user[0] else 401, "Repository not found", "RepoNotFound")
        if write and not (owner and self.user[1] == "write"):
            raise RefusedError(403, "You don't have the rights to write to this repository")
        return repo

    def at(self, name, revision):
        repo = self.repo(name)
        revision = revision.removeprefix("refs/heads/")
        commit = repo["commits"].get(repo["branches"].get(revision, revision))
        if commit is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def create(self):
        asked = json.loads(self.body)
        if self.user[0] is None:
            raise RefusedError(401, "Invalid username or password.")
        name = f"{asked.get('organization') or self.user[0]}/{asked['name']}"
        if name.split("/")[0] != self.user[0] or self.user[1] != "write":
            raise RefusedError(
                403, f"You don't have the rights to create a dataset under {name.split('/')[0]!r}"
            )
        answer = {"url": f"{self.base}/datasets/{name}", "id": name, "name": name}
        with self.hub.lock:
            if name in self.hub.repos:
                return self.send(409, answer | {"error": "You already created this dataset repo"})
            self.hub.create(name, asked.get("visibility") == "private")
        return self.send(200, answer)

    def validate_yaml(self):
        text = json.loads(self.body)["content"]
        errors = []
        try:
            card = yaml.safe_load(text.split("---\n")[1])
            if not set([card["license"]] if "license" in card else []) <= LICENSES:
                errors.append('"license" must be one of the known ones')
            if not all(SIZES.fullmatch(size) for size in card.get("size_categories", [])):
                errors.append('"size_categories" is not one of the known ones')
            if not all(isinstance(tag, str) for tag in card.get("tags", [])):
                errors.append('"tags" must be strings')
        except (yaml.YAMLError, IndexError, AttributeError) as error:
            errors.append(str(error))
        self.send(400 if errors else 200, {"errors": [{"message": e} for e in errors], "warnings": []})

    def info(self, name, revision="main"):
        commit, repo = self.at(name, revision), self.repo(name)
        siblings = [{"rfilename": path} for path in sorted(commit["files"])]
        facts = {
            "_id": "0",
            "id": name,
            "sha": commit["oid"],
            "private": repo["private"],
            "siblings": siblings,
        }
        facts |= {"author": name.split("/")[0], "tags": [], "downloads": 0, "likes": 0, "gated": False}
        if card := commit["files"].get("README.md"):
            text = (self.hub.folder / card["oid"]).read_text()
            facts["cardData"] = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else None
        self.send(200, facts | {"disabled": False, "lastModified": "2026-01-01T00:00:00.000Z"})

    def tree(self, name, revision, path=""):
        files = self.at(name, revision)["files"]
        prefix = path.strip("/") + "/" if path else ""
        below = {p: f for p, f in files.items() if p.startswith(prefix)}
        if prefix and not below:
            raise RefusedError(404, f"{path} does not exist", "EntryNotFound")
        deep = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = [entry(p, f) for p, f in below.items() if deep or "/" not in p[len(prefix) :]]
        folders = {p[: p.index("/", len(prefix))] for p in below if "/" in p[len(prefix) :]}
        self.send(
            200, [{"type": "directory", "path": p, "oid": "0" * 40, "size": 0} for p in folders] + entries
        )

    def paths_info(self, name, revision):
        """What hf:// addresses look at: files and folders by name, without those that are not there."""
        files = self.at(name, revision)["files"]
        given = self.body.decode()
        asked = json.loads(given)["paths"] if given.startswith("{") else parse_qs(given)["paths"]
        found = [entry(path, files[path]) for path in asked if path in files]
        for path in asked:
            if any(file.startswith(f"{path}/") for file in files):
                found.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        self.send(200, found)

    def refs(self, name):
        branches = self.repo(name)["branches"].items()
        listed = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": oid} for b, oid in branches]
        self.send(200, {"branches": listed, "tags": [], "converts": []})

    def branch(self, name, revision):
        repo = self.repo(name, write=True)
        if not _BRANCH.fullmatch(revision):
            raise RefusedError(400, f"Invalid reference for a branch: {revision}")
        if revision in repo["branches"]:
            raise RefusedError(409, "Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        repo["branches"][revision] = self.at(name, start)["oid"]
        self.send(200, {})

    def preupload(self, name, revision):
        self.repo(name, write=True)
        files = self.at(name, revision)["files"]

        def mode(file):
            old = files.get(file["path"])
            large = file["path"].endswith(".parquet") or file["size"] >= self.hub.lfs_from
            oid = old and (old["lfs"] or old["oid"])
            facts = {"path": file["path"], "shouldIgnore": False, "oid": oid}
            return facts | {"uploadMode": "lfs" if large else "regular"}

        self.send(200, {"files": [mode(file) for file in json.loads(self.body)["files"]]})

    def batch(self, name):
        self.repo(name, write=True)

        def actions(o):
            if (self.hub.folder / o["oid"]).exists():
                return o
            href = f"{self.base}/_lfs/{o['oid']}"
            return o | {"actions": {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}}

        self.send(
            200, {"transfer": "basic", "objects": [actions(o) for o in json.loads(self.body)["objects"]]}
        )

    def put(self, oid):
        with self.hub.lock:
            hold = self.hub.hold_puts_after is not None and len(self.hub.puts) >= self.hub.hold_puts_after
            if not hold:
                self.hub.puts.append(oid)
        if hold:
            self.hub.held.set()
            self.hub.release.wait(60)
            self.close_connection = True
            return
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise RefusedError(400, "The content does not have this SHA-256")
        (self.hub.folder / f"{oid}.tmp").write_bytes(self.body)
        (self.hub.folder / f"{oid}.tmp").replace(self.hub.folder / oid)
        self.send(200, b"", {"ETag": f'"{oid}"'})

    def verify(self, oid):
        path = self.hub.folder / oid
        if not path.exists() or path.stat().st_size != json.loads(self.body)["size"]:
            raise RefusedError(422, "The object is not there, or has another size")
        self.send(200, {})

    def commit(self, name, revision):
        repo = self.repo(name, write=True)
        lines = [json.loads(line) for line in self.body.splitlines()]
        if self.hub.before_commit is not None:
            meanwhile, self.hub.before_commit = self.hub.before_commit, None
            meanwhile()
        with self.hub.lock:
            if self.hub.fail_commits:
                self.hub.fail_commits -= 1
                raise RefusedError(500, "Internal Error")
            head = self.at(name, revision)
            if revision not in repo["branches"]:
                raise RefusedError(400, "A commit goes onto a branch")
            files = dict(head["files"])
            for line in lines:
                self.hub.apply(line["key"], line["value"], head, files)
            self.hub.commit(repo, revision, files, lines[0]["value"]["summary"])
            oid = repo["branches"][revision]
        self.send(
            200, {"success": True, "commitOid": oid, "commitUrl": f"{self.base}/datasets/{name}/commit/{oid}"}
        )

    def resolve(self, name, revision, path):
        commit = self.at(name, revision)
        file = commit["files"].get(path)
        if file is None:
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        etag = f'"{file["lfs"] or file["oid"]}"'
        headers = {"ETag": etag, "X-Repo-Commit": commit["oid"], "Accept-Ranges": "bytes"}
        if file["lfs"]:
            headers |= {"X-Linked-Size": file["size"], "X-Linked-Etag": etag}
            return self.send(302, b"", headers | {"Location": f"{self.cdn}/{file['lfs']}"})
        return self.content(file["oid"], headers)

    def content(self, oid, headers=None):
        if not (self.hub.folder / oid).is_file():
            raise RefusedError(404, "The storage has lost this object")
        data = (self.hub.folder / oid).read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and int(asked[1]) >= len(data):
            raise RefusedError(416, "Requested range not satisfiable")
        if asked:
            first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            headers = (headers or {}) | {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
            data = data[first : last + 1]
        self.send(206 if asked else 200, data, headers)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # of 5, connections made at once are lost, and tried again after up to a minute


def entry(path, file):
    facts = {"type": "file", "path": path, "size": file["size"], "oid": file["oid"]}
    return facts | (
        {"lfs": {"oid": file["lfs"], "size": file["size"], "pointerSize": 134}} if file["lfs"] else {}
    )


_REPO = r"/api/datasets/(?P<name>[^/]+/[^/]+)"
_FILES = r"/datasets/(?P<name>[^/]+/[^/]+?)"
ROUTES = [
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("GET", rf"{_REPO}", Handler.info),
    ("GET", rf"{_REPO}/revision/(?P<revision>[^/]+)", Handler.info),
    ("GET", rf"{_REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", Handler.tree),
    ("POST", rf"{_REPO}/paths-info/(?P<revision>[^/]+)", Handler.paths_info),
    ("GET", rf"{_REPO}/refs", Handler.refs),
    ("POST", rf"{_REPO}/branch/(?P<revision>[^/]+)", Handler.branch),
    ("POST", rf"{_REPO}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", rf"{_REPO}/commit/(?P<revision>[^/]+)", Handler.commit),
    ("POST", rf"{_FILES}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/_lfs/(?P<oid>[0-9a-f]{64})", Handler.put),
    ("POST", r"/_lfs/(?P<oid>[0-9a-f]{64})/verify", Handler.verify),
    ("GET HEAD", rf"{_FILES}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
    ("GET HEAD", r"/_cdn/(?P<oid>[0-9a-f]{64})", Handler.content),
]


def serve(hub):
    """A server in threads of this process; its address is `server.url`."""
    server = Server(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    return server
