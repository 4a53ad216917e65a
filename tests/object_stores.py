"""An S3 service on localhost: moto's server, which speaks the real protocol."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

needs_s3 = pytest.mark.skipif(
    not (find_spec("moto") and find_spec("s3fs")) and not os.environ.get("CI"),
    reason="needs s3fs and moto[s3], which make setup installs",
)
SECRET = "planted-secret-7f3a91"
BUCKET = "bucket"


@contextmanager
def s3_server(cache: Path) -> Iterator[str]:
    """Serve an empty bucket; the environment says where and who. Yields the address."""
    import fsspec
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    urlopen(
        Request(f"http://{host}:{port}/moto-api/reset", method="POST")
    ).close()  # an earlier server's buckets
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_EC2_METADATA_DISABLED": "true",
            "SSTOKEN_CACHE": str(cache),
        }.items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        fsspec.filesystem("s3", use_listings_cache=False).mkdir(BUCKET)
        try:
            yield f"http://{host}:{port}"
        finally:
            server.stop()
            fsspec.get_filesystem_class("s3").clear_instance_cache()
