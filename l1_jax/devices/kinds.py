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
    table = yaml.safe_load(Path(__file__).with_name("devices.yaml").read_text(encoding="utf-8"))
    return {name: DeviceKind(name, **(row | {"jax": tuple(row["jax"])})) for name, row in table.items()}


def kind_of(jax_name: str) -> DeviceKind | None:
    """The kind of a device that jax calls `jax_name`; None where it is not known."""
    return next((kind for kind in device_kinds().values() if jax_name in kind.jax), None)


def find_kind(text: str) -> tuple[DeviceKind, str | None]:
    """The kind that a user calls `text` (`h100`, `RTX 3080 12GB`, `v5e`), and the slice where he names one (`v5e:2x4`).
    UserError where there is none."""
    word, _, shape = text.partition(":")
    known = {_plain(name): kind for kind in device_kinds().values() for name in (kind.name, *kind.jax)}
    kind = known.get(_plain(word))
    if kind is None:
        names = [name.removeprefix("TPU ") for name in device_kinds()]
        hint = nearest(word, names) or nearest(word.upper(), names)
        raise UserError(f"--device-kind {text!r} is not known{hint}", f"Give one of {', '.join(names)}")
    if not shape:
        return kind, None
    topology = f"{kind.name.removeprefix('TPU ')}:{shape}"
    if topology not in kind.slices.values():
        what = f"--device-kind {text!r} is no slice that is known here"
        raise UserError(what, f"Give one of {', '.join(kind.slices.values()) or kind.name}")
    return kind, topology


def _plain(name: str) -> str:
    """Without what people write in different ways."""
    return re.sub(r"nvidia|geforce|tpu|[^a-z0-9]", "", name.lower())


def peak_flops(mesh: Mesh) -> float | None:
    """What all devices of the mesh could do in bfloat16, FLOP/s; None where the kind is not known."""
    kind = kind_of(mesh.devices.flat[0].device_kind)
    return kind.peak_flops * mesh.size if kind else None
