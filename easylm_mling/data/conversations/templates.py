"""Templates: how the messages of a conversation become one text. A chat template of Jinja, or a plain form of YAML.

A plain form is a few texts with `{user}`, `{system}`, `{input}`, `{assistant}` and `{eos}` in them (templates/*.yaml). The
text holds control tokens by their names; encoding.py makes them ids.
"""

import datetime
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import orjson

from easylm_mling.config.conversations import ConversationConfig
from easylm_mling.config.yaml12 import read_yaml
from easylm_mling.data.conversations.messages import Message
from easylm_mling.errors import ConfigError, one_line

# (messages, whether the prompt of an answer follows them) -> text. Raises ValueError for messages that it cannot write.
Render = Callable[[list[Message], bool], str]

_OWN = "tokenizer"  # the template beside the tokenizer
_SLOT = re.compile(r"\{(user|system|input|assistant|eos)\}")
_MAX_BYTES = 1_000_000


@dataclass(frozen=True)
class PlainForm:
    """A plain form. An exchange is a question and its answer.

    `prompt` is the last exchange's text up to the answer; `prompt_without_system` and `prompt_with_input` replace it where
    they apply. `earlier` is the text of an earlier exchange, answer included; by default its prompt, answer and `end`.
    `system` is written once, before all exchanges, if `prompt` has no place for it. `tokens` must be control tokens of
    the tokenizer.
    """

    prompt: str
    description: str = ""
    preamble: str = ""
    system: str = ""
    prompt_without_system: str = ""
    prompt_with_input: str = ""
    earlier: str = ""
    end: str = "{eos}"
    separator: str = ""
    tokens: tuple[str, ...] = ()

    @property
    def has_system(self) -> bool:
        """Whether the form has a place for a system line."""
        return "{system}" in self.prompt + self.system

    def render(self, messages: list[Message], eos: str) -> str:
        """Return the text of the messages; if they end in a question, it ends in the prompt of the answer."""
        system = messages[0]["content"].strip() if messages and messages[0]["role"] == "system" else ""
        turns = messages[1:] if system else messages
        out = self.preamble + (_fill(self.system, system=system) if system else "")
        for i in range(0, len(turns), 2):
            question, answer = turns[i], turns[i + 1]["content"].strip() if i + 1 < len(turns) else None
            is_last = i + 2 >= len(turns)
            if answer is not None and not is_last and self.earlier:
                out += _fill(self.earlier, user=_question(question), assistant=answer, eos=eos, system=system)
                continue
            out += self._prompt(question, system)
            if answer is not None:
                out += answer + _fill(self.end, eos=eos) + ("" if is_last else self.separator)
        return out

    def _prompt(self, question: Message, system: str) -> str:
        if self.prompt_with_input and question.get("input"):
            user, about = question["content"].strip(), question["input"].strip()
            return _fill(self.prompt_with_input, user=user, input=about, system=system)
        prompt = self.prompt if system or not self.prompt_without_system else self.prompt_without_system
        return _fill(prompt, user=_question(question), system=system)


def with_input(message: Message) -> Message:
    """Return a message without `input`, which follows its content behind a blank line."""
    if not message.get("input"):
        return message
    return {"role": message["role"], "content": f"{message['content'].strip()}\n\n{message['input'].strip()}"}


def _question(message: Message) -> str:
    return with_input(message)["content"].strip()


def _fill(text: str, **values: str) -> str:
    """Replace the slots of a form's text in one pass: what a value holds is not looked at."""
    return _SLOT.sub(lambda slot: values.get(slot[1], ""), text)


def plain_names() -> list[str]:
    """Return the names of the plain forms that come with the package."""
    folder = resources.files("easylm_mling.data.conversations") / "templates"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def read_template(config: ConversationConfig, tokenizer: str, key: str) -> dict[str, str]:
    """Return the template's `kind` (jinja or plain) and `text`; the errors are ConfigError and begin with `key`.

    `tokenizer`: the file or folder of data.tokenizer, whose chat template `template: tokenizer` is.
    """
    name = config.template
    if name == _OWN:
        return {"kind": "jinja", "text": _own_template(Path(tokenizer), key)}
    if re.fullmatch(r"[\w-]+", name):
        if name not in plain_names():
            raise ConfigError(
                f"{key}.template={name!r} is none of tokenizer, {', '.join(plain_names())}; "
                "of your own name the .yaml or .jinja file"
            )
        file = resources.files("easylm_mling.data.conversations") / "templates" / f"{name}.yaml"
        return {"kind": "plain", "text": file.read_text(encoding="utf-8")}
    kinds = {".jinja": "jinja", ".yaml": "plain", ".yml": "plain"}
    path = Path(name)
    if path.suffix not in kinds:
        raise ConfigError(f"{key}.template={name!r}: a template's file ends in .jinja or .yaml")
    return {"kind": kinds[path.suffix], "text": _read(path, key)}


def _own_template(tokenizer: Path, key: str) -> str:
    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    file = folder / "chat_template.jinja"
    if file.is_file():
        return _read(file, key)
    settings = folder / "tokenizer_config.json"
    template = None
    if settings.is_file():
        try:
            template = orjson.loads(_read(settings, key)).get("chat_template")
        except (orjson.JSONDecodeError, AttributeError) as error:
            raise ConfigError(f"{key}.template: {settings} is damaged ({one_line(error)}); copy it again") from None
    if isinstance(template, list):
        # Several by name; `default` is the one for conversations without tools.
        by_name = {t["name"]: t["template"] for t in template if isinstance(t, dict) and {"name", "template"} <= set(t)}
        template = by_name.get("default")
    if not isinstance(template, str):
        raise ConfigError(
            f"{key}.template=tokenizer: {folder} has no chat template (chat_template.jinja or tokenizer_config.json); "
            f"copy the model's, or name one of {', '.join(plain_names())}"
        )
    return template


def _read(path: Path, key: str) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{key}.template: {path} is over 1 MB, which no template is; is it the right file?")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}.template: {path} cannot be read ({one_line(error)})") from None


def parse_plain(text: str, key: str) -> PlainForm:
    """Return the plain form of a YAML text; raises ConfigError that begins with `key`."""
    try:
        tree = read_yaml(text)
    except Exception as error:  # yaml's own errors, and ours: all say what is wrong with the text
        raise ConfigError(f"{key}.template: not readable as YAML ({one_line(error)})") from None
    known = [f.name for f in fields(PlainForm)]
    if not isinstance(tree, dict) or not isinstance(tree.get("prompt"), str):
        raise ConfigError(f"{key}.template: a plain form needs `prompt`, a text; its keys are {', '.join(known)}")
    for name, value in tree.items():
        if name not in known:
            raise ConfigError(f"{key}.template: unknown key {name!r}; known keys: {', '.join(known)}")
        if not isinstance(value, str) and not (name == "tokens" and isinstance(value, list)):
            raise ConfigError(f"{key}.template: {name} must be text")
    if "{user}" not in tree["prompt"]:
        raise ConfigError(f"{key}.template: prompt has no {{user}}, where the question stands")
    return PlainForm(**{**tree, "tokens": tuple(map(str, tree.get("tokens", ())))})


def compile_jinja(text: str, date: str | None, names: dict[str, str], key: str) -> Render:
    """Return a chat template of Jinja, in a sandbox, as transformers runs it.

    `names`: the names of special tokens that it may write, such as `eos_token`. `date`: the day that it takes for today.
    Raises ConfigError that begins with `key` for a template that does not parse.
    """
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks answers for other tools; here it is what stands in it."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.date.fromisoformat(str(date)).strftime(form)

    def to_json(value: Any, indent: int | None = None, **_) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    if "strftime_now" in text and not date:
        raise ConfigError(
            f"{key}: the template writes today's date, so that no run could be repeated; set {key}.date, as 2024-07-26"
        )
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals.update(raise_exception=raise_exception)
    if date:
        day = datetime.date.fromisoformat(date)
        environment.globals.update(strftime_now=strftime_now, date_string=day.strftime("%d %b %Y"))
    try:
        template = environment.from_string(text)
    except jinja2.TemplateError as error:
        raise ConfigError(f"{key}.template: not readable as a Jinja template ({one_line(error)})") from None
    errors = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)

    def render(messages: list[Message], generation: bool) -> str:
        plain = [{"role": m["role"], "content": m["content"]} for m in map(with_input, messages)]
        try:
            return template.render(
                messages=plain, add_generation_prompt=generation, tools=None, documents=None, **names
            )
        except errors as error:
            raise ValueError(f"the template raises: {one_line(error)}") from None

    return render
