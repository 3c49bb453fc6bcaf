"""What is known of each kind of device: `devices.yaml`."""

import dataclasses
import functools
import re
from pathlib import Path

import yaml
from jax.sharding import Mesh

from l1_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class DeviceKind:
    """A row of devices.yaml, which says what each field is."""

    name: str
    jax: tuple[str, ...]
    peak_flops: float
    memory_gib: float
    bandwidth: float
    link: float
    slices: dict[int, str] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def is_tpu(self) -> bool:
        return bool(self.slices)


@functools.cache
def device_kinds() -> dict[str, DeviceKind]:
    """All kinds, by name."""
    text = Path(__file__).with_name("devices.yaml").read_text(encoding="utf-8")

    kinds = {}
    for name, row in yaml.safe_load(text).items():
        row["jax"] = tuple(row["jax"])
        kinds[name] = DeviceKind(name, **row)
    return kinds


def kind_of(jax_name: str) -> DeviceKind | None:
    """The kind of a device that jax calls `jax_name`; None where it is not known."""
    for kind in device_kinds().values():
        if jax_name in kind.jax:
            return kind
    return None


def find_kind(text: str) -> tuple[DeviceKind, str | None]:
    """The kind that a user names, and the slice if there is one in the name.

    Args:
        text: such as `h100`, `RTX 3080 12GB` or `v5e`; with a slice, `v5e:2x4`.

    Raises:
        UserError: there is no such kind, or it has no such slice.
    """
    word, _, shape = text.partition(":")
    known = {}
    for kind in device_kinds().values():
        for name in (kind.name, *kind.jax):
            known[_plain(name)] = kind

    found = known.get(_plain(word))
    if found is None:
        names = [_short_name(kind) for kind in device_kinds().values()]
        hint = nearest(word, names) or nearest(word.upper(), names)
        what = f"`device_kind` {text!r} is not known{hint}"
        raise UserError(what, f"Give one of {', '.join(names)}")
    if not shape:
        return found, None

    topology = f"{_short_name(found)}:{shape}"
    if topology not in found.slices.values():
        what = f"`device_kind` {text!r} is no slice that is known here"
        choices = ", ".join(found.slices.values()) or found.name
        raise UserError(what, f"Give one of {choices}")
    return found, topology


def _short_name(kind: DeviceKind) -> str:
    return kind.name.removeprefix("TPU ")


def _plain(name: str) -> str:
    """Without what people write in different ways."""
    return re.sub(r"nvidia|geforce|tpu|[^a-z0-9]", "", name.lower())


def peak_flops(mesh: Mesh) -> float | None:
    """What all devices of the mesh could do in bfloat16, FLOP/s; None where the kind is not
    known."""
    kind = kind_of(mesh.devices.flat[0].device_kind)
    return kind.peak_flops * mesh.size if kind else None
