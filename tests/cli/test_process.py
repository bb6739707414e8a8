"""What only a real process shows: signals, pipes, imports."""

import os
import pty
import signal
import subprocess
import sys

import pytest

NEO = [sys.executable, "-m", "neo_cli.main"]
ENDLESS = [
    *["--max-tokens", 15_000, "--device-kv-blocks", 1024],
    *["--ignore-eos", "--logit-bias", "28=100"],
]


def start(*arguments: object, **options) -> subprocess.Popen:
    command = [*NEO, *map(str, arguments)]
    # A shell that runs the tests in the background has them, and what they start, ignore Ctrl-C.
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    hear = (lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) if ignored else None
    return subprocess.Popen(
        command,
        preexec_fn=hear,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from neo_cli.main import main; sys.argv = ['neo', 'generate', '--help']\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'triton'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.ispc
def test_interrupting_keeps_what_is_there(tiny_options) -> None:
    with start("generate", *tiny_options, *ENDLESS, "Hello") as process:
        first = process.stdout.read(4)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert len(first) == 4
    assert rest.endswith(b"\n")
    assert err == b"neo: interrupted\n"
    assert process.returncode == 130


@pytest.mark.ispc
def test_a_reader_that_goes_away_is_no_error(tiny_options) -> None:
    with start("generate", *tiny_options, *ENDLESS, "Hello") as process:
        process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
        process.wait(timeout=60)
    assert err == b""
    assert process.returncode == 1


@pytest.mark.ispc
def test_results_go_to_stdout_even_with_a_progress_bar(tiny_options) -> None:
    """With a terminal on stderr alone, rich would send what is printed there, too."""
    ours, terminal = pty.openpty()
    with start("generate", *tiny_options, "--json", "one", "two", stderr=terminal) as process:
        os.close(terminal)
        out = process.stdout.read()
        try:
            while os.read(ours, 4096):
                pass
        except OSError:
            pass  # how a pseudo-terminal says that the other side is closed
        process.wait(timeout=60)
    os.close(ours)
    assert process.returncode == 0
    assert len(out.splitlines()) == 2
