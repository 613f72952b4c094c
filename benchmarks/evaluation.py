"""Log-likelihoods of choice tasks with 5 shots: ours beside lm-evaluation-harness's own HF model; one model, one run, float32.

    python benchmarks/evaluation.py [--questions 200] [--rounds 3] [--batch 16]
                                            (needs the harness, torch and accelerate: requirements-test.lock)

The model is a random Gemma of 4 layers, 256 wide, with the sample's tokenizer. Questions are those of data/eval, each behind
five others with their answers, drawn anew for each; `texts` asks for the end of a sentence, `letters` for A, B or C behind
the ends, and `subject` is the same with one five for all, as MMLU, CMMLU, C-Eval and KMMLU have them. Both models get the same requests, are warmed up by all of them, and have the rates of their best rounds, over seconds and
over CPU seconds of the process: on a busy machine the latter count. The difference is the largest of any log-likelihood, in
nats. Real tokens are those of requests over all that were computed.
"""

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from transformers import AutoTokenizer, GemmaConfig, GemmaForCausalLM  # noqa: E402

from easylm_mling.data.tokenization.tokenizer import Tokenizer  # noqa: E402
from easylm_mling.evaluation.harness import HarnessModel, Limits  # noqa: E402
from easylm_mling.evaluation.request_cache import RequestCache  # noqa: E402
from easylm_mling.evaluation.scoring.scorer import Scorer  # noqa: E402
from easylm_mling.inference.generate import load_model  # noqa: E402

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "data" / "sample" / "tokenizer"
LENGTH, SHOTS = 1024, 5


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16, help="of the harness's HF model")
    a = parser.parse_args()
    print(
        f"{a.questions} questions of 3 choices, {SHOTS} shots; the best of {a.rounds} rounds; load {os.getloadavg()[0]:.1f}"
    )
    with tempfile.TemporaryDirectory(prefix="benchmark_evaluation_") as folder:
        model = tiny_model()
        model.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
        theirs = HFLM(pretrained=model, tokenizer=tokenizer, max_length=LENGTH, add_bos_token=True, batch_size=a.batch,
                      device="cpu")  # fmt: skip
        graph, params, config = load_model(folder)
        scorer = Scorer(graph, params, config, params["embed_tokens"].sharding.mesh, "float32")
        for kind in ("texts", "letters", "subject"):
            compare(kind, requests(kind, a.questions), scorer, theirs, Path(folder), a.rounds)
    print(f"load {os.getloadavg()[0]:.1f}")


def compare(kind: str, asked: list[Instance], scorer: Scorer, theirs: HFLM, folder: Path, rounds: int):
    wall, cpu, answers, real = {}, {}, {}, 0.0
    for number in range(rounds + 1):
        cache = RequestCache(folder / f"{kind}-{number}.jsonl")
        lm = HarnessModel(scorer, Tokenizer(str(TOKENIZER)), cache, Limits(LENGTH))
        for name, ask in (("ours", lm.loglikelihood), ("HF model", theirs.loglikelihood)):
            begun = time.perf_counter(), time.process_time()
            answers[name] = ask(asked, disable_tqdm=True)
            for best, clock, start in zip((wall, cpu), (time.perf_counter, time.process_time), begun, strict=True):
                if number:
                    best[name] = min(best.get(name, float("inf")), clock() - start)
        cache.close()
        real = lm.counts["tokens"] / lm.counts["slots"]
    most = max(abs(x[0] - y[0]) for x, y in zip(answers["ours"], answers["HF model"], strict=True))
    for clock, best in (("second", wall), ("CPU second", cpu)):
        rates = {name: len(asked) / seconds for name, seconds in best.items()}
        print(
            f"{kind:8} requests a {clock:10} ours {rates['ours']:7.1f}, HF model {rates['HF model']:7.1f}: "
            f"{rates['ours'] / rates['HF model']:.1f} x",
            flush=True,
        )
    print(f"{kind:8} {real:.1%} of our tokens were real; difference {most:.1e}", flush=True)


def tiny_model() -> GemmaForCausalLM:
    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=LENGTH, bos_token_id=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return GemmaForCausalLM(config).eval()


def requests(kind: str, count: int) -> list[Instance]:
    """Requests of `count` questions, three each."""
    rng = random.Random(0)
    files = sorted((ROOT / "data" / "eval").glob("ends_*.jsonl"))
    items = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    made = []
    subject = rng.sample(items, SHOTS)
    for number in range(count):
        question, *shots = rng.sample(items, SHOTS + 1)
        shots = subject if kind == "subject" else shots
        before = "".join(f"{asked(kind, s)}{answers(kind, s)[s['right']]}\n\n" for s in shots)
        for answer in answers(kind, question):
            made.append(Instance("loglikelihood", {}, (before + asked(kind, question), answer), number))
    return made


def asked(kind: str, item: dict) -> str:
    if kind == "texts":
        return item["begin"]
    ends = "\n".join(f"{letter}. {end}" for letter, end in zip("ABC", item["ends"], strict=True))
    return f"{item['begin']} ...\n{ends}\nAnswer:"


def answers(kind: str, item: dict) -> list[str]:
    return [f" {end}" for end in (item["ends"] if kind == "texts" else "ABC")]


if __name__ == "__main__":
    main()
