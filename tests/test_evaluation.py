"""The adapter's own promises: packing, windows, the cache, counts."""

from functools import partial

import pytest

pytest.importorskip("lm_eval", reason="needs the extra [eval]")

import jax  # noqa: E402
import numpy as np  # noqa: E402
from eval_models import LENGTH, TOKENIZER, ours, save  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402

from easylm_mling.data.tokenization.tokenizer import Tokenizer  # noqa: E402
from easylm_mling.evaluation.scoring.packing import Limits, Tree, arrays, batches_of, branches_of, trees_of  # noqa: E402
from easylm_mling.evaluation.scoring.tree_attention import branches, tree_attention  # noqa: E402
from easylm_mling.evaluation.scoring.windows import Window, encode_pair, windows_of  # noqa: E402
from easylm_mling.model.attention import attention  # noqa: E402


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


# Questions with the same shots or with none, whose choices are continuations of different lengths.
asked = st.lists(
    st.tuples(
        st.sampled_from([0, 5, 60]),  # tokens of shots
        st.lists(st.integers(1, 3), min_size=1, max_size=30),  # the question
        st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4), min_size=1, max_size=4),  # its choices
    ),
    min_size=1,
    max_size=40,
)
sizes_of_rows = st.sampled_from([0, 128, 512])


def windows_for(questions) -> list[Window]:
    """Windows as the harness's requests make them, none twice."""
    made = [w for shots, q, choices in questions for c in choices for w in windows_of([7] * shots + q, c, 100)]
    return list(dict.fromkeys(made))


@given(asked, sizes_of_rows, st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_a_query_sees_the_tokens_of_its_window_and_no_others(questions, row, shards):
    windows, seen = windows_for(questions), {}
    for rows in batches_of(windows, Limits(100, 512, row), shards, 1000.0):
        batch = arrays(rows)
        assert len(batch.tokens) % shards == 0
        T = batch.tokens.shape[1]
        for b, owners in enumerate(batch.owners):
            for q, owner in enumerate(owners):
                place, done = batch.places[b, q], seen.setdefault(owner, [])
                shown = np.flatnonzero((np.arange(T) <= place) & (place < batch.ends[b]))
                inputs = np.frombuffer(windows[owner].inputs, np.int32)
                end = len(inputs) - len(windows[owner].targets) + len(done) + 1
                np.testing.assert_array_equal(batch.tokens[b][shown], inputs[:end])
                np.testing.assert_array_equal(batch.positions[b][shown], np.arange(end))
                done.append(int(batch.targets[b, q]))
    assert seen == {n: list(w.targets) for n, w in enumerate(windows)}


@given(asked, st.data())
@settings(max_examples=100, deadline=None)
def test_a_tree_without_some_windows_is_that_of_the_others(questions, data):
    windows = windows_for(questions)
    kept = {n for n in range(len(windows)) if data.draw(st.booleans())}
    for tree in trees_of(branches_of(windows), 512, 512):
        mine = [n for b in tree.branches for n in b.windows if n in kept]
        again = tree.only(kept)
        sequences = [np.frombuffer(b.inputs, np.int32).tolist() for b in again.branches]
        assert [n for b in again.branches for n in b.windows] == mine
        for before, now, branch in zip([[], *sequences], sequences, again.branches, strict=False):
            assert (
                now[: branch.shared] == before[: branch.shared]
                and now[: branch.shared + 1] != before[: branch.shared + 1]
            )
        assert again.size == len({tuple(s[: n + 1]) for s in sequences for n in range(len(s))})


def test_what_questions_share_is_computed_once():
    choices = [w for n in range(9) for c in ([1], [2, 3], [2, 4]) for w in windows_of([5] * 60 + [10 + n] * 20, c, 512)]
    [tree] = trees_of(branches_of(choices), 512, 512)
    assert tree.size == 60 + 9 * (20 + 1)  # the shots, and of each question itself and one token of two choices
    assert tree.queries == 9 * 5
    # Questions that have little in common go by themselves, and can fill rows better.
    few = [w for n in range(9) for w in windows_of([5] * 3 + [10 + n] * 20, [1], 512)]
    assert [len(t.branches) for t in trees_of(branches_of(few), 512, 512)] == [1] * 9


def test_rows_have_the_width_that_costs_least():
    def packed(windows: list[Window], knee: float, row: int = 1024):
        batches = batches_of(windows, Limits(4096, 8192, row), 1, knee)
        return {rows[0].width for rows in batches}, sum(r.size for rows in batches for r in rows), batches

    alike = [w for n in range(60) for w in windows_of([n + 1] * 90, [1], 4096)]
    assert packed(alike, 100.0)[0] == {192}  # two in a row, which is cut to what they take
    assert packed(alike, 1e9)[0] != {192}
    # Where attention is cheap, wide rows hold more questions behind the same shots.
    shots = [w for n in range(60) for w in windows_of([5] * 200 + [10 + n] * 20, [1], 4096)]
    (narrow, some, _), (wide, less, _) = packed(shots, 100.0), packed(shots, 1e5)
    assert max(narrow) < min(wide) and less < some / 1.3
    # A long sequence has a row as wide as itself; and unpacked, each has one of its own.
    assert packed([w for n in range(9) for w in windows_of([n + 1] * 700, [1], 4096)], 1e4, 512)[0] == {768}
    assert [len(r.trees) for rows in packed(alike, 1e4, 0)[2] for r in rows if r.trees] == [1] * 60


def test_nine_tenths_of_the_tokens_are_real():
    rng = np.random.default_rng(0)
    for longest in (40, 120, 300):
        sizes = rng.integers(longest // 2, longest, 400)
        windows = [w for n, size in enumerate(sizes) for w in windows_of([n + 1] * int(size), [1], 4096)]
        for knee in (300.0, 1e4):
            batches = batches_of(windows, Limits(4096), 1, knee)
            real, slots = sum(r.size for rows in batches for r in rows), sum(r.width for rows in batches for r in rows)
            assert real > 0.9 * slots, (longest, knee)
            assert len({(len(rows), rows[0].width) for rows in batches}) <= 5, "too many shapes to compile"


@pytest.mark.parametrize("window", [None, 30])
def test_a_branch_has_the_attention_that_it_has_alone(window):
    """Also across chunks of queries, and where the window begins before the branch does."""
    choices = [1], [2] * 8, [3] * 8
    windows = [w for n in range(7) for c in choices for w in windows_of([5] * 60 + [10 + n] * 40, c, 512)]
    [[row]] = batches_of(windows, Limits(512, row=512), 1, 1e9)
    batch = arrays([row])
    T = batch.tokens.shape[1]
    assert T > 300 and branches(batch.ends)
    # Keys and values depend on the token and its position, as they do in a model.
    rng = np.random.default_rng(0)
    tables = [rng.normal(size=(20, 128, heads, 8)).astype(np.float32) for heads in (4, 2, 2)]
    q, k, v = (table[batch.tokens, batch.positions] for table in tables)
    together = jax.jit(partial(tree_attention, window=window, soft_cap=5.0))(q, k, v, batch.ends, batch.positions)
    by_itself = jax.jit(partial(attention, window=window, soft_cap=5.0))
    last = dict(zip(batch.owners[0], batch.places[0], strict=False))  # of each window's queries the last
    assert len(last) == len(windows)
    for owner, place in last.items():
        inputs = np.frombuffer(windows[owner].inputs, np.int32)[None]
        alone = (table[inputs, np.arange(inputs.size)[None]] for table in tables)
        want = by_itself(*alone, np.ones(inputs.shape, np.int32))
        np.testing.assert_allclose(together[0, place], want[0, -1], rtol=1e-5, atol=1e-5)


def test_a_tree_that_never_branches_is_known_as_one():
    """For such rows TPUs have a faster kernel, which takes ends as the names of segments."""
    chain = windows_of([1, 2, 3], [4], 64) + windows_of([1, 2, 3, 4], [5], 64) + windows_of([9] * 4, [5], 64)
    assert not branches(arrays(batches_of(chain, Limits(64), 1, 1e3)[0]).ends)
    forked = chain + windows_of([1, 2, 3, 6], [5], 64)
    assert branches(arrays(batches_of(forked, Limits(64), 1, 1e3)[0]).ends)
    assert Tree(()).size == 0


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
    asked = instances("loglikelihood", questions(60))
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
