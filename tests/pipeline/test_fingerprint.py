"""What decides a fingerprint: another version never takes over another's folders."""

import pytest

from sstoken.pipeline import job as jobs
from sstoken.pipeline.job import Job, identify
from sstoken.stages.manifest import Digests
from sstoken.stages.select import Select
from tests.pipeline.worlds import make_world


def test_version_settings_and_seed_decide(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint(seed: int = 0, **settings: object) -> str:
        stage = Select(method="random", **settings)
        inputs = {"tokens": make_world().tokens}
        return identify(Job(stage, inputs, tmp_path / "out", seed=seed), Digests()).fingerprint

    plain = fingerprint()
    assert fingerprint() == plain
    assert len({plain, fingerprint(seed=1), fingerprint(rho=0.3)}) == 3
    monkeypatch.setattr(jobs, "__version__", "0.0.0")
    assert fingerprint() != plain
