"""The launcher for SLURM: what it submits, what the job does on the nodes, and how it goes on through every end."""

import pathlib
import signal
import subprocess
import time

import launch_fakes
import pytest
from launch_fakes import Machine, commands

IMAGE = "registry/unclip:4f2a"
OPTIONS = ("--name=clip", "--nodes=4", "--gpus=8", "--time=24:00:00", "--partition=gpu", f"--container={IMAGE}")
TRAIN = ("train", "--config=configs/clip.py:paper", "--workdir=/shared/runs/clip")
ODD = "--config.data.mixture=(('a \"b\"','','train',1.0),)"


def test_a_dry_run_prints_the_job_that_a_run_submits(machine):
    dry = machine.run("launch/slurm.sh", *OPTIONS, "--dry-run", *TRAIN, ODD)
    assert dry.returncode == 0 and machine.calls == [], dry.stderr
    machine.answer(("^sbatch", [(0, "77;cluster")]))
    real = machine.run("launch/slurm.sh", *OPTIONS, f"--logs={machine.folder}/logs", *TRAIN, ODD)
    assert real.returncode == 0 and "clip is job 77" in real.stderr
    (job,) = [call for call in machine.calls if call[0] == "sbatch"]
    (printed,) = [line for line in commands(dry.stdout) if line[0] == "sbatch"]
    assert [word for word in job if "--output" not in word] == [word for word in printed if "--output" not in word]
    assert {"--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=8", "--cpus-per-task=64"} <= set(job)
    assert {"--requeue", "--signal=B:TERM@120", "--time=24:00:00", "--partition=gpu"} <= set(job)
    script = job.index("launch/slurm.sbatch")
    assert job[script + 1 :] == ["100", "", "8", ".venv/bin/python", IMAGE, "", *TRAIN, ODD]


STATES = [(0, f"JobId=77 JobName=clip JobState={state} Reason=None") for state in ("PENDING", "RUNNING")]


@pytest.mark.parametrize(("end", "status"), [("COMPLETED", 0), ("FAILED", 1), ("TIMEOUT", 1), ("CANCELLED", 1)])
def test_waiting_ends_as_the_job_does(machine, end, status):
    requeued = (0, "JobId=77 JobName=clip JobState=PENDING Reason=BeginTime Requeue=1 Restarts=1")
    answers = [*STATES, requeued, STATES[1], (0, f"JobId=77 JobName=clip JobState={end} Reason=None")]
    machine.answer(("^sbatch", [(0, "77")]), ("show job 77", answers))
    done = machine.run("launch/slurm.sh", *OPTIONS, f"--logs={machine.folder}/logs", "--wait", *TRAIN)
    assert done.returncode == status
    assert ("ended as" in done.stderr) == (status == 1)
    assert machine.verbs("^sleep") == ["^sleep"] * 4


def test_a_job_that_is_queued_is_joined_and_not_submitted_again(machine):
    machine.answer(
        ("^squeue", [(0, "77")]), ("show job 77", [STATES[1], (0, "JobId=77 JobState=COMPLETED Reason=None")])
    )
    done = machine.run("launch/slurm.sh", *OPTIONS, "--wait", *TRAIN)
    assert done.returncode == 0 and "there already, as job 77" in done.stderr
    assert machine.verbs("^sbatch") == []
    assert machine.run("launch/slurm.sh", "--name=clip", "--do=stop").returncode == 0
    assert machine.calls[-1] == ["scancel", "--signal=TERM", "77"]


NODES = "node[01-04]"
NODE = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": NODES, "SLURM_JOB_NUM_NODES": "4", "SLURM_CPUS_PER_TASK": "64"}
JOB = ("launch/slurm.sbatch", "3", "", "8", "/shared/venv/bin/python")


def on_node(machine: Machine, *words: str, **more: str) -> subprocess.CompletedProcess:
    return machine.run("bash", *JOB, *words, SLURM_SUBMIT_DIR=str(machine.checkout), **NODE, **more)


@pytest.mark.parametrize(
    ("code", "restarts", "status", "requeued"),
    [(0, 0, 0, False), (1, 0, 1, False), (42, 0, 42, True), (134, 2, 42, True), (143, 0, 42, True), (42, 3, 42, False),
     (137, 3, 42, False), (2, 0, 2, False), (127, 0, 127, False), (255, 0, 42, True)],
)  # fmt: skip
def test_the_job_queues_itself_again_where_that_can_help(machine, code, restarts, status, requeued):
    machine.answer(("^srun", [(code, "")]), ("show hostnames", [(0, "node01\nnode02\nnode03\nnode04")]))
    done = on_node(machine, "", "", *TRAIN, SLURM_RESTART_COUNT=str(restarts))
    assert done.returncode == status, done.stderr
    assert (["scontrol", "requeue", "77"] in machine.calls) == requeued


def test_an_error_is_repeated_where_that_is_asked_for(machine):
    machine.answer(("^srun", [(1, "")]))
    asked = ("launch/slurm.sbatch", "3", "1", *JOB[3:], "", "", *TRAIN)
    assert machine.run("bash", *asked, SLURM_SUBMIT_DIR=str(machine.checkout), **NODE).returncode == 42
    assert ["scontrol", "requeue", "77"] in machine.calls
    dry = machine.run("launch/slurm.sh", *OPTIONS, "--retry-errors", "--dry-run", *TRAIN)
    assert "launch/slurm.sbatch 100 1 8 " in dry.stdout


def test_the_nodes_processes_know_where_they_meet_and_which_gpus_are_theirs(machine):
    environment = machine.folder / "environment"
    (machine.folder / "bin" / "srun").write_text(f'#!/bin/bash\nenv > {environment}\nprintf "%s\\n" "$@"\n')
    machine.answer(("show hostnames", [(0, "node01\nnode02")]))
    done = on_node(machine, "", "", *TRAIN, ODD)
    assert done.returncode == 0, done.stderr
    seen = dict(line.split("=", 1) for line in environment.read_text().splitlines() if "=" in line)
    assert seen["JAX_COORDINATOR_ADDRESS"] == "node01:20077"
    assert seen["JAX_LOCAL_DEVICE_IDS"] == "0,1,2,3,4,5,6,7"
    assert "\n".join(["/shared/venv/bin/python", "-m", "unclip_jax.train", *TRAIN[1:], ODD]) in done.stdout
    done = on_node(machine, IMAGE, "/shared:/shared", *TRAIN)
    assert {f"--container-image={IMAGE}", "--container-mounts=/shared:/shared"} <= set(done.stdout.split())
    assert "\n".join(["python", "-m", "unclip_jax.train"]) in done.stdout


def test_jax_takes_from_that_environment_what_it_needs(monkeypatch):
    """JAX's own detection, given what a SLURM step and the job's script set, on the last of four nodes."""
    from jax._src import clusters

    step = {"SLURM_STEP_NODELIST": NODES, "SLURM_STEP_NUM_NODES": "4", "SLURM_NTASKS": "4"}
    step |= {"SLURM_PROCID": "3", "SLURM_LOCALID": "0", **NODE}
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    given = detect("node01:20077", None, None, list(range(8)), None, 300)
    assert given == ("node01:20077", 4, 3, list(range(8)))
    assert detect("node01:20077", None, None, None, None, 300)[3] == [
        0
    ]  # why the job says which GPUs: all but one idle


def test_sigterm_reaches_the_program_and_its_exit_code_comes_back(machine):
    """A job in which SLURM sends the script SIGTERM: the step is told by scancel, ends with 42, and is queued again."""
    told = machine.folder / "told"
    (machine.folder / "bin" / "srun").write_text(
        f"#!/bin/bash\ntouch {told}-started\nwhile [ ! -e {told} ]; do /bin/sleep 0.02; done\nexit 42\n"
    )
    (machine.folder / "bin" / "scancel").write_text(f'#!/bin/bash\n[ "$*" = "--signal=TERM 77" ] && touch {told}\n')
    environment = {"PATH": str(machine.folder / "bin"), "SLURM_SUBMIT_DIR": str(machine.checkout), **NODE}
    process = subprocess.Popen(
        ["bash", *JOB, "", "", *TRAIN], cwd=machine.checkout, env=environment, stdout=subprocess.PIPE, text=True
    )
    wait_for(pathlib.Path(f"{told}-started"))
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 42
    assert "SIGTERM: the program saves" in output and "ended with exit code 42" in output
    assert ["scontrol", "requeue", "77"] in machine.calls


def wait_for(path: pathlib.Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


REFUSED = [
    (("--name=my clip",), TRAIN, "it may have letters"),
    (("--name=",), TRAIN, "give --name=VALUE"),
    (("--nodes=0",), TRAIN, "--nodes is '0'"),
    (("--time=tomorrow",), TRAIN, "--time is 'tomorrow'"),
    (("--memory=lots",), TRAIN, "--memory is 'lots'"),
    (("--nodse=4",), TRAIN, "there is no option --nodse"),
    (("--do=cancel",), TRAIN, "takes no program"),
    (("--container=",), TRAIN, "there is no .venv/bin/python-elsewhere"),
    ((), ("trian",), "there is no program"),
]


@pytest.mark.parametrize(("options", "words", "says"), REFUSED)
def test_bad_input_is_one_sentence_before_anything_is_done(machine, options, words, says):
    elsewhere = "--python=.venv/bin/python-elsewhere"
    done = machine.run("launch/slurm.sh", *OPTIONS, elsewhere, *options, *words)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("error: ") and says in line
    assert machine.calls == []


def test_a_missing_tool_is_named_and_a_dry_run_needs_none(tmp_path, launch_checkout):
    bare = Machine(tmp_path, launch_checkout, without=launch_fakes.FAKED)
    done = bare.run("launch/slurm.sh", *OPTIONS, *TRAIN)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "sbatch is not installed" in done.stderr
    assert bare.run("launch/slurm.sh", *OPTIONS, "--dry-run", *TRAIN).returncode == 0
