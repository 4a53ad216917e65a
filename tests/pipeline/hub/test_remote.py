"""What goes wrong between here and the Hub is one line that says what to do, and no secret is in it."""

import json
from pathlib import Path

import pytest
from huggingface_hub import constants, get_token

from sstoken.errors import SstokenError, UsageError
from sstoken.stages.hub.remote import asking

TOKEN = "hf_SecretSecretSecret"


def said(error):
    with pytest.raises(SstokenError) as raised, asking("me/x"):
        raise error
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ConnectionError("refused"), "does not answer"),
        (TimeoutError("timed out"), "does not answer"),
        (json.JSONDecodeError("Expecting value", "<html>", 0), "does not answer like a Hub"),
        (ValueError("Invalid metadata\n- license"), "Invalid metadata - license"),
    ],
)
def test_reasons(error, text):
    assert text in said(error)
    wrapped = RuntimeError("Error while uploading 'data/part-00000.parquet'")
    wrapped.__cause__ = error
    assert text in said(wrapped)


@pytest.mark.parametrize("token", [TOKEN, "an-organisation's-own-token"])
def test_tokens_are_not_shown(monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    assert get_token() == token
    line = said(ValueError(f"cannot use {token}; header Authorization: Bearer abc.def"))
    assert token not in line
    assert "abc.def" not in line
    assert "***" in line


def test_what_is_ours_or_the_disks_passes_through():
    with pytest.raises(UsageError, match="as it is"), asking("me/x"):
        raise UsageError("as it is")
    with pytest.raises(FileNotFoundError), asking("me/x"):
        Path("/none/such").read_text()
    assert constants.ENDPOINT in said(OSError("without a file"))
