"""What `vllm-server` says of servers that are none, busy, locked or another program; tests/vllm runs a real one."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from sstoken.errors import SstokenError, UsageError
from sstoken.stages.backends import BackendOptions, check_backend, make_backend
from tests.factories import save_model, save_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("models") / "tiny")
    save_tokenizer(folder)
    return str(folder)


@pytest.fixture
def answers():
    """Replies by path: (status, what), or a list of them, one after the other."""
    return {}


@pytest.fixture
def url(answers):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            found = answers.get(self.path, (404, {}))
            status, what = found.pop(0) if isinstance(found, list) else found
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(what).encode())

        do_POST = do_GET  # noqa: N815

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("localhost", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}"
    server.shutdown()
    server.server_close()


def options(model, url, **more):
    settings = tuple(sorted({"url": url, **more}.items()))
    return BackendOptions(model, ("loss",), None, "float32", "cpu", None, False, settings)


def serve(answers, model, completion):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = np.unique(np.linspace(0, len(tokenizer) - 1, 64).astype(int)).tolist()
    answers["/v1/models"] = 200, {"data": [{"id": "m", "root": model, "max_model_len": 40}]}
    answers["/detokenize"] = 200, {"prompt": tokenizer.decode(ids)}
    answers["/v1/completions"] = completion


def completion(*log_p):
    given = [None, *({str(i + 2): {"logprob": value}} for i, value in enumerate(log_p))]
    return {"choices": [{"prompt_logprobs": given}]}


def losses(model, url):
    backend = make_backend("vllm-server", options(model, url))
    assert backend.max_length == 39
    ids = np.array([1, 2, 3], dtype=np.int32)
    [(_, signals)] = backend.measure([ids], [np.array([False, True, True])])
    return signals["loss"].tolist()


def test_a_busy_server_is_asked_again(model, url, answers):
    serve(answers, model, [(503, {}), (429, {}), (200, completion(-1.5, -0.25))])
    assert losses(model, url) == [1.5, 0.25]


def test_what_vllm_writes_for_no_probability_is_infinite(model, url, answers):
    serve(answers, model, (200, completion(-9999.0, 0.0)))
    assert losses(model, url) == [float("inf"), 0.0]


@pytest.mark.parametrize(
    ("reply", "line"),
    [
        ((200, {"choices": [{"text": "w1"}]}), "gives no prompt_logprobs of the tokens that were sent"),
        ((200, completion(-1.0)), "gives no prompt_logprobs"),
        ((200, completion(-1.0, 3.0)), "gives logits in place of log-probabilities"),
        ((400, {"error": {"message": "too long"}}), "/v1/completions answers 400: too long"),
        ((500, {}), "/v1/completions answers 500"),
    ],
)
def test_replies_of_no_use_are_one_line(reply, line, model, url, answers):
    serve(answers, model, reply)
    with pytest.raises(SstokenError, match=line) as caught:
        losses(model, url)
    assert "\n" not in str(caught.value)


def test_other_programs_are_refused_before_any_work(model, url, answers):
    with pytest.raises(UsageError, match="/v1/models answers 404: Not Found"):
        check_backend("vllm-server", options(model, url))
    answers["/v1/models"] = 401, {}
    with pytest.raises(UsageError, match="asks for a key; set VLLM_API_KEY"):
        check_backend("vllm-server", options(model, url))
    answers["/v1/models"] = 200, ["not", "an", "object"]
    with pytest.raises(UsageError, match="/v1/models answers 200: OK"):
        check_backend("vllm-server", options(model, url))


def test_no_server_is_one_line(model):
    with pytest.raises(UsageError, match=r"no answer from http://localhost:9 .*; start vllm serve, or name"):
        check_backend("vllm-server", options(model, "http://localhost:9"))


def test_wrong_addresses_and_numbers_are_refused(model):
    with pytest.raises(UsageError, match="no answer from nonsense"):
        check_backend("vllm-server", options(model, "nonsense://x"))
    with pytest.raises(UsageError, match="requests is 0"):
        check_backend("vllm-server", options(model, "http://localhost:9", requests=0))
