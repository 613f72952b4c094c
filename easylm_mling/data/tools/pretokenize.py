"""`easylm-mling data tokenize`: fill the token cache ahead of training, on Ray, by the code that the trainer tokenises with.

Nothing waits for it: training starts at once and tokenises what the cache lacks. It may be interrupted, repeated, or run
on another machine: finished blocks are kept, and two workers write the same bytes for a block.
"""

import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from easylm_mling.config import MixerConfig, from_tree, to_tree
from easylm_mling.data.catalog import Catalog
from easylm_mling.data.estimates import catalog_rates, estimate
from easylm_mling.data.pool import is_pooled
from easylm_mling.data.shuffle import open_orders
from easylm_mling.data.token_cache import TokenCache
from easylm_mling.data.tokenization.tokenizer import Tokenizer
from easylm_mling.data.weights import MixingPlan, make_plan, needs_estimates
from easylm_mling.errors import ConfigError


def tokenize(config: MixerConfig, catalog: Catalog, epochs: int, address: str | None, console: Console) -> int:
    """Fill `data.token_cache` with the first `epochs` epochs of every source; returns the tokens written.

    `address`: a Ray cluster's, whose workers must see sources and cache under the same paths; None starts Ray on this
    machine. Raises ConfigError without Ray or data.token_cache, and what reading raises.
    """
    if not config.data.token_cache:
        raise ConfigError("data.token_cache is not set; name a folder for the tokens: data.token_cache=FOLDER")
    try:
        import ray
        from ray.exceptions import RayTaskError
    except ImportError:
        raise ConfigError("Ray is not installed; run: pip install 'easylm-mling[ray]'") from None
    tokenizer = Tokenizer(config.data.tokenizer)
    rates = catalog_rates(estimate(catalog, tokenizer)) if needs_estimates(config) else None
    plan = make_plan(config, catalog, rates)
    work = list(blocks(config, catalog, plan, epochs))
    ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, include_dashboard=False)
    try:
        shared = ray.put((to_tree(config), catalog, plan))
        fill = ray.remote(num_cpus=1, max_retries=3)(fill_block)
        return _run(ray, lambda item: fill.remote(shared, *item), work, console)
    except RayTaskError as error:
        raise error.cause from None
    finally:
        ray.shutdown()


def blocks(config: MixerConfig, catalog: Catalog, plan: MixingPlan, epochs: int) -> Iterator[tuple[int, int, int]]:
    """Yield (index of the source, epoch, block) of the first epochs: first blocks first, in the order lanes need them."""
    orders = open_orders(config, catalog, plan)
    for epoch in range(epochs):
        # A pooled source has no blocks: every host tokenises it when a run begins.
        counts = [0 if is_pooled(order.source) else order.blocks(epoch) for order in orders]
        for block in range(max(counts, default=0)):
            yield from ((source, epoch, block) for source, count in enumerate(counts) if block < count)


def fill_block(shared: tuple[dict, Catalog, MixingPlan], source: int, epoch: int, block: int) -> int:
    """Tokenise one block in a worker; returns the tokens written, 0 if the cache has the block."""
    tree, catalog, plan = shared
    config = from_tree(MixerConfig, tree)
    cache = TokenCache(config.data.token_cache or "", Tokenizer(config.data.tokenizer))
    return cache.fill(open_orders(config, catalog, plan)[source], epoch, block)


def _run(ray, start, work: list, console: Console) -> int:
    """Run `start` over `work`, two tasks a processor at a time, with a progress bar; returns the tokens written."""
    texts = ("{task.completed}/{task.total} blocks", "{task.fields[rate]}")
    columns = (TextColumn(texts[0]), BarColumn(), TextColumn(texts[1]), TimeRemainingColumn())
    total, began, running, waiting = 0, time.monotonic(), [], iter(work)
    limit = 2 * int(ray.cluster_resources().get("CPU", 1))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("tokenize", total=len(work), rate="")
        while True:
            while len(running) < limit and (item := next(waiting, None)) is not None:
                running.append(start(item))
            if not running:
                return total
            done, running = ray.wait(running)
            total += sum(ray.get(done))
            rate = total / (time.monotonic() - began)
            bar.update(task, advance=len(done), rate=f"{total:,} tokens, {rate:,.0f} tokens/s")
