"""What a Hub on localhost holds: blobs in a folder under their hash, repositories in memory."""

import base64
import hashlib
import json
import threading
from pathlib import Path

LARGEST_REGULAR = 10_000_000


class RefusedError(Exception):
    """An answer other than 200."""

    def __init__(self, status, message, code=""):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Hub:
    """The state behind the server."""

    def __init__(self, folder, lfs_from=100_000):
        self.folder, self.lfs_from = Path(folder), lfs_from
        self.folder.mkdir(parents=True, exist_ok=True)
        self.repos, self.log, self.puts = {}, [], []
        self.lock = threading.Lock()
        self.hold_puts_after, self.held, self.release = None, threading.Event(), threading.Event()
        self.fail_commits, self.before_commit = 0, None

    def store(self, content):
        """Keep a regular file; its git object id."""
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        (self.folder / oid).write_bytes(content)
        return oid

    def commit(self, repo, branch, files, title):
        parent = repo["branches"].get(branch)
        facts = json.dumps([parent, sorted(files.items()), title, len(repo["commits"])])
        oid = hashlib.sha1(facts.encode()).hexdigest()
        repo["commits"][oid] = {"oid": oid, "files": files, "title": title, "parent": parent}
        repo["branches"][branch] = oid

    def commits(self, name, branch="main"):
        """Titles, newest first."""
        repo = self.repos[name]
        titles, oid = [], repo["branches"][branch]
        while oid:
            titles.append(repo["commits"][oid]["title"])
            oid = repo["commits"][oid]["parent"]
        return titles

    def files(self, name, branch="main"):
        """Content by path, at the branch's head."""
        repo = self.repos[name]
        found = repo["commits"][repo["branches"][branch]]["files"]
        return {path: (self.folder / (f["lfs"] or f["oid"])).read_bytes() for path, f in found.items()}

    def write(self, name, path, content, branch="main"):
        """Commit one file behind the clients' backs; content None removes it."""
        repo = self.repos[name]
        files = dict(repo["commits"][repo["branches"][branch]]["files"])
        files.pop(path, None)
        if content is not None:
            lfs = hashlib.sha256(content).hexdigest() if path.endswith(".parquet") else None
            files[path] = {"oid": self.store(content), "lfs": lfs, "size": len(content)}
            if lfs:
                (self.folder / lfs).write_bytes(content)
        self.commit(repo, branch, files, f"by hand: {path}")

    def create(self, name, private=False):
        repo = self.repos[name] = {"commits": {}, "branches": {}, "private": private}
        rules = b"*.parquet filter=lfs diff=lfs merge=lfs -text\n"
        first = {".gitattributes": {"oid": self.store(rules), "lfs": None, "size": len(rules)}}
        self.commit(repo, "main", first, "initial commit")

    def apply(self, key, value, head, files):
        path = value.get("path", "")
        if any(part in ("..", ".git", "") for part in path.split("/")) and key != "header":
            raise RefusedError(400, f"Invalid path: {path!r}")
        if key == "header" and value.get("parentCommit") not in (None, head["oid"]):
            raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
        if key == "file":
            content = base64.b64decode(value["content"])
            if len(content) > LARGEST_REGULAR or path.endswith(".parquet"):
                raise RefusedError(413, f"{path}: has to be uploaded with LFS")
            files[path] = {"oid": self.store(content), "lfs": None, "size": len(content)}
        elif key == "lfsFile":
            stored = self.folder / value["oid"]
            if not stored.exists():
                raise RefusedError(422, f"{path}: LFS object {value['oid']} was not uploaded")
            pointer = hashlib.sha1(value["oid"].encode()).hexdigest()
            files[path] = {"oid": pointer, "lfs": value["oid"], "size": stored.stat().st_size}
        elif key == "deletedFile" and files.pop(path, None) is None:
            raise RefusedError(404, "A file with this name doesn't exist", "EntryNotFound")
