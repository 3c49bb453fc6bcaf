"""Generated configs: whatever a file or an override holds, what comes is a config or a line that says what is wrong."""

import contextlib
import io
import random
import re
import runpy
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from faults import ROOT, Row
from l1_jax.config.key import keys_of
from l1_jax.config.resolve import Facts, rows_of_stream
from l1_jax.config.schema import Config
from l1_jax.config.yaml_file import dump_config, load_config
from l1_jax.errors import UserError

SEED, FULL, QUICK, MOST_SECONDS = 4, 2000, 300, 5.0
SHIPPED = [path.read_text() for path in sorted((ROOT / "configs").glob("*.yaml"))]
SCHEMA: dict[str, dict[str, Any]] = {}
for _name, _field in keys_of(Config):
    _section, _, _key = _name.partition(".")
    SCHEMA.setdefault(_section, {})[_key] = _field

KEYS = [f"{section}.{key}" for section, keys in SCHEMA.items() for key in keys]
VALUES = [
    "1", "0", "-1", "2", "8", "64", "1e-4", "0.1", "true", "false", "null", "~", "auto", "cpu", "float16", "bfloat16",
    "dots",
    "x", "''", '""', "[]", "{}", "[1, 2]", "{a: 1}", "[[[[]]]]", ".nan", ".inf", "-.inf", "1e309", "1e-330", "5e-324",
    "2147483647", "2147483648", "4294967296", str(2**63 - 1), str(2**63), str(-(2**63)), "9" * 400, "9" * 5000,
    "0x" + "f" * 3000,
    "0b101", "010", "0o17", "1_000", "1:30", "1:30.5", ":".join(["59"] * 400), "1.", ".5", "+1", "- 1", "1,000", "١٢",
    "2024-01-31", "2024-01-31T01:02:03Z", "=", "<<", "*a", "&a 1", "&a [*a]", "!!int 5", "!!int x", "!!float ''",
    "!!bool maybe",
    "!!binary aGk=", "!!set {a}", "!!omap [a: 1]", "!!python/object/apply:os.system [ls]", "!!python/name:os.system",
    "!foo bar",
    "!!int [1]", "!!str 5", "!!null 7", "!!timestamp 5", "! 5", "|\n    text\n    more", ">-\n    folded", "'it''s'",
    '"\\0"',
    '"\\ud800"', '"a\\tb\\nc"', '"\\x07"', '"\\', "'", "[", "{", "]", "}", "? ", ": ", "- ", "%", "@x", "`x", "#",
    "a #b", "a: b",
    "日本語", "e\u0301", "\u202eright", "\u2028", "\u0085", "\ufeff", "\x7f", "\x00", "\x1b[31m", "👩\u200d👩",
    "x" * 3000, "memory://", "memory://x/../..", "bucket://x", "://", "zip://a::file://b", "file:///\x00",
    "/dev/null", "..", "~/x",
    "/" + "y" * 300, "/proc/self/mem", "a/../../b",
]  # fmt: skip
NASTY = ["\t", "\r", "\r\n", "\x00", "\ufeff", "\u2028", "\u0085", "---\n", "...\n", "%YAML 1.1\n",
"%TAG ! tag:x,2000:\n", "&a ", "*a",
         "!!map ", "<<: ", "{", "}", "[", "]", '"', "'", ": ", "? ", "- ", "#", ",", "|", ">", "!", "\\", "\ud7ff",
         "\x85", " " * 40]  # fmt: skip


def _lines(rng: random.Random, count: int) -> str:
    """A config of some keys: their values mostly legal, or anything."""
    chosen: dict[str, list[str]] = {}
    for _ in range(count):
        section, key = rng.choice(KEYS).split(".")
        if rng.random() < 0.05:
            section = rng.choice([*SCHEMA, "trainig", "optimizer", "x" * 500, "日本", ""])
        if rng.random() < 0.05:
            key = rng.choice(
                [
                    key.upper(),
                    key[:-1],
                    key + "s",
                    "lr",
                    "y" * 2000,
                    "[a]",
                    "{}",
                    "? a",
                    "!!str a",
                    "1",
                    "null",
                    "<<",
                ]
            )
        chosen.setdefault(section, []).append(f"  {key}: {_value(rng, f'{section}.{key}')}")
    return "".join(f"{section}:\n" + "\n".join(keys) + "\n" for section, keys in chosen.items())


def _value(rng: random.Random, name: str) -> str:
    section, _, key = name.partition(".")
    field = SCHEMA.get(section, {}).get(key)
    if field is None or rng.random() < 0.3:
        return rng.choice(VALUES)
    legal = {
        "vocab_size": "300",
        "n_embd": "64",
        "n_heads": rng.choice("1247"),
        "max_seq_length": "16",
        "path": "absent",
        "output_dir": "out",
    }
    default = {None: "null", True: "true", False: "false"}.get(field.default, field.default)
    return rng.choice(
        [
            legal.get(key, str(default)),
            str(default),
            str(rng.randrange(1, 100)),
            f"{10 ** rng.uniform(-6, 20):g}",
        ]
    )


def _mutated(rng: random.Random, text: str) -> str:
    """A text after some cuts, repetitions and insertions."""
    for _ in range(rng.randrange(1, 6)):
        at, to = sorted(rng.choices(range(len(text) + 1), k=2))
        to = min(to, at + rng.choice([1, 5, 40]))
        text = (
            text[:at]
            + rng.choice(["", text[at:to] * 2, rng.choice(NASTY), rng.choice(VALUES)])
            + text[to:]
        )
    return text


def _strange(rng: random.Random) -> str:
    """What only YAML can think of, and what costs time where nothing bounds it."""
    size = rng.choice([3, 50, 900, 20_000])
    return rng.choice([
        lambda: "[" * size, lambda: "{a: " * size, lambda: "- " * size,
        lambda: "training:\n" + "".join("  " * i + "a:\n" for i in range(1, 300)),
        lambda: "? " * size, lambda: "training: {" + "seed: 1, " * size + "}",
        lambda: "".join(f"k{i}: 1\n" for i in range(size)),
        lambda: "model:\n" + "".join(f"  batchsize{i}: 1\n" for i in range(size)), lambda: "#" + "c" * size,
        lambda: "\n" * size, lambda: " " * size,
        lambda: "a: &a [x]\n" + "".join(f"b{i}: [*a, *a]\n" for i in range(20)),
        lambda: "training: &t\n  seed: 1\nmodel:\n  <<: *t\n",
        lambda: "---\n" * size, lambda: "training:\n  seed: 1\n---\nmodel:\n  n_layers: 2\n",
        lambda: "\ufeff\ufefftraining:\n",
        lambda: "training:\n  seed: " + "1" * size, lambda: "training:\n  wandb_project: " + "w " * size,
        lambda: "x" * 200_000,
        lambda: '"' + "\\u0041" * size + '"', lambda: "training:\r\n  seed: 1\r\n", lambda: "training:\r  seed: 1\r",
        lambda: "\ttraining:\n",
        lambda: "%YAML 9.9\n---\na: 1\n", lambda: "!!python/object/new:os.system [ls]\n",
        lambda: "training:\n  seed: " + ":".join(["1"] * size),
        lambda: "training:\n  learning_rate: " + ":".join(["1"] * size) + ".5", lambda: "a" * size + ": 1\n",
    ])()  # fmt: skip


def generate(rng: random.Random) -> tuple[bytes, list[str]]:
    """The bytes of a file, and overrides."""
    kind = rng.random()
    if kind < 0.35:
        text = _lines(rng, rng.choice([0, 1, 2, 5, 20]))
    elif kind < 0.7:
        text = _mutated(rng, rng.choice([*SHIPPED, _lines(rng, 8)]))
    elif kind < 0.85:
        text = _strange(rng)
    else:
        text = _mutated(rng, _strange(rng)[:5000])
    data = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        data = rng.choice([
            lambda: data.decode("utf-8", "replace").encode("utf-16"), lambda: b"\xef\xbb\xbf" + data,
            lambda: data.replace(b"\n", b"\r\n"),
            lambda: data + bytes(rng.choices(range(256), k=20)), lambda: bytes(rng.choices(range(256), k=300)),
            lambda: b"",
        ])()  # fmt: skip
    overrides = []
    while rng.random() < 0.4:
        name = rng.choice(
            [
                *KEYS,
                "training.lerning_rate",
                "x.y",
                "a.b.c",
                "training",
                ".",
                "training.",
                ".seed",
                "日.本",
            ]
        )
        value = _value(rng, name).replace("\0", "")
        overrides.append(
            rng.choice(
                [
                    f"{name}={value}",
                    f"{name}={value}",
                    name,
                    f"{name}==",
                    f"{name}={_mutated(rng, value)}",
                ]
            ).replace("\0", "")
        )
    return data, overrides


def _load(path: Path, overrides: list[str]) -> Config | UserError:
    """Reads a config; AssertionError where an accepted one does not survive its dump, or an error is not one line."""
    try:
        config = load_config(path, overrides)
    except UserError as error:
        for line in (str(error), *error.details):
            assert re.match(rf"{re.escape(str(path))}|override ", line), line[:300]
            assert len(line.splitlines()) == 1, line[:300]
            assert len(line) < 600, line[:300]
        return error
    copy = path.with_name("copy.yaml")
    copy.write_text(dump_config(config), "utf-8")
    assert load_config(copy) == config
    return config


def _resolve(config: Config) -> None:
    """What follows before anything is built: the batch, the steps and the planner's `auto`, on eight devices."""
    from l1_jax.parallel.layout import check_divisible
    from l1_jax.parallel.mesh import abstract_mesh
    from l1_jax.planner.batch_size import resolve_auto

    if config.training.precision == "auto":  # which asks the devices
        config = config.replace("training", precision="float32")
    with contextlib.suppress(UserError), contextlib.redirect_stderr(io.StringIO()):
        mesh = abstract_mesh(config.parallelism, 8)
        check_divisible(
            resolve_auto(
                config, Facts(300, rows_of_stream(100_000), dict(mesh.shape), "cpu"), mesh, 2**33
            ).model,
            mesh,
        )


def _train(path: Path, overrides: list[str]) -> None:
    """scripts/train.py, as far as it goes without data: exit code 2 and one line, with nothing written."""
    flags = [
        override for override in overrides if re.fullmatch(r"\w+(\.\w+)+=.*", override, re.DOTALL)
    ]
    argv, sys.argv = sys.argv, ["scripts/train.py", "--config", str(path), *flags]
    err, before = io.StringIO(), sorted(path.parent.iterdir())
    with contextlib.redirect_stderr(err):
        try:
            runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code
        finally:
            sys.argv = argv
    last = err.getvalue().strip().rpartition("\n")[2]
    assert code == 2, (code, err.getvalue()[-2000:])
    assert last.startswith("error: "), last[:300]
    assert "Traceback" not in err.getvalue()
    assert sorted(path.parent.iterdir()) == before


def campaign(full: bool) -> list[Row]:
    import l1_jax.run.train  # noqa: F401, so that the first config does not pay for it

    rng, counts, slowest, bad = random.Random(SEED), Counter[str](), 0.0, list[str]()
    total = FULL if full else QUICK
    with tempfile.TemporaryDirectory() as home, contextlib.chdir(home):
        path = Path(home, "c.yaml")
        for number in range(total):
            data, overrides = generate(rng)
            path.write_bytes(data)
            if number % 5 == 0:  # W&B would ask the network
                overrides += ["training.wandb_project=", "training.device=cpu"]
            start = time.perf_counter()
            try:
                found = _load(path, overrides)
                counts["refused" if isinstance(found, UserError) else "accepted"] += 1
                if isinstance(found, Config):
                    _resolve(found)
                if number % 5 == 0:
                    _train(path, overrides)
                    counts["to scripts/train.py"] += 1
            except Exception as error:  # a campaign counts, and goes on
                bad.append(
                    f"{number}: {type(error).__name__}: {error}; {data[:200]!r} {str(overrides)[:300]}"
                )
            slowest = max(slowest, time.perf_counter() - start)
    for line in bad[:10]:
        print(line, file=sys.stderr)
    figure = ", ".join(f"{count} {name}" for name, count in counts.items())

    bar = f"{total}: no traceback, each mistake is one line, accepted ones read back equal, under {MOST_SECONDS:g} s each"
    is_met = (
        not bad
        and slowest < MOST_SECONDS
        and min(counts["refused"], counts["accepted"]) > total // 20
    )
    return [
        (
            "generated configs",
            bar,
            f"{figure}; {len(bad)} failed; the slowest {slowest:.2f} s",
            is_met,
        )
    ]
