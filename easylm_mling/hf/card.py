"""Write the model card of an export from the run's own records, and from nothing else.

These are the checkpoint's info and data state, metrics.jsonl, catalog.json and the ledger. Paths and addresses stay out,
since they can hold names and keys; a source is called by its name in the config.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

from easylm_mling.checkpoint.best import choices_of
from easylm_mling.checkpoint.reading import load_data_state, load_info
from easylm_mling.config import ModelConfig, RunConfig, from_tree
from easylm_mling.data.catalog import Catalog
from easylm_mling.data.mixture import DataState
from easylm_mling.errors import ConfigError
from easylm_mling.formatting import markdown_table, tokens_text
from easylm_mling.hf.card_sections import Export, front_matter, has_gemma_terms, language_codes, limits, usage
from easylm_mling.hf.json_files import read_json
from easylm_mling.hf.plot import LOSSES, plot_losses
from easylm_mling.hf.tokenizer import separator_of
from easylm_mling.model.params import parameter_count
from easylm_mling.monitoring.metrics import read_metrics
from easylm_mling.monitoring.task_table import before_and_after
from easylm_mling.run.changes import change_text, past_changes
from easylm_mling.run.data import load_ledger

_FAMILY_NAMES = {
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (text)",
    "gemma4_text": "Gemma 4 (text)",
    "gemma4_unified_text": "Gemma 4 (text)",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen 2",
    "qwen3": "Qwen 3",
}
_DATA_CHANGED = "## Data\n\nThe run went on with other data after this step; the card of a later step has the table.\n"


@dataclass(frozen=True)
class Base:
    """The model that the first parameters came from; None: they were random."""

    name: str | None
    revision: str | None = None
    on_hub: bool = False


def write_card(folder: Path, export: Export, languages: tuple[str, ...] = (), made: str = ""):
    """Write README.md, Markdown with YAML front matter, into `folder`, and the picture of the losses if there are any.

    `languages` are ISO 639 codes beside those that the data's folders name, and `made` a section on how the weights were
    made from the run's. Raises ConfigError for one that is no code.
    """
    info = load_info(export.checkpoint_dir, export.step)
    run, step = export.files, export.step
    is_run = (run / "catalog.json").is_file()
    catalog = Catalog.load(run / "catalog.json") if is_run else None
    by_source = {source: s.languages for source, s in catalog.sources.items()} if catalog else {}
    base, codes = _base(info), language_codes(languages, by_source)
    parts = [_front_matter(base, export.model, codes), _summary(base, export, info, codes), made]
    if catalog:
        config = from_tree(RunConfig, info["config"])
        evaluations, training = (_up_to(run, kind, step) for kind in ("eval", "train"))
        drawn = plot_losses(folder / LOSSES, list(by_source), evaluations, training)
        parts += [
            _data(config, catalog, run, load_data_state(export.checkpoint_dir, step))
            if catalog.fingerprint == info["data"]
            else _DATA_CHANGED,
            _losses(list(by_source), evaluations, drawn),
            _tasks(config, run, step),
            _scores(run, step),
            _recipe(config, step, training, past_changes(run / "history.jsonl")),
        ]
    sections = (usage(export, separator_of(folder)), limits(is_gemma(base, export.model), base.name is not None))
    text = "\n".join([*filter(None, parts), *sections])
    (folder / "README.md").write_text(text, encoding="utf-8")


def _front_matter(base: Base, model: ModelConfig, codes: list[str]) -> str:
    values: dict = {"tags": ["continued-pretraining"]}
    if base.on_hub:
        values["base_model"] = base.name
    return front_matter(values, is_gemma(base, model), codes)


def _summary(base: Base, export: Export, info: dict, codes: list[str]) -> str:
    size = f"{_FAMILY_NAMES[export.model.model_type]} model of {parameter_count(export.model):,} parameters"
    start = f"from {_base_text(base)}" if base.name else "from random parameters"
    # An imported checkpoint has consumed no tokens.
    history = (
        f"trained {start} on {info['tokens']:,} tokens ({export.step:,} steps)"
        if "tokens" in info
        else f"taken {start}"
    )
    spoken = f" Languages: {', '.join(codes)}." if codes else ""
    if len(codes) > 10:
        spoken = f" Its data is in {len(codes)} languages (see the top of this file)."
    return f"# {export.name.split('/')[-1]}\n\nA {size}, {history} with easylm_mling.{spoken}\n"


def _data(config: RunConfig, catalog: Catalog, run: Path, state: dict) -> str:
    consumed = load_ledger(config, run).sources(DataState(**state))
    total = max(1, sum(source["tokens"] for source in consumed.values()))
    heads = ("corpus", "languages", "size of its files", "sampled", "documents", "tokens consumed", "share", "epochs")
    rows = []
    for name, source in consumed.items():
        spoken = [t for t in catalog.sources[name].languages if t]
        size, epochs = sum(f.size for f in catalog.sources[name].files), source["epochs"]
        sampled, passes = ("yes" if epochs < 1 else "no", f"{epochs:.2f}") if epochs is not None else ("-", "-")
        counts = (f"{source['documents']:,}", f"{source['tokens']:,}", f"{source['tokens'] / total:.2%}")
        rows.append((name, len(spoken) or "-", _bytes_text(size), sampled, *counts, passes))
    tagged = {name: s.languages for name, s in catalog.sources.items() if len(s.languages) > 1}
    notes = [
        f"Documents are packed into rows of {config.data.sequence_length:,} tokens and do not see each other.",
        "Epochs are tokens consumed over the estimated tokens of the corpus. A corpus is sampled if it was not read whole.",
        *(f"Languages of {name}: {', '.join(tags)}." for name, tags in tagged.items()),
    ]
    return "\n".join(["## Data", "", *markdown_table(heads, rows), "", "\n\n".join(notes), ""])


def _losses(names: list[str], evaluations: list[dict], drawn: bool) -> str:
    measured = [e for e in evaluations if e.get("loss") is not None]
    if not measured:
        return "## Losses\n\nNo text was held out, so none were measured.\n"
    shown = [measured[0], measured[-1]] if len(measured) > 1 else measured
    rows = []
    for name in (*names, None):
        values = [e["loss"] if name is None else e["sources"].get(name) for e in shown]
        rows.append((name or "**all**", *("-" if v is None else f"{v:.4f}" for v in values)))
    table = markdown_table(("corpus", *(f"step {e['step']:,}" for e in shown)), rows)
    note = "Nats a token on held-out documents of the same corpora, which were never trained on."
    picture = [f"![losses]({LOSSES})", "", "Faint lines: losses of the training batches.", ""]
    return "\n".join(["## Losses", "", note, "", *table, "", *(picture if drawn else [])])


def _tasks(config: RunConfig, run: Path, step: int) -> str:
    """Tabulate what the run scored on tasks while it trained."""
    heads, rows = before_and_after(run / "metrics.jsonl", step)
    note = f"A small fixed part of the suite {config.eval.suite}, by log-likelihoods: it shows what changed, and is no score to "
    note += (
        "compare with others'. Bits a byte are those of right answers; of accuracies, 0 is chance and 1 is all right."
    )
    return "\n".join(["## Tasks, before and after", "", note, "", *markdown_table(heads, rows), ""]) if rows else ""


def _scores(run: Path, step: int) -> str:
    """Tabulate the files that lm-evaluation-harness wrote (--output_path) and that lie in RUN/evaluations/STEP."""
    rows = []
    for file in sorted((run / "evaluations" / str(step)).glob("**/*.json")):
        scores = read_json(file)
        shots, versions = scores.get("n-shot", {}), scores.get("versions", {})
        form = " (chat form)" if scores.get("about", {}).get("form") == "chat" else ""
        for task, measures in scores.get("results", {}).items():
            for key, value in measures.items():
                measure, _, variant = key.partition(",")
                if isinstance(value, float) and not measure.endswith("_stderr"):
                    shown = measure if variant in ("", "none") else f"{measure} ({variant})"
                    rows.append((task + form, versions.get(task, "-"), shots.get(task, "-"), shown, f"{value:.4f}"))
    heads = ("task", "version", "shots", "measure", "value")
    note = "By [lm-evaluation-harness](https://github.com/EleutherAI/lm-evaluation-harness)."
    chosen = [_chosen(suite, about) for suite, about in choices_of(run, step).items()]
    return "\n".join(["## Evaluation", "", note, *chosen, "", *markdown_table(heads, rows), ""]) if rows else ""


def _chosen(suite: str, about: dict) -> str:
    """Say by what this checkpoint was chosen as the best, and how good it is on items that did not choose it."""
    text = f"This step is the best of {len(about.get('steps', []))} kept checkpoints by the suite {suite}: chosen by "
    text += str(about.get("by", "its scores"))
    other = about.get("on_the_other_half")
    return text + (
        f", and {other:.4f} on the other half, which had no part in the choice." if isinstance(other, float) else "."
    )


def _recipe(config: RunConfig, step: int, training: list[dict], changes: list[dict]) -> str:
    o, t, mesh = config.optimizer, config.train, config.mesh
    rates = [e["tokens_per_second"] for e in training if e.get("tokens_per_second")]
    axes = ", ".join(f"{axis} {getattr(mesh, axis)}" for axis in ("data", "fsdp", "tensor"))
    axes += f", sequence {mesh.sequence}" if mesh.sequence > 1 else ""
    hardware = f"{mesh.cpu_devices} simulated CPU devices" if mesh.cpu_devices else "accelerators"
    rest = " (-1: all other devices)" if -1 in (mesh.data, mesh.fsdp, mesh.tensor) else ""
    decay = f", decay over the last {o.decay}" if o.schedule == "wsd" else ""
    before = "".join(f"; {e.batch_size} rows up to step {e.until_step:,}" for e in t.earlier_batch_sizes)
    rows = [
        ("steps", f"{step:,} of {config.total_steps:,}"),
        (
            "tokens a step",
            f"{config.tokens_per_step:,} ({t.batch_size} rows of {config.data.sequence_length:,}){before}",
        ),
        ("optimizer", f"AdamW, beta {o.beta1} and {o.beta2}, epsilon {o.epsilon}, weight decay {o.weight_decay}"),
        (
            "learning rate",
            f"{o.learning_rate}, {o.schedule}, warm-up {o.warmup}{decay}, down to {o.final_fraction} of it",
        ),
        ("gradient clipping", f"global norm {o.clip_norm}"),
        (
            "precision",
            f"parameters and moments float32, computed in {t.compute_dtype}"
            + (f", the layers' projections with {t.products.text}" if t.products else ""),
        ),
        ("seeds", f"parameters {t.seed}, data {config.data.seed}"),
        ("hardware", f"{hardware}, mesh {axes}{rest}"),
    ]
    if lora := config.lora:
        kind = "rsLoRA" if lora.rslora else "LoRA"
        what = f"{kind} of rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}, on {', '.join(lora.projections)}"
        rows.insert(0, ("trained", f"{what}; merged into the base, which stayed as it was"))
    rows += [("changed", change_text(line)) for line in changes if line["step"] <= step]
    if rates:
        rows.append(("speed", f"{tokens_text(statistics.median(rates))} tokens a second (median of the steps logged)"))
    return "\n".join(["## Training", "", *markdown_table(("setting", "value"), rows, "---"), ""])


def _base(info: dict) -> Base:
    """Follow init_from from run to run to what was imported, as far as the checkpoints still exist."""
    seen = set()
    while "source" not in info:
        if "config" not in info:  # saved by other code, so of unknown origin
            return Base("other weights")
        start = info["config"].get("init_from")
        if not start or start in seen:
            return Base(None)
        seen.add(start)
        try:
            info = load_info(start)
        except ConfigError:
            return Base(Path(start).name)
    source = info["source"]
    return Base(source["name"] if source["hub"] else Path(source["name"]).name, source["revision"], source["hub"])


def _base_text(base: Base) -> str:
    revision = f" at {base.revision}" if base.revision else ""
    return f"[{base.name}](https://huggingface.co/{base.name}){revision}" if base.on_hub else f"`{base.name}`"


def is_gemma(base: Base, model: ModelConfig) -> bool:
    """Return True if the weights derive from those of Google that have its terms."""
    return base.name is not None and has_gemma_terms(model)


def _up_to(run: Path, kind: str, step: int) -> list[dict]:
    """Read the lines of one kind up to `step` in metrics.jsonl, if there is one."""
    file = run / "metrics.jsonl"
    return [e for e in read_metrics(file, kind) if e["step"] <= step] if file.is_file() else []


def _bytes_text(n: float) -> str:
    """Format 1234567 as '1.23 MB'."""
    units = iter(("B", "KB", "MB", "GB", "TB", "PB"))
    unit = next(units)
    while n >= 999.5:
        n, unit = n / 1000, next(units)
    return f"{n:.3g} {unit}"
