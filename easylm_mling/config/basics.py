"""What every section uses: the properties of a setting, and lengths of training."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """The properties of one config key, besides its type and default. A section's `free` and `data` hold for all its keys."""

    help: str = ""
    unit: str = ""
    # May change when a run resumes: it says how the run is carried out, not what it computes.
    free: bool = False
    # May change with --accept-data-change.
    data: bool = False
    # May change with --change.
    change: bool = False
    # Neither the compiled step nor its results depend on it.
    outside_step: bool = False
    # Why it may not change.
    reason: str = ""
    # It names files: a `~` at the beginning is the home directory.
    path: bool = False

    def inside(self, section: "Setting") -> "Setting":
        """Return this Setting as it is within `section`."""
        return dataclasses.replace(self, free=self.free or section.free, data=self.data or section.data)


def setting(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    unit: str = "",
    free: bool = False,
    data: bool = False,
    change: bool = False,
    outside_step: bool = False,
    reason: str = "",
    path: bool = False,
    factory: Callable[[], Any] | None = None,
) -> Any:
    """Return a dataclass field that carries its Setting; `factory` makes a mutable default."""
    metadata = {"setting": Setting(help, unit, free, data, change, outside_step, reason, path)}
    if factory:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def setting_of(field: dataclasses.Field[Any]) -> Setting:
    """Return the Setting of a dataclass's field."""
    return field.metadata.get("setting", Setting())


@dataclass(frozen=True)
class Duration:
    """A length of training: written `2000 steps`, `1.5B tokens` or `500M tokens`."""

    amount: int
    unit: str

    def to_steps(self, tokens_per_step: int) -> int:
        """Return the steps that cover this duration, rounded up."""
        return self.amount if self.unit == "steps" else -(-self.amount // tokens_per_step)

    def __str__(self) -> str:
        return f"{self.amount} {self.unit}"
