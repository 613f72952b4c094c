"""Rematerialisation: the values that layers save for the backward pass, and those that it computes again."""

from collections.abc import Callable
from typing import NamedTuple

import jax

# The values that a layer saves for its backward pass, from least memory to least recomputation. None: every value.
REMAT_POLICIES: dict[str, tuple[str, ...] | None] = {
    "full": (),
    "save_attention": ("attention",),
    "save_out": ("attention", "o"),
    "save_qkv": ("attention", "o", "q", "k", "v"),
    "save_dots": ("attention", "o", "q", "k", "v", "gate", "up"),
    "none": None,
}


class Remat(NamedTuple):
    """The remat policy of the layers, and another one for the first few, which spends memory that is left on speed.

    Values named in `offload` wait in the host's memory instead of the device's, whatever the policy.
    """

    policy: str = "full"
    first_policy: str = "none"
    first_layers: int = 0
    offload: tuple[str, ...] = ()

    def portions(self, layers: int) -> list[tuple[str, int, int]]:
        """List (policy, first layer, layer after the last) of each portion that holds a layer."""
        first = min(self.first_layers, layers)
        both = [(self.first_policy, 0, first), (self.policy, first, layers)]
        return [portion for portion in both if portion[1] < portion[2]]

    def wrap(self, body: Callable, policy: str, beside_backward: bool = False) -> Callable:
        """Wrap a layer's function so that it saves the values of `policy`, and offloads those of `offload`.

        Where no loop stands between the forward pass and the backward pass (`beside_backward`), the compiler would take the
        recomputation for what is there already.
        """
        names = REMAT_POLICIES[policy]
        if names is None:
            return body
        saved = jax.checkpoint_policies.save_only_these_names(*names)
        if self.offload:
            saved = jax.checkpoint_policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[name for name in names if name not in self.offload],
                names_which_can_be_offloaded=list(self.offload),
                offload_src="device",
                offload_dst="pinned_host",
            )
        return jax.checkpoint(body, policy=saved, prevent_cse=beside_backward)
