"""`chat`: each prompt is what the template writes of the whole conversation, and what is typed is obeyed."""

import io
import re
import sys

import numpy as np
import orjson
import pytest
from eval_models import save

from easylm_mling.cli.main import main
from easylm_mling.config.conversations import ConversationConfig
from easylm_mling.data.conversations.encoding import UNTRAINED
from easylm_mling.data.conversations.messages import document
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.errors import ConfigError
from easylm_mling.inference.chat import Chat, run_chat
from easylm_mling.inference.decoder import Decoder, Draw
from easylm_mling.inference.dialogue import Dialogue, open_dialogue
from easylm_mling.inference.generate import generate, load_model
from easylm_mling.inference.text_stream import TextStream

LENGTH = 128


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(saved):
    return Tokenizer(str(saved))


@pytest.fixture(scope="module")
def loaded(saved):
    return load_model(saved)


@pytest.fixture(scope="module")
def decoder(loaded):
    return Decoder(*loaded, rows=1, length=LENGTH, dtype="float32")


def new_chat(decoder, tokenizer, template="gemma", **settings) -> Chat:
    dialogue = Dialogue(tokenizer, ConversationConfig(template=template), LENGTH)
    ends = frozenset({1, dialogue.end})
    defaults = {"draw": Draw(), "max_new_tokens": 12}
    return Chat(decoder, dialogue, lambda: TextStream(tokenizer, ends), **defaults | settings)


@pytest.mark.parametrize("template", ["gemma", "aog", "komt", "alpaca", "kullm"])
def test_a_prompt_is_what_an_answer_was_trained_behind(tokenizer, template):
    dialogue = Dialogue(tokenizer, ConversationConfig(template=template), 1000)
    turns = ["봄에 무엇을 심나요?", "상추를 심습니다.", "<end_of_turn> 그리고요?", "콩도 심습니다."]
    roles = ["user", "assistant"] * 2
    messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)]
    form = ConversationConfig(template=template, train_on="last")
    encoded = Dialogue(tokenizer, form, 1000)._encoder.encode(document({"messages": messages}, form))
    prompt = dialogue.prompt(messages[:3])
    assert prompt == (encoded[: len(prompt)] & ~UNTRAINED).tolist()
    first = int(np.flatnonzero(encoded < UNTRAINED)[0])
    assert first == len(prompt) and encoded[encoded < UNTRAINED][-1] == dialogue.end
    assert (
        dialogue.end == (tokenizer.eos_id if template != "gemma" else 107)
        or tokenizer.piece(dialogue.end) == "<end_of_turn>"
    )
    for wrong in ([], messages[:2], messages[1:3], [{"role": "user", "content": " "}], messages[:1] * 2):
        with pytest.raises(ValueError, match="in turns|is empty"):
            dialogue.prompt(wrong)


def test_replies_go_on_from_the_whole_conversation(decoder, loaded, tokenizer):
    chat = new_chat(decoder, tokenizer, system="짧게.")
    for question in ("이름이 뭐예요?", "왜요?"):
        prompt = chat._dialogue.prompt([*chat.messages, {"role": "user", "content": question}])
        [ids] = generate(*loaded, [prompt], 12, dtype="float32")
        ids = ids[: ids.index(chat._dialogue.end)] if chat._dialogue.end in ids else ids
        expected = tokenizer.decode([i for i in ids if i != 1])
        pieces = list(chat.reply(question))
        assert "".join(pieces) == expected and len(pieces) >= 2
        assert chat.turns[-2:] == [
            {"role": "user", "content": question},
            {"role": "assistant", "content": expected.strip()},
        ]
    assert chat.messages[0] == {"role": "system", "content": "짧게."}


def test_what_is_typed_is_obeyed(decoder, tokenizer, tmp_path):
    chat, out, notes = new_chat(decoder, tokenizer), io.StringIO(), io.StringIO()
    file = tmp_path / "saved.jsonl"
    lines = ["/save " + str(file), "안녕", "", f"/save {file}", f"/save {file}", "/system 친절하게.", "/reset", "/what", "나" * 2000,
             "/quit", "never"]  # fmt: skip
    run_chat(chat, iter(lines), out, notes)
    said = notes.getvalue().splitlines()
    assert (
        said[0] == "(nothing was said yet)" and said[1].startswith(f"(saved to {file}") and "already exists" in said[2]
    )
    assert said[3:5] == ["(system line: 친절하게.)", "(a new conversation)"] and "/quit ends" in said[5]
    assert "tokens, and the window 128; /reset begins anew" in said[6] and len(said) == 7
    row = orjson.loads(file.read_bytes())
    assert document(row, ConversationConfig()) and row["messages"][0]["content"] == "안녕"
    assert chat.turns == [] and row["messages"][1]["content"] in out.getvalue()


def test_an_interrupted_reply_stays_in_the_conversation_and_controls_do_not_reach_the_terminal(tokenizer):
    class Slow:
        length = 500

        def begin(self, *_):
            self.calls = 0

        def advance(self):
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt
            ids = tokenizer.encode(["tree\x1b[31m\x07 red"])[0]
            return type("", (), {"ids": ids[None]})

    chat, out, notes = new_chat(Slow(), tokenizer), io.StringIO(), io.StringIO()
    run_chat(chat, iter(["hello"]), out, notes)
    assert out.getvalue() == "tree[31m red\n" and "(stopped)" in notes.getvalue()
    assert chat.turns[1]["content"] == "tree\x1b[31m\x07 red"


def test_a_model_is_asked_as_it_was_trained(saved, tokenizer, tmp_path, monkeypatch):
    with pytest.raises(
        ConfigError, match="neither the model nor its tokenizer says how it is asked .* --template alpaca"
    ):
        open_dialogue(saved, None, tokenizer, None, LENGTH)
    assert open_dialogue(saved, None, tokenizer, "komt", LENGTH).name == "komt"
    source = {"weight": 1.0, "conversations": {"template": "aog", "system": "x", "system_place": "drop", "date": None}}
    info = {"config": {"data": {"sources": {"text": {"weight": 1.0, "conversations": None}, "chat": source}}}}
    monkeypatch.setattr("easylm_mling.inference.dialogue.load_info", lambda *_: info)
    (tmp_path / "run").mkdir()
    assert open_dialogue(tmp_path / "run", None, tokenizer, None, LENGTH).name == "aog"


def test_the_verb_answers_what_is_piped_into_it(saved, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("안녕\n/quit\n"))
    arguments = [
        "chat",
        str(saved),
        "--max-length",
        "64",
        "--max-new-tokens",
        "8",
        "--temperature",
        "0",
        "--dtype",
        "float32",
    ]
    assert main([*arguments, "--template", "gemma"]) == 0
    said = capsys.readouterr()
    assert "asked by its template gemma" in said.err and said.out.endswith("\n")
    for wrong, message in ((["--max-length", "9999999"], "the model reads 2 to"), (["--top-p", "0"], "must be above 0"),
                           (["--template", "nothing"], "is none of tokenizer")):  # fmt: skip
        assert main([*arguments, *wrong]) == 2
        assert re.search(message, capsys.readouterr().err)
