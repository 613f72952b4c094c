"""The data side of a run: catalog, plan and ledger, and the check that a checkpoint's data state fits them."""

from pathlib import Path

import orjson

from easylm_mling.config import RunConfig, from_tree, to_tree
from easylm_mling.data.catalog import Catalog, build_catalog, reopen_catalog
from easylm_mling.data.estimates import load_estimates, open_estimates, pinned_fingerprints, tokens_per_byte
from easylm_mling.data.ledger import Ledger
from easylm_mling.data.migration import carry_over
from easylm_mling.data.mixture import DataState
from easylm_mling.data.state_archive import KeptState, forget_after, keep_state
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.data.weights import MixingPlan, make_plan
from easylm_mling.errors import ConfigError
from easylm_mling.run.directory import RunDirectory
from easylm_mling.storage.atomic import write_atomically


class RunData:
    """What a run reads, by which plan, and the books of it."""

    def __init__(self, run: RunDirectory, config: RunConfig, tokenizer: Tokenizer, accept_change: bool = False):
        """Lists the sources. Raises ConfigError when the run began with other files, unless that is accepted."""
        self.run, self.config, self.tokenizer, self.accept_change = run, config, tokenizer, accept_change
        if run.catalog_file.exists() and not accept_change:
            self.catalog = reopen_catalog(Catalog.load(run.catalog_file), config.data)
        else:
            self.catalog = build_catalog(config.data)
        self.fingerprints = {"tokenizer": tokenizer.fingerprint, "data": self.catalog.fingerprint}
        kept = run.estimates_file
        # Whether the run's directory is of other data than it was; what it holds is then set aside first.
        self.changed = accept_change and (
            run.data_settings_changed or (kept.exists() and pinned_fingerprints(kept) != self.fingerprints)
        )
        self.plan: MixingPlan
        self.ledger: Ledger

    def write_start(self):
        """Keep the catalog and the estimates with the run, whose directory exists, and make the plan from them."""
        if self.run.writes:
            self.catalog.save(self.run.catalog_file)
        estimates = open_estimates(self.run.estimates_file, self.catalog, self.tokenizer)
        self.plan = make_plan(self.config, self.catalog, tokens_per_byte(estimates))
        self.ledger = Ledger(self.catalog, self.plan, estimates, self.config.data.sequence_length)

    def resume(self, step: int, state: DataState, info: dict) -> tuple[DataState, list[str]]:
        """The state to go on with from the checkpoint of `step`, and a line about each source that has changed.

        Raises ConfigError for another tokenizer, other files or other stages in the past, unless the first two are
        accepted.
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


def load_ledger(config: RunConfig, run_dir: str | Path) -> Ledger:
    """The ledger of a run, from what lies in its directory; raises ConfigError if it never began."""
    estimates_file = Path(run_dir) / "estimates.json"
    if not estimates_file.is_file():
        raise ConfigError(f"{run_dir}: holds no estimates.json; run `train` again, which writes it")
    catalog, estimates = Catalog.load(Path(run_dir) / "catalog.json"), load_estimates(estimates_file)
    plan = make_plan(config, catalog, tokens_per_byte(estimates))
    return Ledger(catalog, plan, estimates, config.data.sequence_length)
