"""The adapter's own promises: packing, windows, the cache, counts."""

import pytest

pytest.importorskip("lm_eval", reason="needs the extra [eval]")

import numpy as np  # noqa: E402
from eval_models import LENGTH, TOKENIZER, ours, save  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402

from easylm_mling.data.tokenization.tokenizer import Tokenizer  # noqa: E402
from easylm_mling.evaluation.scoring.packing import arrays, batches_of, pack, pack_tightly, segments_of  # noqa: E402
from easylm_mling.evaluation.scoring.windows import encode_pair, windows_of  # noqa: E402


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model") / "gemma")


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


def questions(count: int) -> list[tuple[str, str]]:
    return [(f"Question {n}: what is {n}?", f" {answer}") for n in range(count) for answer in ("yes", "no", "maybe so")]


@given(st.integers(1, 40), st.integers(0, 60), st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_windows_predict_each_token_once_with_as_much_context_as_there_is_room_for(context, continuation, length):
    tokens = [*range(1, 1 + context + continuation)]
    windows = windows_of(tokens[:context], tokens[context:], length)
    assert [t for w in windows for t in w.targets] == tokens[context:]
    for window in windows:
        inputs = np.frombuffer(window.inputs, np.int32).tolist()
        assert len(window.targets) <= len(inputs) <= length
        end = window.targets[-1]  # tokens are their own places here
        assert inputs == tokens[max(0, end - 1 - length) : end - 1]


@given(st.lists(st.tuples(st.integers(1, 100), st.integers(1, 5)), min_size=1, max_size=60), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_packing_keeps_every_query_and_no_segment_sees_another(sizes, shards):
    windows = [w for n, (a, b) in enumerate(sizes) for w in windows_of([n + 1] * a, [n + 1] * b, 100)]
    seen = {}
    for rows in batches_of(pack(segments_of(windows), 128, 100), 256, shards):
        batch = arrays(rows)
        assert len(batch.tokens) % shards == 0
        for b, owners in enumerate(batch.owners):
            for q, owner in enumerate(owners):
                place = batch.places[b, q]
                own = batch.segments[b] == batch.segments[b, place]
                seen.setdefault(owner, []).append(int(batch.targets[b, q]))
                inputs = np.frombuffer(windows[owner].inputs, np.int32)
                np.testing.assert_array_equal(batch.tokens[b][own], inputs)
                np.testing.assert_array_equal(batch.positions[b][own], np.arange(len(inputs)))
                assert batch.segments[b, place] > 0
    assert seen == {n: list(w.targets) for n, w in enumerate(windows)}


def test_rows_are_narrow_where_that_fills_them_and_wide_where_it_does_not():
    def packed(size: int, count: int, widest: int):
        windows = [w for n in range(count) for w in windows_of([n + 1] * size, [1], 4096)]
        return pack_tightly(segments_of(windows), widest, 4096)

    assert {r.width for r in packed(60, 60, 1024)} == {256}  # four of them are 240
    assert {r.width for r in packed(200, 60, 1024)} == {1024}  # one to 256, two to 512, five to 1,024
    assert {r.width for r in packed(700, 9, 512)} == {1024}
    assert [len(r.segments) for r in packed(60, 9, 0)] == [1] * 9


def test_the_pair_is_cut_where_the_context_ends_and_no_continuation_is_lost():
    tokenizer = Tokenizer(str(TOKENIZER))
    context, continuation = encode_pair(tokenizer, [2], "the answer is  ", "yes")
    assert context == [2, *tokenizer.encode(["the answer is"])[0]]
    assert tokenizer.decode(continuation) == "  yes"
    context, continuation = encode_pair(tokenizer, [2], "", "yes")
    assert context == [2] and tokenizer.decode(continuation) == "yes"
    melted = next((a, b) for a, b in [("t", "he"), ("th", "e"), ("a", "nd")] if len(tokenizer.encode([a + b])[0]) == 1)
    context, continuation = encode_pair(tokenizer, [2], *melted)
    assert context == [2] and tokenizer.decode(continuation) == "".join(melted)
    assert encode_pair(tokenizer, [], "", "yes")[0] == [tokenizer.eos_id]


def test_an_empty_continuation_has_likelihood_0_and_is_counted(saved, tmp_path):
    lm = ours(saved, tmp_path / "cache")
    assert lm.loglikelihood(instances("loglikelihood", [("a question", ""), ("", "")])) == [(0.0, True)] * 2
    assert lm.counts["empty continuations"] == 2 and not lm.counts["model calls"]
    lm.cache.close()


def test_one_forward_pass_for_all_one_token_choices(saved, tmp_path):
    lm = ours(saved, tmp_path / "cache", row=0)
    words = (" " + word for word in "a the of in is to and was".split())
    choices = [word for word in words if len(lm._encode_pair("Which?", word)[1]) == 1]
    assert len(choices) >= 3
    lm.loglikelihood(instances("loglikelihood", [("Which?", word) for word in choices]))
    assert lm.counts["tokens"] == len(lm.tok_encode("Which?"))
    lm.cache.close()


def test_a_continuation_longer_than_the_window_is_scored_whole(saved, tmp_path):
    lm = ours(saved, tmp_path / "cache")
    text = "river stone light " * 100
    [(value, _)] = lm.loglikelihood(instances("loglikelihood", [("", text)]))
    assert value == pytest.approx(lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))[0], abs=1e-9)
    assert len(lm.tok_encode(text)) > 2 * LENGTH
    lm.cache.close()


def test_after_a_kill_the_same_bits_and_no_request_twice(saved, tmp_path):
    """The process dies in each batch in turn: what is answered then is answered, and the end is the same to the bit."""
    asked = instances("loglikelihood", questions(40))
    texts = instances("generate_until", [(q, {"until": ["\n"], "max_gen_toks": 3}) for q, _ in questions(4)])
    whole = ours(saved, tmp_path / "whole", batch_tokens=256, row=128, rows=2)
    want = whole.loglikelihood(asked), whole.generate_until(texts)
    whole.cache.close()
    calls = whole.counts["model calls"]
    assert calls >= 6
    file, total, deaths = tmp_path / "killed", 0, 0
    while True:
        lm = ours(saved, file, batch_tokens=256, row=128, rows=2)
        add, room = lm.cache.add, [1]

        def dying(answers, add=add, room=room):
            if not room[0]:
                raise KeyboardInterrupt
            room[0] -= 1
            add(answers)

        lm.cache.add = dying
        try:
            got = lm.loglikelihood(asked), lm.generate_until(texts)
        except KeyboardInterrupt:
            deaths += 1
            lm.cache.close()
            # The line in flight is cut short.
            with open(file, "ab") as end:
                end.write(b'{"answers": {"half')
            total += 1
            continue
        total += lm.counts["model calls"]
        lm.cache.close()
        break
    assert got == want and total == calls and deaths == calls - 1


def test_a_repeated_request_is_computed_once_and_a_wider_evaluation_computes_only_what_is_new(saved, tmp_path):
    lm = ours(saved, tmp_path / "cache", row=128)
    once = lm.loglikelihood(instances("loglikelihood", questions(10)))
    tokens = lm.counts["tokens"]
    assert lm.loglikelihood(instances("loglikelihood", questions(10) * 2)) == once * 2
    assert lm.counts["tokens"] == tokens
    both = lm.loglikelihood(instances("loglikelihood", questions(20)))
    assert both[:30] == once and 1.9 * tokens < lm.counts["tokens"] < 2.3 * tokens
    lm.cache.close()
