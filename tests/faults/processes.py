"""Doors run by several processes of one job on this machine."""

import os
import pathlib
import socket
import subprocess
import time

from tests.pretraining.runs import environment

#: On a busy machine one process may compile for much longer than another.
PATIENT = " --xla_cpu_collective_timeout_seconds=600"


class Job:
    """The processes of a job; what each prints goes to files in a folder.

    Args:
      words: the door's command.
      count: how many processes; 1 = an ordinary run.
      logs: the folder, which is created.
      devices: of each process.
      env: more variables, by process, that say who it is; without them the command does.
    """

    def __init__(self, words, count, logs, devices=1, env=None):
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = logs
        job = [] if count == 1 or env else [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}"]
        self.processes = []
        for number in range(count):
            command = [*words, *job, *([f"--process_id={number}"] if job else [])]
            out, error = ((logs / f"{number}.{name}").open("w") for name in ("out", "err"))
            variables = environment(devices) | (env(number) if env else {})
            variables["XLA_FLAGS"] += PATIENT
            with out, error:
                self.processes.append(subprocess.Popen(command, env=variables, stdout=out, stderr=error))

    def wait(self, timeout=600):
        """Waits for all; returns their exit codes."""
        end = time.monotonic() + timeout
        try:
            return [process.wait(max(end - time.monotonic(), 0.1)) for process in self.processes]
        except subprocess.TimeoutExpired:
            for process in self.processes:
                process.kill()
            raise AssertionError("\n".join(map(self.said, range(len(self.processes))))) from None

    def reach(self, there):
        """Waits until `there()`, or until a process has ended."""
        while all(process.poll() is None for process in self.processes) and not there():
            time.sleep(0.05)

    def said(self, number):
        """What a process has said on stderr."""
        return (self.logs / f"{number}.err").read_text()

    def printed(self, number):
        """What a process has printed on stdout."""
        return (self.logs / f"{number}.out").read_text()


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def finish(words, count, logs: pathlib.Path, devices=1):
    """Runs a job to its end; returns it. Raises AssertionError unless every process ends with 0."""
    job = Job(words, count, logs, devices)
    assert job.wait() == [os.EX_OK] * count, "\n".join(map(job.said, range(count)))
    return job
