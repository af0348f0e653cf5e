"""The script that runs all stages: their order, what a failure stops, what a second run leaves out, every launcher."""

import pathlib
import signal
import subprocess
import time

import pytest
from launch_fakes import Machine, commands

STAGES = ("clip", "prior_diffusion", "prior_ar", "decoder", "upsampler_1", "upsampler_2")
AFTER_CLIP = {"prior_diffusion", "prior_ar", "decoder"}
DATA = "--config.data.dataset=/bucket/data/mine"
RUNS = "gs://my-bucket/runs/paper"
IMAGE = "--image=us-east5-docker.pkg.dev/my-project/unclip/unclip_jax:4f2a"
PLACE = ("--project=my-project", "--zone=us-east5-a", "--type=v5p-512")
LAUNCHERS = {
    "tpu_vm": PLACE,
    "queued_resource": (*PLACE, "--spot", "--bucket=gs://my-bucket"),
    "jobset": ("--type=v5p-512", IMAGE),
    "xpk": (*PLACE, "--cluster=pods", IMAGE),
    "slurm": ("--nodes=4", "--gpus=8", "--container=registry/unclip:4f2a", "--poll=1"),
}


@pytest.fixture
def cluster(machine) -> Machine:
    """A machine with a SLURM cluster, whose pauses last no time to speak of."""
    (machine.folder / "bin" / "sleep").unlink()
    (machine.folder / "bin" / "sleep").write_text("#!/bin/bash\nexec /bin/sleep 0.02\n")
    (machine.folder / "bin" / "sleep").chmod(0o755)
    return machine


def jobs(machine: Machine, **ends: str) -> None:
    """Has sbatch number the stages' jobs from 1 on; each runs for a while and then has the end that is given."""
    answers = []
    for number, stage in enumerate(STAGES, 1):
        states = ["PENDING", "RUNNING", "RUNNING", ends.get(stage, "COMPLETED")]
        answers.append((f"^sbatch .*--job-name=paper-{stage.replace('_', '-')} ", [(0, str(number))]))
        answers.append((f"show job {number} ", [(0, f"JobId={number} JobState={state} X=1") for state in states]))
    machine.answer(*answers)


def stages(machine: Machine, *options: str, launcher: str = "slurm") -> subprocess.CompletedProcess:
    return machine.run("launch/stages.sh", *arguments(machine, *options, launcher=launcher))


def arguments(machine: Machine, *options: str, launcher: str = "slurm") -> list[str]:
    own = [f"--launcher={launcher}", "--name=paper", "--variant=paper", f"--runs={RUNS}"]
    own.append(f"--records={machine.folder}/r")
    if launcher == "slurm":
        own.append(f"--logs={machine.folder}/logs")
    return [*own, *LAUNCHERS[launcher], *options, "train", DATA]


def begun(machine: Machine) -> list[str]:
    submitted = [call for call in machine.calls if call[0] == "sbatch"]
    names = [next(word for word in call if word.startswith("--job-name=")) for call in submitted]
    return [name.removeprefix("--job-name=paper-").replace("-", "_") for name in names]


def test_clip_is_done_before_what_reads_it_begins_and_the_upsamplers_wait_for_nothing(cluster):
    jobs(cluster)
    done = stages(cluster)
    assert done.returncode == 0, done.stderr
    order = begun(cluster)
    assert set(order[:3]) == set(STAGES) - AFTER_CLIP and set(order[3:]) == AFTER_CLIP
    lines = [" ".join(call) for call in cluster.calls]
    looks = [index for index, line in enumerate(lines) if "show job 1 " in line]
    assert len(looks) == 4  # the last said COMPLETED
    readers = [index for index, line in enumerate(lines) if "paper-decoder" in line or "paper-prior" in line]
    assert looks[-1] < min(readers)
    for call in (call for call in cluster.calls if call[0] == "sbatch"):
        stage = next(word for word in call if word.startswith("--workdir=")).removeprefix(f"--workdir={RUNS}/")
        assert (f"--config.frozen.clip={RUNS}/clip" in call) == (stage in AFTER_CLIP)
        config = {"upsampler_1": "upsampler.py:paper_1", "upsampler_2": "upsampler.py:paper_2"}
        assert f"--config=configs/{config.get(stage, stage + '.py:paper')}" in call and DATA in call


def test_a_stage_that_fails_is_named_and_stops_only_those_that_need_it(cluster):
    jobs(cluster, clip="FAILED")
    done = stages(cluster)
    assert done.returncode == 1
    assert set(begun(cluster)) == {"clip", "upsampler_1", "upsampler_2"}
    assert "clip ended with exit code 1: error: job 1 ended as FAILED" in done.stderr
    for stage in AFTER_CLIP:
        assert f"{stage} was not begun, for it needs clip" in done.stderr
    assert "upsampler_1 is done" in done.stderr and "upsampler_2 is done" in done.stderr


def test_a_second_run_does_only_what_is_not_done(cluster):
    jobs(cluster, decoder="FAILED")
    assert stages(cluster).returncode == 1
    first = len(begun(cluster))
    jobs(cluster)
    again = stages(cluster)
    assert again.returncode == 0, again.stderr
    assert first == 6 and begun(cluster)[first:] == ["decoder"]
    assert "clip is done already" in again.stderr
    # Other options make it another run, which is not done.
    jobs(cluster)
    assert stages(cluster, "--stages=clip", "--clip=--config.seed=1").returncode == 0
    assert begun(cluster)[first + 1 :] == ["clip"]


def test_no_more_run_side_by_side_than_are_allowed(cluster):
    jobs(cluster)
    assert stages(cluster, "--side-by-side=1").returncode == 0
    order = begun(cluster)
    assert order == ["clip", "prior_diffusion", "prior_ar", "decoder", "upsampler_1", "upsampler_2"]
    lines = [" ".join(call) for call in cluster.calls if call[0] in ("sbatch", "scontrol")]
    for number in range(1, 7):
        at = [index for index, line in enumerate(lines) if f"show job {number} " in line]
        assert at[-1] - at[0] == len(at) - 1, "another stage began or was looked at meanwhile"


def test_chosen_stages_alone_need_no_clip_to_be_trained_here(cluster):
    jobs(cluster)
    done = stages(cluster, "--stages=decoder,upsampler_1")
    assert done.returncode == 0 and sorted(begun(cluster)) == ["decoder", "upsampler_1"]


def test_ended_by_a_signal_it_leaves_the_jobs_as_they_are(cluster):
    cluster.answer(("^sbatch", [(0, "1")]), ("show job", [(0, "JobId=1 JobState=RUNNING X=1")]))
    environment = {"PATH": str(cluster.folder / "bin"), "HOME": str(cluster.folder / "home")}
    process = subprocess.Popen(
        ["bash", "launch/stages.sh", *arguments(cluster)],
        cwd=cluster.checkout, env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while len(begun(cluster)) < 3:
            assert time.monotonic() < deadline, "three stages did not begin"
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 42 and "left as they are" in stderr
    assert cluster.verbs("scancel") == []


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_dry_run_says_what_each_stage_would_do(machine, launcher):
    dry = stages(machine, "--upsampler-2=--config.optim.accumulation=2", "--dry-run", launcher=launcher)
    assert dry.returncode == 0, dry.stderr
    assert machine.calls == [] and not (machine.folder / "r").exists()
    assert subprocess.run(["bash", "-n"], input=dry.stdout, text=True).returncode == 0
    for stage in STAGES:
        assert f"=== {stage}, {'after clip' if stage in AFTER_CLIP else 'at once'}" in dry.stdout
        assert dry.stdout.count(f"--workdir={RUNS}/{stage}") >= 2  # in the launcher's call, and in what that does
    assert "# " + " ".join(["launch/" + launcher + ".sh", "--name=paper-upsampler-2"]) in dry.stdout
    assert commands(dry.stdout.split("<< 'END'")[0])


REFUSED = [
    (("--launcher=gke",), "it is one of tpu_vm"),
    (("--name=Paper",), "small letters"),
    (("--stages=clip,dekoder",), "there is no stage 'dekoder'"),
    (("--variant=paper:1",), "--variant is"),
    (("--runs=",), "give --runs=VALUE"),
    (("--side-by-side=0",), "--side-by-side is '0'"),
    (("--nodse=4",), "there is no option --nodse"),  # the launcher's sentence
    (("--clip=--nodes=none",), "--nodes is 'none'"),
]


@pytest.mark.parametrize(("options", "says"), REFUSED)
def test_bad_input_is_told_before_any_stage_begins(machine, options, says):
    done = stages(machine, *options)
    first = done.stderr.splitlines()[0]
    assert done.returncode == 1 and first.startswith("error: ") and says in first
    assert machine.calls == []
    assert not pathlib.Path(machine.folder / "r").exists()
