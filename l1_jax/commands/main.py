"""`l1 NAME ...`: the same commands as `python scripts/NAME.py ...`, installed with the package.

Example: `l1 train --config tiny training.max_steps=100`
"""

import sys

from l1_jax import __version__
from l1_jax.commands import interrupts

# The guide's commands, and what each does; a module beside this one has the rest.
COMMANDS = {
    "prepare_data": "text files to a prepared directory",
    "train": "a model, from a config",
    "evaluate": "a model on text",
    "generate": "text from a prompt",
    "plan": "what a run needs and costs on devices that are not here",
    "verify": "look for damage",
    "make_demo_corpus": "a text to try it on: the documentation that is installed with Python",
}


def main() -> None:
    """Runs the command that the first argument names, and exits with its code."""
    arguments = sys.argv[1:]
    name = arguments[0] if arguments else "--help"

    if not name.startswith("-"):
        name = name.replace("-", "_")

    if name in ("--help", "-h"):
        print(_help())
        sys.exit(0)

    if name == "--version":
        print(f"l1_jax {__version__}")
        sys.exit(0)

    # A signal is heard before the imports below, which take a while.
    if name == "train":
        interrupts.hear_before_a_run()
    else:
        interrupts.hear()

    from l1_jax.commands.runner import run, run_command

    sys.argv = [f"l1 {name}", *arguments[1:]]

    if name not in COMMANDS:
        run_command(lambda _: _refuse(name))

    run(name)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: l1 COMMAND ...; l1 COMMAND --help shows its flags", "", *lines])


def _refuse(name: str) -> None:
    from l1_jax.errors import UserError, nearest

    what = f"l1 has no command {name}{nearest(name, list(COMMANDS))}"
    raise UserError(what, f"The commands are {', '.join(COMMANDS)}")
