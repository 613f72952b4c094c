"""The chat form: the ids of transformers' chat template with one BOS, answers by themselves, columns of their own."""

import json

import pytest

pytest.importorskip("lm_eval", reason="needs the extra [eval]")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from conversation_cases import GEMMA_LIKE  # noqa: E402
from eval_models import ROOT, ours, save  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from easylm_mling.cli.main import main  # noqa: E402
from easylm_mling.data.tokenization.tokenizer import Tokenizer  # noqa: E402
from easylm_mling.errors import ConfigError  # noqa: E402
from easylm_mling.evaluation.chat import ChatForm  # noqa: E402

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "비가 오면 사람들은"},
    {"role": "assistant", "content": "우산을 쓴다"},
    {"role": "user", "content": "<end_of_turn> 太陽は\n\n"},
]


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save(tmp_path_factory.mktemp("chat") / "model")
    (folder / "chat_template.jinja").write_text(GEMMA_LIKE)
    return folder


@pytest.fixture(scope="module")
def evaluated(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated")
    command = ["eval", str(model), "--suite", "quick", "--dtype", "float32", "--output"]
    assert main([*command, str(out / "both"), "--form", "both"]) == 0
    for form in ("plain", "chat"):
        assert main([*command, str(out / form), "--form", form]) == 0
    return out


def test_a_prompt_has_the_ids_of_transformers_and_one_bos(model, tmp_path):
    theirs, lm = AutoTokenizer.from_pretrained(model), ours(model, tmp_path / "cache")
    lm._chat = ChatForm(Tokenizer(str(model)))
    harmless = [{**m, "content": m["content"].removeprefix("<end_of_turn> ")} for m in TURNS]
    want = theirs.apply_chat_template(harmless, add_generation_prompt=True, return_dict=False)
    context, continuation = lm._encode_pair(lm.apply_chat_template(harmless), "東から昇る")
    # The header ends in a newline, and the answer has none of it.
    assert context == want and context.count(2) == 1
    assert continuation == theirs.encode("東から昇る", add_special_tokens=False)
    # A system line where the template has no place for one, a mark of a turn in a text, and a beginning of the answer.
    ids, _ = lm._encode_pair(lm.apply_chat_template([SYSTEM, *TURNS]), "x")
    ends, starts = (theirs.convert_tokens_to_ids(f"<{which}_of_turn>") for which in ("end", "start"))
    assert (ids.count(ends), ids.count(starts), ids.count(2)) == (3, 4, 1)
    assert "Be brief.\n\n비가" in theirs.decode(ids)
    begun, _ = lm._encode_pair(lm.apply_chat_template([*harmless, {"role": "assistant", "content": "答え"}]), "x")
    assert begun == want + theirs.encode("答え", add_special_tokens=False)
    assert lm._encode_pair("plain ", "text")[0] == [2, *theirs.encode("plain", add_special_tokens=False)]
    with pytest.raises(ConfigError, match="a prompt cannot be written by the template: .*; use --form plain"):
        lm._encode_pair(lm.apply_chat_template([TURNS[0], TURNS[0]]), "x")
    lm.cache.close()


def test_scores_are_those_of_transformers_on_those_ids(model, evaluated):
    tokenizer = AutoTokenizer.from_pretrained(model)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    lines = (evaluated / "both" / "items-quick-chat.jsonl").read_text().splitlines()
    items = {(i["task"], i["doc_id"]): i for i in map(json.loads, lines)}
    texts = [json.loads(line) for line in (ROOT / "data" / "eval" / "ends_ko.jsonl").read_text().splitlines()]
    for number, text in enumerate([t for t in texts if t["split"] == "test"][:4]):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": text["begin"]}], add_generation_prompt=True, return_dict=False
        )
        for end, answer in zip(text["ends"], items["pack_ends_ko", number]["filtered_resps"], strict=True):
            ids = tokenizer.encode(end, add_special_tokens=False)
            with torch.no_grad():
                scores = theirs(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            assert float(answer[0]) == pytest.approx(float(scores[np.arange(len(ids)), ids].sum()), abs=1e-4)


def test_both_forms_have_columns_of_their_own_and_each_is_as_alone(model, evaluated, capsys):
    both, plain = evaluated / "both", evaluated / "plain"
    for name in ("items-quick.jsonl", "results-quick.md"):
        assert (both / name).read_bytes() == (plain / name).read_bytes()
    # With the same shots as the plain one, though it comes second.
    chat = (evaluated / "chat" / "items-quick-chat.jsonl").read_bytes()
    assert (both / "items-quick-chat.jsonl").read_bytes() == chat
    assert (both / "items-quick-chat.jsonl").read_bytes() != (plain / "items-quick.jsonl").read_bytes()
    page = (both / "results-quick-forms.md").read_text().splitlines()
    assert page[0] == "| task | version | shots | split | measure | plain | ± | chat | ± |"
    of_each = [json.loads((both / f"results-quick{f}.json").read_bytes())["scores"] for f in ("", "-chat")]
    assert page[2].endswith(" | ".join(f"{s[0][k]:.4f}" for s in of_each for k in ("value", "error")) + " |")
    assert "chat form (template: tokenizer" in (both / "results-quick-chat.md").read_text()
    command = ["eval", str(model), "--suite", "quick", "--dtype", "float32", "--output", str(both)]
    assert main([*command, "--baseline", str(both / "results-quick-chat.json")]) == 2
    assert "it has prompts in the chat form, and these are in the plain form" in capsys.readouterr().err
    assert main([*command, "--form", "chat", "--template", "nothing"]) == 2
    assert "is none of tokenizer, alpaca" in capsys.readouterr().err
