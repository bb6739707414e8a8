"""The `neo` command: puts the subcommands together and turns errors into one line each."""

import io
import os
import sys
from importlib import metadata
from typing import Annotated, NoReturn

import typer

from engine.errors import NeoError
from neo_cli.bench import bench
from neo_cli.build_kernels import build_kernels
from neo_cli.generate import generate
from neo_cli.info import info
from neo_cli.options import INTERRUPTED
from neo_cli.plot import plot
from neo_cli.profile import profile
from neo_cli.serve import serve

# Typer's own base of "the command line is wrong"; where it lives differs between its versions.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"neo {metadata.version('neo-llm')}")
        raise typer.Exit


app = typer.Typer(
    name="neo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print NEO's version."
        ),
    ] = False,
) -> None:
    """Serve large language models when GPU memory is the bottleneck."""


app.command("bench")(bench)
app.command("build-kernels")(build_kernels)
app.command("generate")(generate)
app.command("info")(info)
app.command("plot")(plot)
app.command("profile")(profile)
app.command("serve")(serve)


def main() -> None:
    """Run the command line: exit 1 with one line for a `NeoError`, 2 for wrong usage.

    Ctrl-C exits 130, after the command has shown what it had.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal need not know every character
    try:
        code = app(prog_name="neo", standalone_mode=False)
        sys.stdout.flush()
    except NeoError as error:
        _fail(str(error), 1)
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone; what it wanted, it has. Typer exits 1 for that, too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        if not isinstance(error, _UsageError):
            raise
        _fail_usage(error)
    if code == INTERRUPTED:
        print("neo: interrupted", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def _fail_usage(error: Exception) -> NoReturn:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "neo"
    message = getattr(error, "format_message", error.__str__)()
    if message:
        _fail(f"{message.rstrip('.')} (see `{command} --help`)", 2)
    sys.exit(2)  # the help was printed already


def _fail(message: str, code: int) -> NoReturn:
    line = " ".join(message.split())
    print(f"neo: error: {line}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
