"""`sample --file`: a text for each line of a file of prompts, in its order; a command that was killed goes on when repeated."""

import difflib
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import orjson

from easylm_mling.checkpoint.layout import step_directory
from easylm_mling.checkpoint.reading import load_info
from easylm_mling.config import ModelConfig
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.errors import ConfigError, check, one_line
from easylm_mling.inference.decoder import Draw
from easylm_mling.inference.generate import find_tokenizer, load_model, read_model
from easylm_mling.inference.texts import Prompt, Text, write_texts
from easylm_mling.storage.jsonl import JsonlWriter

# What a line may have beside its prompt, and the types of it; all else is kept as it is.
_SETTINGS: dict[str, tuple[type, ...]] = {
    "stop": (str, list), "max_new_tokens": (int,), "temperature": (int, float), "top_k": (int,), "top_p": (int, float),
    "seed": (int,),
}  # fmt: skip
_MADE = ("text", "finish", "key")


def sample_file(
    model_dir: str,
    prompts: str,
    output: str,
    settings: dict[str, Any],
    tokenizer_path: str | None = None,
    step: int | None = None,
    rows: int = 16,
    dtype: str = "bfloat16",
) -> tuple[int, int]:
    """Append to `output`, a .jsonl file, each line of `prompts` with what the model writes; return (lines done before, now).

    A line has `prompt` and perhaps `stop`, `max_new_tokens`, `temperature`, `top_k`, `top_p` and `seed`, which stand above
    `settings`. Without a seed of its own, line n (from 0) has that of `settings` plus n. The line that is written has all
    of it, `text`, `finish` (stop or length), and `key`, by which the same command goes on where it was killed. Raises
    ConfigError for a line that is wrong, and for an output of other prompts, settings or weights, before the model is loaded.
    """
    check(rows > 0, f"--rows {rows} must be positive")
    is_hf = (Path(model_dir) / "config.json").is_file()
    step = step if is_hf else int(step_directory(model_dir, step).name)
    tokenizer = Tokenizer(str(tokenizer_path or find_tokenizer(model_dir, step)), "--tokenizer ")
    lines = _read(prompts)
    about = orjson.dumps([_weights(model_dir, step), tokenizer.fingerprint, dtype], default=str)
    asked = [_asked(f"{prompts} line {n + 1}", line, settings, n) for n, line in enumerate(lines)]
    keys = [
        blake2b(about + orjson.dumps([line, a]), digest_size=12).hexdigest()
        for line, a in zip(lines, asked, strict=True)
    ]
    done = _done(Path(output), keys)
    if done == len(lines):
        return done, 0
    model = read_model(model_dir, step)
    tokenizer.check_model(model)
    todo = [
        _prompt(f"{prompts} line {n + 1}", lines[n]["prompt"], asked[n], model, tokenizer)
        for n in range(done, len(lines))
    ]
    graph, params, _ = load_model(model_dir, step=step)
    writer = JsonlWriter(Path(output), ascii_only=False)
    try:
        for n, text in _in_order(write_texts(graph, params, model, tokenizer, todo, rows, dtype)):
            made = dict(zip(_MADE, (*text, keys[done + n]), strict=True))
            writer.append(lines[done + n] | made)
    finally:
        writer.close()
    return done, len(todo)


def _weights(model_dir: str, step: int | None) -> list:
    """Return what tells these weights from others: a checkpoint's digests, or the files of a Hugging Face directory."""
    if step is not None:
        return [step, load_info(model_dir, step).get("digests", {})]
    files = ((file.name, file.stat()) for file in sorted(Path(model_dir).glob("*.safetensors")))
    return [[name, about.st_size, about.st_mtime_ns] for name, about in files]


def _in_order(texts: Iterator[tuple[int, Text]]) -> Iterator[tuple[int, Text]]:
    """Yield texts by their numbers from 0; those that end early wait."""
    waiting, next_one = {}, 0
    for number, text in texts:
        waiting[number] = text
        while next_one in waiting:
            yield next_one, waiting.pop(next_one)
            next_one += 1


def _read(path: str) -> list[dict]:
    lines = []
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                line = orjson.loads(raw)
                here = f"{path} line {number}"
                check(isinstance(line, dict) and isinstance(line.get("prompt"), str), f"{here}: needs a text `prompt`")
                clash = [name for name in _MADE if name in line]
                check(not clash, f"{here}: `{', '.join(clash)}` is what the output adds; rename it")
                lines.append(line)
    except OSError as error:
        raise ConfigError(f"--file {path}: cannot be read ({error.strerror})") from None
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"{path} line {len(lines) + 1}: is no JSON ({one_line(error)})") from None
    check(bool(lines), f"--file {path}: has no lines; write one JSON object with `prompt` in each")
    return lines


def _asked(here: str, line: dict, settings: dict[str, Any], number: int) -> dict[str, Any]:
    """Return the settings of a line, checked."""
    for name in line.keys() - _SETTINGS.keys():
        close = difflib.get_close_matches(name, _SETTINGS, n=1, cutoff=0.8)
        check(not close, f"{here}: no setting {name!r}; did you mean {close[0] if close else ''!r}?")
    given = {name: line[name] for name in _SETTINGS if line.get(name) is not None}
    for name, value in given.items():
        right = isinstance(value, _SETTINGS[name]) and not isinstance(value, bool)
        check(right, f"{here}: {name}={value!r} must be {' or '.join(t.__name__ for t in _SETTINGS[name])}")
    asked = {**settings, "seed": settings["seed"] + number, **given}
    stops = [asked["stop"]] if isinstance(asked["stop"], str) else list(asked["stop"] or [])
    check(all(isinstance(s, str) and s for s in stops), f"{here}: stop={stops} must be texts, none of them empty")
    check(asked["max_new_tokens"] > 0, f"{here}: max_new_tokens={asked['max_new_tokens']} must be positive")
    check(0 <= asked["temperature"] < float("inf"), f"{here}: temperature={asked['temperature']} must be zero or more")
    check(asked["top_k"] is None or asked["top_k"] > 0, f"{here}: top_k={asked['top_k']} must be positive")
    check(0 < asked["top_p"] <= 1, f"{here}: top_p={asked['top_p']} must be above 0 and at most 1")
    return asked | {"stop": stops}


def _prompt(here: str, text: str, asked: dict[str, Any], model: ModelConfig, tokenizer: Tokenizer) -> Prompt:
    ids = [*([model.bos_token_id] if model.bos_token_id >= 0 else []), *tokenizer.encode([text])[0].tolist()]
    most, room = asked["max_new_tokens"], model.max_position_embeddings
    check(bool(ids), f"{here}: the prompt is empty, and the model has no BOS to begin with")
    check(len(ids) + most <= room, f"{here}: {len(ids)} tokens and max_new_tokens={most} pass the model's {room}")
    draw = Draw(asked["temperature"], asked["top_p"], asked["top_k"] or 0, asked["seed"])
    return Prompt(tuple(ids), most, draw, tuple(asked["stop"]))


def _done(output: Path, keys: list[str]) -> int:
    """Return how many lines of the output are done, and cut off one that a kill left half."""
    if not output.is_file():
        return 0
    with open(output, "rb+") as file:
        done = whole = 0
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                key = orjson.loads(line).get("key")
            except (orjson.JSONDecodeError, AttributeError):
                key = None
            check(
                done < len(keys) and key == keys[done],
                f"{output} line {done + 1}: is not of these prompts, settings and weights; name another --output, or remove it",
            )
            done, whole = done + 1, whole + len(line)
        file.truncate(whole)
    return done
