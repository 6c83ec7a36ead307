"""Signals end a process at once, or when the training has saved what it has: in real processes."""

import signal
import subprocess
import sys

import pytest

from cxr_backbone.training import interruption

# Without the package, which takes seconds to import.
CHILD = f"""
import logging, os, runpy, signal, sys, time
Interruption = runpy.run_path({interruption.__file__!r})["Interruption"]
logging.basicConfig(level=logging.INFO, format="%(message)s")
interruption = Interruption()
def work(steps=1000):
    print("at work", flush=True)
    for step in range(steps):
        time.sleep(0.01)
        if interruption.is_asked:
            time.sleep(0.3)
            interruption.exit(f" after step {{step}}")
"""


def run(lines, number):
    """Sends a signal as soon as the child is at work; its exit status and what it wrote to standard error."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", CHILD + lines], **pipes) as process:
        assert process.stdout.readline() == "at work\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_at_once_with_the_status_of_the_shells_and_no_traceback(number):
    status, errors = run("print('at work', flush=True); time.sleep(60)", number)
    assert status == 128 + number
    assert errors == f"Stopped by {number.name}. The same command goes on with the run.\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_training_comes_to_the_end_of_its_step(number):
    status, errors = run("with interruption.deferred(): work()", number)
    assert status == 128 + number
    assert errors.startswith(f"Stopped by {number.name} after step ")


def test_sigterm_may_come_twice():
    twice = (
        "signal.setitimer(signal.ITIMER_REAL, 0.1); signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), 15))"
    )
    status, errors = run(f"{twice}\nwith interruption.deferred(): work()", signal.SIGTERM)
    assert status == 143 and "after step" in errors


def test_a_second_ctrl_c_does_not_wait():
    twice = (
        "signal.setitimer(signal.ITIMER_REAL, 0.1); signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), 2))"
    )
    status, errors = run(f"{twice}\nwith interruption.deferred(): work()", signal.SIGINT)
    assert status == 130 and "after step" not in errors


def test_during_an_evaluation_there_is_nothing_to_wait_for():
    status, errors = run("with interruption.deferred(), interruption.deferred(False): work()", signal.SIGTERM)
    assert status == 143 and "after step" not in errors


def test_workers_end_as_if_nobody_had_taken_the_signal():
    lines = """
import multiprocessing
context = multiprocessing.get_context("fork")
started = context.Event()
def sleep():
    started.set()
    time.sleep(60)
worker = context.Process(target=sleep)
worker.start()
started.wait()
worker.terminate()
worker.join()
assert worker.exitcode == -signal.SIGTERM, worker.exitcode
work()
"""
    status, errors = run(lines, signal.SIGTERM)
    assert status == 143 and errors.count("Stopped") == 1
