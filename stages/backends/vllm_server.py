"""The backend `vllm-server`: losses from a vLLM server that runs already, over its OpenAI-compatible API."""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import urllib3
from numpy.typing import NDArray
from pydantic import Field

from sstoken.errors import SstokenError, first_line
from sstoken.signals import LOSS
from sstoken.stages.backends import Backend, BackendOptions, Measured, read_settings
from sstoken.stages.backends.vllm_limits import load_config
from sstoken.stages.checkpoints import adapter_base, local_folder, own_tokenizer, place
from sstoken.stages.stage import SPEED_ONLY, Settings

ALONE = "loss_unconditional"
KEY = "VLLM_API_KEY"
"""Environment variable with the server's key."""
_RETRIES = urllib3.Retry(
    4, backoff_factor=0.25, status_forcelist=(429, 502, 503, 504), allowed_methods=None, raise_on_status=False
)
_TIMEOUT = urllib3.Timeout(connect=10, read=600)
_INFINITE = -9999.0
"""What vLLM writes for a log-probability of minus infinity."""
_PROBE = 64
"""Token ids by which the two tokenizers are compared."""


class VllmServerSettings(Settings):
    """Backend options of `vllm-server`."""

    url: Annotated[str, SPEED_ONLY] = "http://localhost:8000"
    """The server's address."""
    model: str | None = None
    """The name by which it serves the checkpoint. None: the model that it loaded from the checkpoint's path or id."""
    requests: Annotated[int, Field(ge=1, le=1024), SPEED_ONLY] = 32
    """Requests in flight at once."""


class VllmServerBackend(Backend):
    """Losses from a server; the checkpoint's folder says what it should serve, and gives the tokenizer."""

    settings = VllmServerSettings
    several_workers = False
    signals = frozenset({LOSS, ALONE})

    @classmethod
    def refusal(cls, options: BackendOptions) -> str | None:
        """See `Backend.refusal`; asks the server."""
        try:
            server = _Server(_read(options))
            _check_tokenizer(server, _find(server, options)["id"], options)
        except SstokenError as error:
            return str(error)
        return None

    def __init__(self, options: BackendOptions) -> None:
        """Find the checkpoint among the served models."""
        settings = _read(options)
        self._options, self._requests = options, settings.requests
        self._server = _Server(settings)
        self._model = _find(self._server, options)
        full = adapter_base(options.checkpoint) or options.checkpoint
        self._config = load_config(full, options.trust_remote_code).get_text_config()

    @property
    def vocab_size(self) -> int:
        """See `Backend.vocab_size`."""
        return int(self._config.vocab_size)

    @property
    def max_length(self) -> int | None:
        """The checkpoint's own, or the server's less the token that each request has to generate."""
        served = self._model.get("max_model_len")
        own = getattr(self._config, "max_position_embeddings", None)
        limits = [own, None if served is None else served - 1]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def dtype(self) -> str:
        """See `Backend.dtype`."""
        return "the server's"

    @property
    def remark(self) -> str:
        """The server's version, and what its API does not tell."""
        version = self._server.ask("GET", "/version").get("version")
        return f"a server of vLLM {version}, whose weights and dtype cannot be checked"

    def measure(
        self, sequences: Sequence[NDArray[np.int32]], response_masks: Sequence[NDArray[np.bool_]]
    ) -> Iterator[tuple[int, Measured]]:
        """See `Backend.measure`."""
        rest: list[Measured] = [{} for _ in sequences]
        if ALONE in self._options.signals:
            from sstoken.measure.second_pass import losses_alone  # loads torch

            alone = losses_alone(
                sequences, response_masks, lambda responses, masks, _: self._measure(responses, masks)
            )
            rest = [{ALONE: losses} for losses in alone]
        if LOSS not in self._options.signals:
            yield from enumerate(rest)
            return
        for index, signals in self._measure(sequences, response_masks):
            yield index, signals | rest[index]

    def _measure(
        self, sequences: Sequence[NDArray[np.int32]], masks: Sequence[NDArray[np.bool_]]
    ) -> Iterator[tuple[int, Measured]]:
        """Yield each sequence's losses, in order; one request each, several at once."""
        with ThreadPoolExecutor(self._requests) as threads:
            for index, losses in enumerate(threads.map(self._losses, sequences, masks)):
                yield index, {LOSS: losses}

    def _losses(self, ids: NDArray[np.int32], mask: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Ask for the losses of one sequence's response tokens."""
        places = np.flatnonzero(mask)
        if not places.size:
            return np.zeros(0, np.float32)
        reply = self._server.ask(
            "POST",
            "/v1/completions",
            {
                "model": self._model["id"],
                "prompt": ids.tolist(),
                "max_tokens": 1,
                "temperature": 0,
                "prompt_logprobs": 0,
            },
        )
        try:
            given = reply["choices"][0]["prompt_logprobs"]
            log_p = np.array([given[i][str(ids[i])]["logprob"] for i in places], dtype=np.float64)
        except (KeyError, IndexError, TypeError, ValueError):
            raise SstokenError(
                f"{self._server.url} gives no prompt_logprobs of the tokens that were sent; it has to be a vLLM server"
            ) from None
        if (log_p > 1e-3).any():
            raise SstokenError(
                f"{self._server.url} gives logits in place of log-probabilities; start it without --logprobs-mode"
            )
        log_p[log_p <= _INFINITE] = -np.inf
        return (-log_p).clip(min=0).astype(np.float32)


class _Server:
    """Asks a server, and tells in one line what went wrong."""

    def __init__(self, settings: VllmServerSettings) -> None:
        self.url = settings.url.rstrip("/").removesuffix("/v1")
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        self._pool = urllib3.PoolManager(
            maxsize=settings.requests, block=True, headers=headers, retries=_RETRIES, timeout=_TIMEOUT
        )

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the reply to a request.

        Raises:
            SstokenError: there is none, or it is an error.
        """
        content = None if body is None else json.dumps(body)
        try:
            reply = self._pool.request(method, f"{self.url}{path}", body=content)
            found = json.loads(reply.data)
        except urllib3.exceptions.HTTPError as error:
            reason = getattr(error, "reason", None) or error
            raise SstokenError(
                f"no answer from {self.url} ({first_line(reason)}); start vllm serve, or name the server by "
                "--backend-option url=http://HOST:PORT"
            ) from error
        except ValueError:
            found = {}
        if reply.status == 401:
            raise SstokenError(f"{self.url} asks for a key; set {KEY}")
        if reply.status >= 400 or not isinstance(found, dict):
            told = found.get("error") if isinstance(found, dict) else None
            message = told.get("message") if isinstance(told, dict) else None
            raise SstokenError(f"{self.url}{path} answers {reply.status}: {message or reply.reason}")
        return found


def _read(options: BackendOptions) -> VllmServerSettings:
    settings = read_settings("vllm-server", options)
    assert isinstance(settings, VllmServerSettings)
    return settings


def _find(server: _Server, options: BackendOptions) -> dict[str, Any]:
    """Return the server's entry of the model that is the checkpoint.

    Raises:
        SstokenError: it serves none.
    """
    models = server.ask("GET", "/v1/models").get("data") or []
    wanted = _read(options).model
    if wanted is not None:
        found = [model for model in models if model.get("id") == wanted]
    else:
        found = [model for model in models if _is_checkpoint(model, options.checkpoint)]
    if found:
        return dict(found[0])
    served = ", ".join(repr(model.get("id")) for model in models) or "nothing"
    if wanted is not None:
        raise SstokenError(f"{server.url} serves no {wanted!r}; it serves {served}")
    raise SstokenError(
        f"{server.url} serves {served}, not from this path or id; if one of them is this checkpoint, say which: "
        "--backend-option model=NAME"
    )


def _is_checkpoint(model: dict[str, Any], checkpoint: str) -> bool:
    """Return whether the server loaded a model from the checkpoint's folder or Hub id."""
    folder = local_folder(checkpoint)
    for name in (model.get("root"), model.get("id")):
        if name in (checkpoint, place(checkpoint)[0]):
            return True
        if isinstance(name, str) and folder is not None and Path(name).resolve() == Path(folder).resolve():
            return True
    return False


def _check_tokenizer(server: _Server, model: str, options: BackendOptions) -> None:
    """Compare the server's tokenizer with the checkpoint's on ids from all over the vocabulary.

    Raises:
        SstokenError: they differ.
    """
    tokenizer = own_tokenizer(options.checkpoint, trust_remote_code=options.trust_remote_code)
    if tokenizer is None:
        return
    ids = np.unique(np.linspace(0, len(tokenizer) - 1, _PROBE).astype(int)).tolist()
    text = server.ask("POST", "/detokenize", {"model": model, "tokens": ids}).get("prompt")
    if text != tokenizer.decode(ids):
        raise SstokenError(
            f"{server.url} serves {model!r} with another tokenizer than this checkpoint's; serve the checkpoint itself"
        )
