"""The data of a run: its catalog, mixing plan and ledger, and whether a checkpoint's data state may go on with them."""

import json
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import orjson

from easylm_mling.config import RunConfig, from_tree, to_tree
from easylm_mling.data.catalog import Catalog, build_catalog, reopen_catalog
from easylm_mling.data.estimates import catalog_rates, load_estimates, open_estimates, pinned_fingerprints
from easylm_mling.data.ledger import Ledger
from easylm_mling.data.migration import carry_over
from easylm_mling.data.mixture import DataState
from easylm_mling.data.state_archive import KeptState, forget_after, keep_state
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.data.tokenization.tokenizer import fingerprints as file_fingerprints
from easylm_mling.data.weights import MixingPlan, make_plan
from easylm_mling.errors import ConfigError
from easylm_mling.run.directory import RunDirectory
from easylm_mling.storage.atomic import write_atomically


def open_catalog(run: RunDirectory, config: RunConfig, accept_change: bool) -> Catalog:
    """List the sources. Raises ConfigError when the run began with other files, unless that is accepted."""
    if run.catalog_file.exists() and not accept_change and not run.begins_anew:
        return reopen_catalog(Catalog.load(run.catalog_file), config.data)
    return build_catalog(config.data)


@dataclass(frozen=True)
class RunData:
    """What a run reads, in which shares, and its books."""

    run: RunDirectory
    config: RunConfig
    catalog: Catalog
    plan: MixingPlan
    ledger: Ledger
    fingerprints: dict[str, str]  # of tokenizer and data
    beside: list[str]  # fingerprints of the run's other tokenizer file, which it ships and does not read
    estimates_digest: str  # of the numbers that decide the shares
    accept_change: bool

    @classmethod
    def open(
        cls, run: RunDirectory, config: RunConfig, catalog: Catalog, tokenizer: Tokenizer, accept_change: bool = False
    ) -> "RunData":
        """Open the data of the run, whose directory is there: catalog and estimates are kept in it."""
        if run.writes:
            catalog.save(run.catalog_file)
        estimates = open_estimates(run.estimates_file, catalog, tokenizer)
        plan = make_plan(config.mixer, catalog, catalog_rates(estimates))
        ledger = Ledger(catalog, plan, estimates, config.data.sequence_length)
        digest = blake2b(json.dumps(estimates, sort_keys=True).encode(), digest_size=8).hexdigest()
        beside = sorted({*file_fingerprints(run.tokenizer_dir).values()} - {tokenizer.fingerprint})
        prints = fingerprints(tokenizer, catalog)
        return cls(run, config, catalog, plan, ledger, prints, beside, digest, accept_change)

    def resume(self, step: int, state: DataState, info: dict) -> tuple[DataState, list[str]]:
        """The state to go on with from the checkpoint of `step`, and a line about each source that has changed.

        Raises ConfigError for another tokenizer or other files, unless that is accepted, and for other stages in the past.
        """
        self._check_stages(info)
        news: list[str] = []
        changed = [what for what, value in self.fingerprints.items() if info[what] != value]
        # Through the config, which fills in what there was no key for when the checkpoint was made.
        now, then = (to_tree(c.data) for c in (self.config, from_tree(RunConfig, info["config"])))
        changed += [f"data.{key}" for key in ("sources", "weighting") if now[key] != then[key]]
        if changed and not self.accept_change:
            raise ConfigError(
                f"{self.run.path}: the {changed[0]} is not the one that the checkpoint of step {step} was made with; "
                "restore it, or go on with --accept-data-change"
            )
        if not changed and info.get("estimates", self.estimates_digest) != self.estimates_digest:
            raise ConfigError(
                f"{self.run.estimates_file}: not the estimates that the checkpoint of step {step} was made with; restore the "
                "file from a backup, or remove it: it is made anew from the same files"
            )
        if not changed and self.run.writes and info.get("tokenizer_beside", self.beside) != self.beside:
            raise ConfigError(
                f"{self.run.tokenizer_dir}: holds another tokenizer file than when the checkpoint of step {step} was made; "
                "copy the tokenizer's own here again"
            )
        if changed:
            old = Catalog.load(self.run.set_aside_path(self.run.catalog_file, step))
            if old.fingerprint != info["data"]:
                raise ConfigError(f"{self.run.path}: the catalog of the checkpoint of step {step} is gone; restore it")
            state, news = carry_over(state, old, self.catalog, self.plan, "tokenizer" not in changed)
        if self.run.writes:
            forget_after(self.run.states_dir, step)
        if changed:
            self.keep(step, state)
        return state, news

    def keep(self, step: int, state: DataState):
        """Keep the whole run's state after `step` for audits."""
        if not self.run.writes:
            return
        stages = to_tree(self.config.data)["stages"]
        keep_state(self.run.states_dir, step, KeptState(state, {"stages": stages, **self.fingerprints}))

    def write_ledger(self, step: int, state: DataState, skipped: dict[str, int]):
        """RUN/ledger.json, whole or not at all. `skipped`: how many of the steps taught nothing, by the guard that said so."""
        if self.run.writes:
            whole = {"step": step, "skipped_steps": skipped, **self.ledger.whole(state)}
            write_atomically(self.run.ledger_file, orjson.dumps(whole, option=orjson.OPT_INDENT_2))

    def _check_stages(self, info: dict):
        """Stages that had begun when the checkpoint was made are the past, and may not change."""

        def begun(stages: list[dict]) -> list[dict]:
            row_of_lanes = self.config.lanes * self.config.data.sequence_length
            return [s for s in stages if -(-s["from_tokens"] // row_of_lanes) * row_of_lanes < info["tokens"]]

        old, new = begun(info["config"]["data"]["stages"]), begun(to_tree(self.config.data)["stages"])
        if old != new:
            raise ConfigError(
                f"data.stages: those that began before {info['tokens']} tokens were {old} and are now {new}; set them "
                "back (later ones may change)"
            )


def fingerprints(tokenizer: Tokenizer, catalog: Catalog) -> dict[str, str]:
    """What a checkpoint is compared by before a run goes on from it."""
    return {"tokenizer": tokenizer.fingerprint, "data": catalog.fingerprint}


def is_of_other_data(run: RunDirectory, tokenizer: Tokenizer, catalog: Catalog) -> bool:
    """Whether the run's directory was begun with other data or another tokenizer than these."""
    kept = run.estimates_file
    other = kept.exists() and pinned_fingerprints(kept) != fingerprints(tokenizer, catalog)
    return run.data_settings_changed or other


def load_ledger(config: RunConfig, run_dir: str | Path) -> Ledger:
    """The ledger of a run, from what lies in its directory; raises ConfigError if it never began."""
    estimates_file = Path(run_dir) / "estimates.json"
    if not estimates_file.is_file():
        raise ConfigError(f"{run_dir}: holds no estimates.json; run `train` again, which writes it")
    catalog, estimates = Catalog.load(Path(run_dir) / "catalog.json"), load_estimates(estimates_file)
    plan = make_plan(config.mixer, catalog, catalog_rates(estimates))
    return Ledger(catalog, plan, estimates, config.data.sequence_length)
