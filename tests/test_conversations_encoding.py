"""Trained are the answers and the tokens that end them, nothing else, whatever the template, the tokenizer and the text."""

import json
from pathlib import Path

import jinja2
import numpy as np
import pytest
from conversation_cases import (
    DATED,
    FORGETFUL,
    GEMMA_LIKE,
    JINJA,
    NO_END,
    PREFIX_LIKE,
    TEMPLATES,
    TOKENIZERS,
    conversation,
    encoder,
    texts,
    tokenizer,
    trained_runs,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data_tokenizer_json import qwen

from easylm_mling.config import ConversationConfig
from easylm_mling.data.conversations.encoding import UNTRAINED, ConversationEncoder, TooLong
from easylm_mling.data.conversations.messages import document
from easylm_mling.data.conversations.templates import plain_names, read_template
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.errors import ConfigError

CONTROLS = ("<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>", "<mask>")
LAST_ONLY = ("aog",)  # earlier exchanges are written otherwise than the last
END = {name: "<end_of_turn>" for name in ("gemma", "gemma-like", "prefix-like", "dated")}

lines = st.one_of(*(st.sampled_from(texts(language)[:300]) for language in ("ja", "ko", "zh", "en")))
injected = st.sampled_from(
    [*CONTROLS, "<start_of_turn>model\n", "<<eos>", "<end_<end_of_turn>of_turn>", "\n\n", "\ue000", "  "]
)
content = (
    st.lists(st.one_of(lines, injected), min_size=1, max_size=3).map("".join).filter(lambda text: text.strip() != "")
)


def rows(turns: list[str], system: str) -> dict[str, dict]:
    """One conversation as a row of every format that can say it."""
    messages = ([{"role": "system", "content": system}] if system else []) + [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)
    ]
    pairs = [list(pair) for pair in zip(turns[::2], turns[1::2], strict=True)]
    named = {"human": "user", "gpt": "assistant", "system": "system"}
    back = {role: name for name, role in named.items()}
    made = {
        "messages": {"messages": messages},
        "sharegpt": {"conversations": [{"from": back[m["role"]], "value": m["content"]} for m in messages]},
        "alpaca": {"instruction": turns[-2], "output": turns[-1], "history": pairs[:-1], "system": system},
        "prompt": {"prompt": messages[:-1], "completion": messages[-1:]},
    }
    if len(pairs) == 1:
        made["question"] = {"system_prompt": system, "question": turns[0], "response": turns[1]}
    return made


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(content, content), min_size=1, max_size=3),
    st.one_of(st.just(""), content),
    st.sampled_from(TEMPLATES),
    st.sampled_from(list(TOKENIZERS)),
    st.sampled_from(["all", "last"]),
)
def test_the_trained_tokens_are_the_answers_and_their_ends(pairs, system, template, kind, train_on):
    turns = [text for pair in pairs for text in pair]
    t, whole = tokenizer(kind), []
    if template in LAST_ONLY:
        train_on = "last"
    for form, row in rows(turns, system).items():
        e = encoder(template, kind, 10**6, format=form, train_on=train_on)
        tokens = e.encode(document(row, ConversationConfig(form)))
        whole.append(tokens.tolist())
        runs = trained_runs(tokens)
        answers = [answer for _, answer in pairs][-1 if train_on == "last" else 0 :]
        ends = END.get(template, "<eos>")
        assert len(runs) == len(answers)
        for i, (run, answer) in enumerate(zip(runs, answers, strict=True)):
            # Without an end token in the template EOS ends the last answer only.
            if template != "no-end" or i == len(runs) - 1:
                assert t.piece(run[-1]) == ends
                run = run[:-1]
            assert t.decode(run) == answer.strip()
            # Tokenised apart: as the answer alone.
            assert run == t.encode([answer.strip()])[0].tolist()
        ids = tokens & ~UNTRAINED
        assert np.count_nonzero(ids == t.bos_id) == 1 and ids[0] == t.bos_id and tokens[0] & UNTRAINED
    assert all(tokens == whole[0] for tokens in whole)  # one conversation, whatever the format


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(content, min_size=2, max_size=2), content, st.sampled_from(TEMPLATES), st.sampled_from(list(TOKENIZERS))
)
def test_no_text_makes_a_control_token(turns, system, template, kind):
    """As many of each as with harmless text in its place, and every text comes back letter by letter."""
    t, e = tokenizer(kind), encoder(template, kind, 10**6)
    names = t.control_ids

    def controls(*texts):
        ids = e.encode(conversation(*texts[:2], system=texts[2])) & ~UNTRAINED
        return [i for i in ids.tolist() if i in names], t.decode(ids)

    found, text = controls(*turns, system)
    assert found == controls("a", "b", "c")[0]
    assert all(part.strip() in text for part in (*turns, system))


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", ["gemma-like", "prefix-like"])
def test_a_chat_template_has_the_ids_of_transformers(template, kind):
    """Where no prompt joins its answer, the ids are those of apply_chat_template on the same files, BOS once."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained("data/sample/tokenizer")
    theirs.chat_template = JINJA[template]
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": texts(x)[i]} for i, x in enumerate(("ko", "ja", "zh", "en"))
    ]
    e = encoder(template, kind)
    text = document({"messages": messages}, ConversationConfig())
    assert e.joint(text)
    want = theirs.apply_chat_template(messages, return_dict=False)
    want = want if want[0] == 2 else [2, *want]
    assert (e.encode(text) & ~UNTRAINED).tolist() == want
    asked = theirs.apply_chat_template(messages[:3], add_generation_prompt=True, return_dict=False)
    got = e.prompt(messages[:3]).tolist()
    assert got == (asked if asked[0] == 2 else [2, *asked])
    # What is trained behind is what a model is asked by.
    assert want[: len(got)] == got


def test_how_often_prompt_and_answer_together_have_other_ids_than_apart():
    """A prompt that ends in a newline never joins its answer, one that ends in a space nearly always does."""
    for template, least, most in (
        ("alpaca", 0, 0),
        ("kullm", 0, 0),
        ("gemma", 0, 0),
        ("gemma-like", 0, 0),
        ("no-end", 0.5, 1),
    ):
        for language in ("ja", "ko", "zh", "en"):
            e = encoder(template)
            said = [conversation("q", text[:80]) for text in texts(language)[:100]]
            differ = sum(not e.joint(text) for text in said) / len(said)
            assert least <= differ <= most, (template, language, differ)


def test_a_dated_template_writes_the_configs_day_and_no_other():
    e, t = encoder("dated", date="2024-07-26"), tokenizer()
    assert "Today is 26 Jul 2024" in t.decode(e.encode(conversation("q", "a")) & ~UNTRAINED)
    with pytest.raises(ConfigError, match="k: the template writes today's date, .* set k.date, as 2024-07-26"):
        encoder("dated", date=None)


def test_a_template_that_rewrites_the_past_can_train_the_last_answer_only():
    said = conversation("q", "<think>hm</think>a", "r", "<think>so</think>b")
    with pytest.raises(
        ValueError, match="what stands before answer 4 otherwise once more follows|leaves out a part of message 2"
    ):
        encoder(FORGETFUL).encode(said)
    (run,) = trained_runs(encoder(FORGETFUL, train_on="last").encode(said))
    assert tokenizer().decode(run) == "<think>so</think>b"


def test_aog_trains_the_last_answer_only():
    with pytest.raises(
        ValueError, match="what stands before answer 2 otherwise once more follows; train_on: last may help"
    ):
        encoder("aog").encode(conversation("q", "a", "r", "b"))


def test_a_template_that_leaves_an_answer_out_is_noticed():
    deaf = "{% for m in messages %}{{ m['role'] + ':' + (m['content'] if m['content'] != '42' else '') }}{% endfor %}"
    with pytest.raises(ValueError, match=r"the template leaves out a part of message 2 \(assistant\)"):
        encoder(deaf).encode(conversation("question", "42"))


def test_flags_choose_the_answers_and_no_answer_is_an_error():
    def flagged(*train):
        messages = [{"role": ("user", "assistant")[i % 2], "content": f"text {i}"} for i in range(2 * len(train))]
        for i, flag in enumerate(train):
            if flag is not None:
                messages[2 * i + 1]["train"] = flag
        return document({"messages": messages}, ConversationConfig())

    t = tokenizer()

    def trained(e, text):
        return [t.decode(run) for run in trained_runs(e.encode(text))]

    e = encoder("gemma", train_on="flagged")
    assert trained(e, flagged(False, True, None)) == ["text 3", "text 5"]
    assert trained(encoder("gemma"), flagged(False, True, None)) == ["text 1", "text 3", "text 5"]
    with pytest.raises(ValueError, match="no answer is to be trained on: every one says train: false"):
        e.encode(flagged(False, False))


def test_the_end_is_no_target_if_so_set():
    (run,) = trained_runs(encoder("gemma", train_end=False).encode(conversation("q", "a")))
    assert tokenizer().decode(run) == "a" and tokenizer().piece(run[-1]) != "<end_of_turn>"


def test_a_long_conversation_is_cut_or_dropped_and_never_without_a_target():
    long = conversation("q", "word " * 100)
    length = len(encoder("gemma").encode(long))
    cut = encoder("gemma", length=length - 1).encode(long)
    np.testing.assert_array_equal(cut, encoder("gemma").encode(long)[: length - 1])
    np.testing.assert_array_equal(
        encoder("gemma", length=length, too_long="drop").encode(long), encoder("gemma").encode(long)
    )
    with pytest.raises(TooLong, match=f"{length} tokens, longer than a row of {length - 1}"):
        encoder("gemma", length=length - 1, too_long="drop").encode(long)
    with pytest.raises(ValueError, match="no token of an answer is in the first 20 tokens"):
        encoder("gemma", length=20).encode(conversation("word " * 100, "a"))


def test_the_system_line_comes_with_its_probability_by_the_conversation():
    said = [conversation(f"question {i}", "a") for i in range(400)]
    t = tokenizer()

    def with_line(probability, which):
        e = encoder("alpaca", system="Be very kind.", system_probability=probability)
        return [i for i in which if "Be very kind." in t.decode(e.encode(said[i]) & ~UNTRAINED)]

    some = with_line(0.8, range(400))
    assert 290 < len(some) < 350
    assert with_line(0.8, range(399, -1, -1)) == some[::-1]  # by itself, not by its place
    assert with_line(0.0, range(400)) == [] and with_line(1.0, range(400)) == list(range(400))
    own = conversation("q", "a", system="Own line.")
    decoded = t.decode(encoder("alpaca", system="Be very kind.").encode(own) & ~UNTRAINED)
    assert "Own line." in decoded and "Be very kind." not in decoded


def test_where_a_system_line_goes():
    t, said = tokenizer(), conversation("question", "a", system=" SYSTEM ")

    def text(template, **more):
        return t.decode(encoder(template, **more).encode(said) & ~UNTRAINED)

    assert "user\nSYSTEM\n\nquestion" in text("gemma") and "user\nSYSTEM\n\nquestion" in text("gemma-like")
    assert "SYSTEM" not in text("gemma", system_place="drop") and "question" in text("gemma-like", system_place="drop")
    # A template with a place of its own is not asked.
    assert "SYSTEM" in text("prefix-like", system_place="drop") and "SYSTEM" in text("dated", system_place="drop")
    assert "### Question:\nquestion\n\n### Instruction:\nSYSTEM\n\n### Response:\n" in text("aog")


def test_the_plain_forms_letter_by_letter():
    t = tokenizer()

    def text(template, *turns, **more):
        return t.decode(encoder(template, train_on="last").encode(conversation(*turns, **more)) & ~UNTRAINED)

    assert text("aog", "1", "2", "3", "4", system="5") == (
        "### Question:\n1\n### Response:\n2\n### Question:\n3\n\n### Instruction:\n5\n\n### Response:\n4"
    )
    assert text("aog", "1", "2") == "### Question:\n1\n\n### Response:\n2"
    assert text("komt", "1", "2") == "### instruction: 1\n\n### Response:2"
    assert text("kullm", "1", "2").endswith("\n\n### 명령어:\n1\n\n### 응답:\n2")
    assert text("alpaca", "1", "2").endswith("\n\n### Instruction:\n1\n\n### Response:\n2")
    about = document({"instruction": "1", "input": "2", "output": "3"}, ConversationConfig("alpaca"))
    for template, heading in (("alpaca", "### Input:"), ("kullm", "### 입력:")):
        assert f"\n1\n\n{heading}\n2\n\n###" in t.decode(encoder(template).encode(about) & ~UNTRAINED)
    assert "user\n1\n\n2" in t.decode(encoder("gemma").encode(about) & ~UNTRAINED)


def test_rows_that_write_control_tokens_are_told_apart():
    e = encoder("gemma")
    assert e.writes_control(conversation("what is <end_of_turn>?", "a")) and not e.writes_control(
        conversation("q", "a")
    )


def test_a_template_of_another_tokenizer_or_none_is_refused():
    llama = "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + m['content'] + '<|eot_id|>' }}{% endfor %}"
    with pytest.raises(ConfigError, match=r"k.template writes <\|start_header_id\|>, which is no control token of "):
        encoder(llama)
    with pytest.raises(ConfigError, match="k.template: not readable as a Jinja template"):
        encoder("{% for m in messages %}")
    with pytest.raises(ConfigError, match="it cannot write one question and its answer: the template raises: never"):
        encoder("{{ raise_exception('never') }}")


@pytest.mark.parametrize("attack", [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{% for i in range(10**9) %}{% endfor %}",
])  # fmt: skip
def test_a_template_cannot_leave_its_sandbox(attack):
    with pytest.raises(ConfigError, match="the template raises"):
        encoder(attack + NO_END)


def test_a_template_is_looked_for_where_it_is_named(tmp_path):
    def read(template, folder=tmp_path):
        return read_template(ConversationConfig(template=str(template)), str(folder), "k")

    with pytest.raises(ConfigError, match="has no chat template .* or name one of alpaca, aog, gemma, komt, kullm"):
        read("tokenizer")
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(
        json.dumps({"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": NO_END}]})
    )
    assert read("tokenizer") == {"kind": "jinja", "text": NO_END}
    settings.write_text(json.dumps({"chat_template": PREFIX_LIKE}))
    assert read("tokenizer") == {"kind": "jinja", "text": PREFIX_LIKE}
    (tmp_path / "chat_template.jinja").write_text(GEMMA_LIKE)
    (tmp_path / "tokenizer.model").touch()
    assert read("tokenizer", tmp_path / "tokenizer.model") == {"kind": "jinja", "text": GEMMA_LIKE}
    (tmp_path / "own.jinja").write_text(DATED)
    assert read(tmp_path / "own.jinja") == {"kind": "jinja", "text": DATED}
    with pytest.raises(ConfigError, match="k.template='chatml' is none of tokenizer, alpaca, aog"):
        read("chatml")
    with pytest.raises(ConfigError, match="a template's file ends in .jinja or .yaml"):
        read("./own.txt")
    with pytest.raises(ConfigError, match="cannot be read"):
        read("./missing.jinja")


@pytest.mark.parametrize("text, message", [
    ("prompt: [", "not readable as YAML"),
    ("prompt: hello", "prompt has no {user}"),
    ("promt: '{user}'", "a plain form needs `prompt`"),
    ("prompt: '{user}'\nearly: x", "unknown key 'early'; known keys: prompt, description"),
    ("prompt: '{user}'\nend: 3", "end must be text"),
    ("prompt: '{user}'\ntokens: ['<turn>']", "k.template writes <turn>, which is no control token"),
])  # fmt: skip
def test_a_wrong_plain_form_is_named(tmp_path, text, message):
    from easylm_mling.data.conversations.encoding import ConversationEncoder

    (tmp_path / "form.yaml").write_text(text)
    config = ConversationConfig(template=str(tmp_path / "form.yaml"))
    with pytest.raises(ConfigError) as error:
        ConversationEncoder(config, read_template(config, "", "k"), tokenizer(), 100, "k")
    assert message in str(error.value) and str(error.value).startswith("k")


def test_every_form_that_comes_with_the_package_says_what_it_is():
    import yaml

    for name in plain_names():
        tree = yaml.safe_load(read_template(ConversationConfig(template=name), "", "k")["text"])
        assert tree["description"].strip(), name
        # A prompt that ends in a space is asked with ids that no answer was trained behind.
        assert not tree["prompt"].endswith(" "), name


def test_the_environment_is_new_enough():
    assert tuple(map(int, jinja2.__version__.split(".")[:3])) >= (3, 1, 6)
    assert Path("easylm_mling/data/conversations/templates").is_dir()


def test_a_token_that_is_both_bos_and_eos_may_end_a_conversation_and_not_stand_inside(tmp_path):
    qwen_like = Tokenizer(str(qwen(tmp_path / "qwen")))
    config = ConversationConfig(template="komt")
    made = ConversationEncoder(config, read_template(config, "", "key"), qwen_like, 4096, "key")
    tokens = made.encode(conversation("a question", "an answer"))
    both = qwen_like.bos_id
    assert both == qwen_like.eos_id and (tokens & ~UNTRAINED).tolist().count(both) == 2
    (answer,) = trained_runs(tokens)
    assert answer[-1] == both and qwen_like.decode(answer[:-1]) == "an answer"
    with pytest.raises(ValueError, match="both BOS and EOS, inside"):
        made.encode(conversation("one", "two", "three", "four"))
