"""The attention service when things go wrong: every wait ends, says why, the next step works."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from cpu_kernels.attention import CpuAttention
from cpu_kernels.errors import ServiceError
from tests.cpu_kernels.service_rig import ServiceRig

pytestmark = pytest.mark.ispc


def test_silent_device(attention: CpuAttention) -> None:
    rig = ServiceRig(attention, timeout_s=0.3)
    with rig.service as service:
        for _ in range(3):
            rig.begin()
            started = time.monotonic()
            with pytest.raises(ServiceError, match=r"^overdue: no request for layer 0, lane 0 wit"):
                service.end_step()
            assert time.monotonic() - started >= 0.29
        rig.begin()
        rig.service.ring(0, service.first_ticket(0))
        message = r"^overdue: no request for layer 0, lane 1 within 0.3 s$"
        with pytest.raises(ServiceError, match=message):
            service.wait(1, service.first_ticket(1) + 2)
        with pytest.raises(ServiceError, match=message):
            service.wait(0, service.first_ticket(0) + 2)
        with pytest.raises(ServiceError, match=message):
            service.end_step()


def test_serves_after_a_failed_step(attention: CpuAttention) -> None:
    rig = ServiceRig(attention)
    with rig.service as service:
        for round_ in range(4):
            rig.serve_and_compare()
            rig.begin()
            service.ring(0, service.first_ticket(0) + round_)
            service.abort_step("enough")
            last = service.first_ticket(0) + rig.num_layers - 1
            assert rig.bells[:, 1, 0].tolist() == [last, last]
            with pytest.raises(ServiceError, match=r"^enough$"):
                service.end_step()
            # The device goes on ringing for the step that failed; the next one must not hear it.
            service.ring(0, last)
            service.ring(1, last)


def test_abort_from_another_thread_while_waiting(attention: CpuAttention) -> None:
    rig = ServiceRig(attention)
    with rig.service as service:
        for _ in range(5):
            rig.begin()
            timer = threading.Timer(0.02, service.abort_step, ["changed my mind"])
            timer.start()
            with pytest.raises(ServiceError, match=r"^changed my mind$"):
                service.wait(1, service.first_ticket(1))
            timer.join()
            with pytest.raises(ServiceError, match=r"^changed my mind$"):
                service.end_step()
            service.abort_step("no step is open: this does nothing")
        rig.serve_and_compare()


def test_end_step_with_a_limit(attention: CpuAttention) -> None:
    rig = ServiceRig(attention)
    with rig.service as service:
        rig.begin()
        with pytest.raises(ServiceError, match=r"^overdue: the step was not served within 0.05 s$"):
            service.end_step(0.05)
        rig.serve_and_compare()


def test_out_of_turn(attention: CpuAttention) -> None:
    rig = ServiceRig(attention)
    with rig.service as service:
        with pytest.raises(ServiceError, match=r"^end_step: no step is open"):
            service.end_step()
        rig.begin()
        with pytest.raises(ServiceError, match=r"^begin_step: the previous step is still open"):
            rig.begin()
        service.abort_step("done")
        with pytest.raises(ServiceError, match=r"^begin_step: the previous step is still open"):
            rig.begin()
        with pytest.raises(ServiceError, match=r"^done$"):
            service.end_step()
        with pytest.raises(ServiceError, match=r"^end_step: no step is open"):
            service.end_step()


def test_overdue_behind_another_call(kernel_cache: Path) -> None:
    """Attention that waits too long for its turn is overdue like any other."""
    with CpuAttention(kernel_cache, 1) as attention:
        patient = ServiceRig(attention)
        rig = ServiceRig(attention, timeout_s=0.005)
        memory = torch.empty(400_000_000, dtype=torch.uint8)
        stop = threading.Event()
        reasons: list[str] = []

        def hog() -> None:
            while not stop.is_set():
                attention.touch(memory)

        def attempt() -> None:
            rig.begin()
            rig.service.ring(0, rig.service.first_ticket(0))
            rig.service.end_step()

        with patient.service, rig.service:
            thread = threading.Thread(target=hog)
            thread.start()
            while not any(reason.startswith("overdue: no answer") for reason in reasons):
                with pytest.raises(ServiceError) as caught:
                    attempt()
                reasons.append(str(caught.value))
            stop.set()
            thread.join()
            patient.serve_and_compare()


def num_service_threads() -> int:
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return sum(name.startswith(("neo-service", "neo-watchdog")) for name in names)


def test_close_with_an_open_step(attention: CpuAttention) -> None:
    before = num_service_threads()
    rig = ServiceRig(attention)
    assert num_service_threads() == before + 2
    messages = []

    def wait() -> None:
        try:
            rig.service.wait(1, ticket)
        except ServiceError as error:
            messages.append(str(error))

    rig.begin()
    ticket = rig.service.first_ticket(1)
    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.02)
    rig.service.close()
    thread.join()
    rig.service.close()
    assert messages == ["the service was closed"]
    assert num_service_threads() == before
    with pytest.raises(ValueError, match=r"^AttentionService: it has been closed$"):
        rig.service.end_step()


def test_no_processor_time_between_steps_and_little_while_waiting(attention: CpuAttention) -> None:
    rig = ServiceRig(attention)
    with rig.service as service:
        rig.serve_and_compare()
        time.sleep(0.05)
        used = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - used < 0.05
        rig.begin()
        used = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - used < 0.15
        service.abort_step("enough")


SCRIPT = """
import os, sys
from pathlib import Path
from cpu_kernels.attention import CpuAttention
from cpu_kernels.errors import ServiceError
from tests.cpu_kernels.service_rig import ServiceRig
rig = ServiceRig(CpuAttention(Path(sys.argv[1]), 2))
rig.serve_and_compare()
child = os.fork()
if child == 0:
    for call in (rig.begin, rig.service.end_step, rig.service.close):
        try:
            call()
            os._exit(1)
        except ServiceError as error:
            assert "fork" in str(error)
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
rig.serve_and_compare()
rig.begin()
print("done")
"""


def test_fork_and_exit_without_close(kernel_cache: Path) -> None:
    """The child is refused; the parent serves on and leaves in the middle of a step."""
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(kernel_cache)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
