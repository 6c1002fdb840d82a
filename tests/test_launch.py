"""What docs/launch.md shows can be parsed, and its Slurm script goes on after 75 and nothing else."""

import os
import pathlib
import re
import subprocess

import pytest
import yaml

TEXT = pathlib.Path("docs/launch.md").read_text(encoding="utf-8")


def _blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("script", _blocks("bash"), ids=lambda text: text.split()[0])
def test_bash_reads_every_script(script):
    read = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert (read.returncode, read.stderr) == (0, "")


def test_the_manifest_starts_as_many_processes_as_it_says_and_restarts_all_but_bad_input():
    jobset, _ = (yaml.safe_load(text) for text in _blocks("yaml"))
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (group,) = jobset["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    (line,) = container["args"]
    assert job["completionMode"] == "Indexed"
    assert f"--num_processes={job['parallelism']} " in line
    assert job["parallelism"] == job["completions"]
    name = jobset["metadata"]["name"]
    assert f"--coordinator={name}-{group['name']}-0-0.{name}:" in line
    assert line.startswith("exec python -m usfmae_jax.main ")
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])
    assert rule["onExitCodes"]["containerName"] == container["name"]
    (policy,) = jobset["spec"]["failurePolicy"]["rules"]
    assert policy["action"] == "FailJobSet"
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")


@pytest.mark.parametrize(("status", "requeued"), [(0, ""), (2, ""), (75, "requeue 7\n"), (134, "")])
def test_the_slurm_script_requeues_a_run_that_has_saved(tmp_path, status, requeued):
    (script,) = (text for text in _blocks("bash") if "#SBATCH" in text)
    for name, body in {
        "bin/srun": f'echo "$@" > asked\nexit {status}',
        "bin/scontrol": 'echo "$@" > requeued',
        ".venv/bin/activate": "",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    assert subprocess.run(["bash"], input=script, text=True, env=env, cwd=tmp_path).returncode == status
    assert "python -m usfmae_jax.main" in (tmp_path / "asked").read_text()
    found = tmp_path / "requeued"
    assert (found.read_text() if found.exists() else "") == requeued
