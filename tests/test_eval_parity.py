"""Parity with lm-evaluation-harness's own HF model: every log-likelihood, greedy flag and generation, packed or not."""

import random

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="needs the extra [eval]")

from eval_models import LENGTH, ours, save, theirs  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402

WORDS = (
    "river stone 日本 は 雨 small 오늘 아침 light 바람 tree ten 7 今天 night 你好 walk 😀 house open grey salt".split()
)
FAMILIES = ("gemma", "gemma2", "gemma3_text", "gemma4", "gemma4_small", "llama")


def words(rng: random.Random, most: int) -> str:
    return "".join(rng.choice(WORDS) + rng.choice("  \n") for _ in range(rng.randint(1, most)))


def pairs(seed: int) -> list[tuple[str, str]]:
    """At least 300 pairs of a context and a continuation, most of them awkward."""
    rng = random.Random(seed)
    out = [("", words(rng, 9)) for _ in range(20)]
    out += [(words(rng, 100) * 2, " " + words(rng, 9)) for _ in range(30)]  # longer than the window
    out += [
        (words(rng, 12).rstrip() + tail, "answer")
        for tail in (" ", "   ", "\n", "\n\n", " \n ", "\t")
        for _ in range(6)
    ]
    out += [(" \n", " yes"), ("   ", "no"), ("😀", "🦊ᚠ"), ("ᚠᛇᚻ", "\x00"), ("é", "́"), ("a", "b"), ("th", "e")]
    out += [(words(rng, 20), rng.choice(["🦊", "ᚠᛇ", "\u200b", "ก็"])) for _ in range(20)]  # byte fallback
    for _ in range(30):  # one question, one-token choices
        question = words(rng, 15) + "? "
        out += [(question.rstrip(), f" {letter}") for letter in "ABCD"]
    for _ in range(20):  # one question, choices of several tokens
        question = words(rng, 15)
        out += [(question, " " + words(rng, 6).rstrip()) for _ in range(4)]
    return out


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[] if name == "gemma3_text" else pytest.mark.slow) for name in FAMILIES],
)
def saved(request, tmp_path_factory):
    return save(tmp_path_factory.mktemp("parity") / request.param, request.param)


def splits(lm, pair: tuple[str, str]) -> bool:
    """Whether the harness finds a continuation to score: it does not where two texts melt into one piece."""
    return pair[0] == "" or len(lm._encode_pair(*pair)[1]) > 0


def likely(lm) -> list[tuple[str, str]]:
    """Contexts, and what the harness's model writes after them."""
    contexts = [words(random.Random(n), 12).rstrip() for n in range(12)]
    settings = {"until": [], "max_gen_toks": 1, "do_sample": False}
    return [
        *zip(contexts, lm.generate_until(instances("generate_until", [(c, settings) for c in contexts])), strict=True)
    ]


def same(ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]], tolerance: float = 1e-4):
    np.testing.assert_allclose([a for a, _ in ours], [b for b, _ in theirs], rtol=0, atol=tolerance)
    assert [a for _, a in ours] == [b for _, b in theirs]


def test_loglikelihoods(saved, tmp_path):
    """They are the harness's, packed or each in a row of its own, on 1 device and on 8."""
    lm = theirs(saved)
    asked = [pair for pair in pairs(0) if splits(lm, pair)]
    # Some that the model itself would write.
    asked += [(context, lm_text) for context, lm_text in likely(lm) if splits(lm, (context, lm_text))]
    assert len(asked) >= 300
    want = lm.loglikelihood(instances("loglikelihood", asked), disable_tqdm=True)
    packed = ours(saved, tmp_path / "packed", row=256)
    got = packed.loglikelihood(instances("loglikelihood", asked))
    same(got, want)
    alone = ours(saved, tmp_path / "alone", row=0)
    same(alone.loglikelihood(instances("loglikelihood", asked)), want)
    spread = ours(saved, tmp_path / "spread", (2, 2, 2), row=256)
    same(spread.loglikelihood(instances("loglikelihood", asked)), want)
    for lm in (packed, alone, spread):
        lm.cache.close()
    # It was packing that was tested, and contexts were cut.
    assert (
        packed.counts["tokens"] > 0.8 * packed.counts["slots"] and alone.counts["slots"] > 1.5 * packed.counts["slots"]
    )
    assert packed.counts["contexts cut"] == alone.counts["contexts cut"] >= 20
    assert len({greedy for _, greedy in want}) == 2, "no request tells greedy from not"


def test_rolling_loglikelihoods(saved, tmp_path):
    """They are the harness's with BOS given once: with add_bos_token it would count BOS as a token of the text, too."""
    rng = random.Random(7)
    texts = [(words(rng, most),) for most in (1, 3, 20, 60, 90, 150)] + [(" ",), ("\n\n",), ("🦊",)]
    want = theirs(saved, bos=False).loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
    lm = ours(saved, tmp_path / "cache", row=256)
    got = lm.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
    lm.cache.close()
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-4)
    assert max(len(lm.own_tokenizer.encode([t])[0]) for (t,) in texts) > 2 * LENGTH, "no text has several windows"


@pytest.mark.slow
def test_generations(saved, tmp_path):
    """They are the harness's: stop strings, limits, contexts that are cut, ends that differ in a batch."""
    rng, lm = random.Random(3), theirs(saved, batch=1)
    plain = [(words(rng, 10), {"until": [], "max_gen_toks": 20, "do_sample": False}) for _ in range(6)]
    free = lm.generate_until(instances("generate_until", plain), disable_tqdm=True)
    # What the model writes tells where it can be stopped.
    stops = [text[len(text) // 2 : len(text) // 2 + 2] for text in free]
    asked = plain + [
        (context, {"until": [stop, "never"], "max_gen_toks": 20})
        for (context, _), stop in zip(plain, stops, strict=True)
    ]
    asked += [(words(rng, 150), {"until": ["\n\n"], "max_gen_toks": 7, "temperature": 0.0})] * 2
    want = lm.generate_until(instances("generate_until", asked), disable_tqdm=True)
    model = ours(saved, tmp_path / "cache")
    got = model.generate_until(instances("generate_until", asked))
    model.cache.close()
    assert got == want
    assert len(set(want)) > 5 and model.counts["contexts cut"] == 2
    assert sum(a != b for a, b in zip(want[6:12], free, strict=True)) >= 4, "nothing was stopped"
