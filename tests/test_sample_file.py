"""`sample --file`: each line's text is its own, in order, and a killed command goes on to the same bytes."""

import json
import shutil
from pathlib import Path

import pytest
from test_generate import one_device, transformers_model

from easylm_mling.cli.main import main
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.inference import prompt_file
from easylm_mling.inference.generate import generate, load_model
from easylm_mling.storage.jsonl import JsonlWriter

TOKENIZER = Path("data/sample/tokenizer")
FLAGS = ("--dtype", "float32", "--rows", "2", "--max-new-tokens", "20")
# Long and short, so that rows end at other times; settings of their own, and fields that are only kept.
LINES = [
    {"prompt": "The river runs over the old stones and past the mill " * 4, "id": "long"},
    {"prompt": "今日は", "max_new_tokens": 3},
    {"prompt": "오늘 아침에", "temperature": 0.9, "top_k": 30, "seed": 5},
    {"prompt": "In the morning"},
    {"prompt": "오늘 아침에", "temperature": 0.9, "top_k": 30, "seed": 5, "id": "again"},
    {"prompt": "", "temperature": 1.0},
    {"prompt": "", "temperature": 1.0, "max_new_tokens": 11},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("sampled") / "model"
    transformers_model(vocab_size=4096, bos_token_id=2, eos_token_id=1, pad_token_id=0).save_pretrained(path)
    for file in TOKENIZER.iterdir():
        shutil.copy(file, path)
    return path


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in LINES))
    return file


def sample(model, prompts, output, *flags: str) -> int:
    return main(["sample", str(model), "--file", str(prompts), "--output", str(output), *FLAGS, *flags])


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.usefixtures("one_device")
def test_each_line_has_the_text_that_its_prompt_has_alone(model, prompts, tmp_path):
    graph, params, config = load_model(model, one_device())
    tokenizer = Tokenizer(str(TOKENIZER))

    def alone(prompt: str, count: int) -> str:
        [ids] = generate(graph, params, config, [[2, *tokenizer.encode([prompt])[0].tolist()]], count, dtype="float32")
        return tokenizer.decode([i for i in ids if i != 1])

    assert sample(model, prompts, tmp_path / "free.jsonl") == 0
    free = read(tmp_path / "free.jsonl")
    assert [{k: v for k, v in line.items() if k in LINES[0] | LINES[2] | LINES[1]} for line in free] == LINES
    for n in (0, 1, 3):
        assert free[n]["text"] == alone(LINES[n]["prompt"], LINES[n].get("max_new_tokens", 20))
    assert free[2]["text"] == free[4]["text"] != free[5]["text"], "a draw depends on its seed only"
    assert free[5]["text"][:5] != free[6]["text"][:5], "without a seed of its own a line has its number's"
    # What was written tells where it can be stopped: at the first of two stop strings.
    text = free[3]["text"]
    first, second = text[len(text) // 3 :][:2], text[len(text) // 2 :][:2]
    assert sample(model, prompts, tmp_path / "cut.jsonl", "--stop", second, "--stop", first) == 0
    cut = read(tmp_path / "cut.jsonl")[3]
    assert cut["text"] == text[: min(text.find(first), text.find(second))] and cut["finish"] == "stop"


@pytest.mark.usefixtures("one_device")
def test_a_killed_command_goes_on_to_the_same_bytes(model, prompts, tmp_path, capsys, monkeypatch):
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    assert sample(model, prompts, whole) == 0
    append = JsonlWriter.append

    def dying(self, record, left=[3]):  # noqa: B006 - counts down
        left[0] -= 1
        if left[0] < 0:
            self._file.write(b'{"prompt": "half')
            raise SystemExit(9)
        append(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(JsonlWriter, "append", dying)
        with pytest.raises(SystemExit):
            sample(model, prompts, killed)
    assert killed.read_bytes() == b"".join(whole.read_bytes().splitlines(True)[:3]) + b'{"prompt": "half'
    capsys.readouterr()
    assert sample(model, prompts, killed) == 0
    assert killed.read_bytes() == whole.read_bytes()
    assert "4 texts written" in capsys.readouterr().out
    # What is done needs no model.
    monkeypatch.setattr(prompt_file, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    assert sample(model, prompts, killed) == 0
    # And nothing of others is mixed in.
    for flags in (("--temperature", "0.5"), ("--dtype", "bfloat16"), ("--seed", "7")):
        assert sample(model, prompts, killed, *flags) == 2
        assert "is not of these prompts, settings and weights; name another --output" in capsys.readouterr().err
    assert killed.read_bytes() == whole.read_bytes()


def test_wrong_lines_are_told_before_a_model_is_loaded(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prompt_file, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    file, good = tmp_path / "prompts.jsonl", '{"prompt": "a"}\n'
    for text, said in (
        ("", "has no lines"),
        (good + "{", "line 2: is no JSON"),
        (good + '{"text": "a"}', "line 2: needs a text `prompt`"),
        ('{"prompt": "a", "text": "b"}', "line 1: `text` is what the output adds"),
        ('{"prompt": "a", "stop": ["x", ""]}', "none of them empty"),
        ('{"prompt": "a", "top_k": 0}', "top_k=0 must be positive"),
        ('{"prompt": "a", "temperature": "hot"}', "temperature='hot' must be int or float"),
        ('{"prompt": "a", "max_new_tokens": 0}', "max_new_tokens=0 must be positive"),
        ('{"prompt": "a", "temprature": 0.5}', "line 1: no setting 'temprature'; did you mean 'temperature'?"),
        (good + json.dumps({"prompt": "stone " * 2000}), "pass the model's"),
    ):
        file.write_text(text)
        assert sample(model, file, tmp_path / "out.jsonl") == 2
        assert said in capsys.readouterr().err
    assert sample(model, tmp_path / "none.jsonl", tmp_path / "out.jsonl") == 2
    assert main(["sample", str(model), "--file", str(file)]) == 2
    assert main(["sample", str(model), "--prompt", "a", "--stop", "b"]) == 2
    assert main(["sample", str(model), "--prompt", "a", "--rows", "4"]) == 2
    assert not (tmp_path / "out.jsonl").exists()
