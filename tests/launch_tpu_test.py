"""The launchers for TPUs: what they would do, what they refuse, and how they go on through every end of a job."""

import pathlib
import shlex
import shutil
import subprocess

import launch_fakes
import pytest
from launch_fakes import Machine, commands

from unclip_jax import topologies

SCRIPTS = ("tpu_vm", "queued_resource")
TRAIN = ("train", "--config=configs/clip.py:paper", "--workdir=gs://my-bucket/runs/clip")


OPTIONS = ("--project=my-project", "--zone=us-east5-a", "--name=clip", "--type=v5p-16", "--bucket=gs://my-bucket")


# --- a job on hosts of a TPU -----------------------------------------------------------------------------------------


def host(number: int, *, job: str, active: str, sub: str, code: int = 0, status: int = 0) -> str:
    return (
        f"unclip_jax t1v-{number} ExecMainCode={code} ExecMainStatus={status} Description={job} LoadState=loaded "
        f"ActiveState={active} SubState={sub}"
    )


EMPTY = "unclip_jax t1v-{} ExecMainCode=0 ExecMainStatus=0 Description=unclip_jax.service LoadState=not-found "
EMPTY += "ActiveState=inactive SubState=dead"
ENDS = {
    "running": ("active", "running", 0, 0), "done": ("active", "exited", 1, 0), "failed": ("failed", "failed", 1, 1),
    "stopped": ("failed", "failed", 1, 42), "killed": ("failed", "failed", 2, 9),
}  # fmt: skip


def hosts(*ends: str, job: str) -> tuple[int, str]:
    """What two hosts answer; an end is a word of ENDS, or "empty"."""
    lines = []
    for number, end in enumerate(ends):
        if end == "empty":
            lines.append(EMPTY.format(number))
        else:
            active, sub, code, status = ENDS[end]
            lines.append(host(number, job=job, active=active, sub=sub, code=code, status=status))
    return 0, "\n".join(["Using ssh batch size of 2.", *lines])


def job_of(*words: str) -> str:
    """The name of a job is a checksum of its command line: POSIX cksum, as every system has it."""
    return subprocess.run(["cksum"], input=shlex.join(words), capture_output=True, text=True).stdout.split()[0]


JOB = job_of(*TRAIN)
BUCKET = ("storage buckets describe", [(0, "US-EAST5")])
ABSENT = (1, "ERROR: (gcloud) NOT_FOUND: Resource 'projects/my-project/x' was not found")


def follow(machine: Machine, states: list, looks: list, *options: str, script: str = "queued_resource"):
    machine.answer(BUCKET, (r"resources describe|tpu-vm describe", states), ("systemctl show unclip_jax --prop", looks))
    return machine.run(f"launch/{script}.sh", *OPTIONS, *options, *TRAIN)


STEPS = ("create", "scp", "install", "host.sh start", "systemctl stop", "tail", "delete")


def test_a_queued_resource_is_waited_for_used_and_deleted(machine):
    looks = [hosts("empty", "empty", job=JOB), hosts("running", "running", job=JOB), hosts("done", "done", job=JOB)]
    states = [ABSENT, *((0, state) for state in ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"))]
    done = follow(machine, states, looks, "--spot")
    assert done.returncode == 0, done.stderr
    assert machine.verbs(*STEPS) == ["create", "scp", "install", "host.sh start", "delete"]
    (create,) = [call for call in machine.calls if "create" in call]
    assert {"--spot", "--node-id=clip", "--accelerator-type=v5p-16", "--runtime-version=v2-alpha-tpuv5"} <= set(create)
    (delete,) = [call for call in machine.calls if "delete" in call]
    assert "--force" in delete and "clip" in delete


def test_a_preempted_queued_resource_is_made_again_and_the_job_goes_on(machine):
    looks = [
        hosts("empty", "empty", job=JOB), hosts("running", "running", job=JOB), (1, "ssh: connection timed out"),
        hosts("empty", "empty", job=JOB), hosts("done", "done", job=JOB),
    ]  # fmt: skip
    active, suspended = (0, "ACTIVE"), (0, "SUSPENDED")
    states = [ABSENT, active, suspended, suspended, suspended, ABSENT, active]
    done = follow(machine, states, looks, "--spot")
    assert done.returncode == 0, done.stderr
    once = ["create", "scp", "install", "host.sh start"]
    assert machine.verbs(*STEPS) == [*once, "delete", *once, "delete"]
    assert "the TPU is gone" in done.stderr


def test_exit_codes_from_a_tpu_that_is_taken_away_say_nothing(machine):
    looks = [
        hosts("empty", "empty", job=JOB), hosts("failed", "failed", job=JOB),
        hosts("empty", "empty", job=JOB), hosts("done", "done", job=JOB),
    ]  # fmt: skip
    states = [(0, "ACTIVE"), (0, "SUSPENDING"), (0, "SUSPENDING"), (0, "SUSPENDED"), ABSENT, (0, "ACTIVE")]
    done = follow(machine, states, looks, "--spot")
    assert done.returncode == 0, done.stderr
    assert machine.verbs("host.sh start", "create") == ["host.sh start", "create", "host.sh start"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_job_that_stopped_after_saving_is_started_again_on_the_same_machines(machine, script):
    looks = [
        hosts("empty", "empty", job=JOB), hosts("stopped", "stopped", job=JOB),
        hosts("stopped", "stopped", job=JOB), hosts("running", "running", job=JOB), hosts("done", "done", job=JOB),
    ]  # fmt: skip
    ready = {"tpu_vm": "READY", "queued_resource": "ACTIVE"}[script]
    done = follow(machine, [(0, ready)], looks, script=script)
    assert done.returncode == 0, done.stderr
    assert machine.verbs(*STEPS) == ["scp", "install", "host.sh start", "host.sh start", "delete"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_job_that_failed_is_not_started_again_and_its_last_lines_are_shown(machine, script):
    ready = {"tpu_vm": "READY", "queued_resource": "ACTIVE"}[script]
    machine.answer(
        BUCKET, ("describe", [(0, ready)]), ("tail -n 40", [(0, "error: no such data set")]),
        ("systemctl show", [hosts("empty", "empty", job=JOB), hosts("failed", "failed", job=JOB)]),
    )  # fmt: skip
    done = machine.run(f"launch/{script}.sh", *OPTIONS, *TRAIN)
    assert done.returncode == 1
    assert machine.verbs(*STEPS) == ["scp", "install", "host.sh start", "tail", "delete"]
    assert "error: no such data set" in done.stdout and "failed on 2 hosts" in done.stderr


def test_a_start_that_does_not_come_through_is_repeated(machine):
    looks = [hosts(end, end, job=JOB) for end in ("empty", "empty", "empty", "done")]
    machine.answer(
        BUCKET, ("describe", [(0, "ACTIVE")]), ("systemctl show unclip_jax --prop", looks),
        ("host.sh install", [(1, "no space left"), (0, "")]), ("host.sh start", [(255, "ssh: broken pipe"), (0, "")]),
    )  # fmt: skip
    done = machine.run("launch/queued_resource.sh", *OPTIONS, *TRAIN)
    assert done.returncode == 0, done.stderr
    start = ["scp", "install", "host.sh start"]
    assert machine.verbs(*STEPS) == ["scp", "install", *start, *start, "delete"]
    assert "could not be prepared" in done.stderr and "could not be started" in done.stderr


def test_an_error_is_repeated_where_that_is_asked_for(machine):
    looks = [hosts(*ends, job=JOB) for ends in (("empty", "empty"), ("failed", "failed"), ("failed", "failed"))]
    done = follow(machine, [(0, "ACTIVE")], [*looks, hosts("done", "done", job=JOB)], "--retry-errors")
    assert done.returncode == 0, done.stderr
    assert machine.verbs(*STEPS) == ["scp", "install", "host.sh start", "host.sh start", "delete"]


def test_crashes_are_repeated_with_longer_and_longer_pauses_and_then_given_up(machine):
    looks = [hosts("killed", "failed", job=JOB)]
    done = follow(machine, [(0, "ACTIVE")], looks)
    assert done.returncode == 1 and "failed or crashed 5 times in a row" in done.stderr
    assert machine.verbs(*STEPS).count("host.sh start") == 5
    pauses = [int(call[1]) for call in machine.calls if call[0] == "sleep"]
    assert pauses == [20, 40, 80, 160]


def test_the_number_of_starts_is_limited(machine):
    done = follow(machine, [(0, "ACTIVE")], [hosts("stopped", "stopped", job=JOB)], "--restarts=2", "--keep")
    assert done.returncode == 42 and "--restarts=2 are used up" in done.stderr
    assert machine.verbs("host.sh start", "delete") == ["host.sh start"] * 3


def test_a_host_that_was_started_anew_is_prepared_again_for_its_bucket_is_not_mounted(machine):
    ends = (("empty", "empty"), ("stopped", "empty"), ("stopped", "empty"), ("done", "done"))
    done = follow(machine, [(0, "ACTIVE")], [hosts(*two, job=JOB) for two in ends])
    assert done.returncode == 0, done.stderr
    once = ["scp", "install", "host.sh start"]
    assert machine.verbs(*STEPS) == [*once, *once, "delete"]


def test_a_host_that_ended_alone_has_the_others_stopped(machine):
    alone, ended = hosts("failed", "running", job=JOB), hosts("failed", "failed", job=JOB)
    done = follow(machine, [(0, "ACTIVE")], [hosts("empty", "empty", job=JOB), *[alone] * 5, ended])
    assert done.returncode == 1
    assert machine.verbs(*STEPS).count("systemctl stop") == 1


def test_machines_that_do_not_answer_at_first_are_waited_for(machine):
    refused = (255, "ssh: connection refused")
    looks = [refused, refused, *(hosts(end, end, job=JOB) for end in ("empty", "running", "done"))]
    done = follow(machine, [(0, "ACTIVE")], looks)
    assert done.returncode == 0, done.stderr
    assert machine.verbs(*STEPS) == ["scp", "install", "host.sh start", "delete"]


def test_one_slice_of_several_that_is_lost_is_the_loss_of_all(machine):
    looks = [hosts("empty", "empty", job=JOB), (255, "ssh: no such node"), hosts("empty", "empty", job=JOB)]
    looks.append(hosts("done", "done", job=JOB))
    slices = [(0, "READY\nPREEMPTED"), (0, "READY\nREADY")]
    states = [*[(0, "ACTIVE")] * 4, ABSENT, (0, "ACTIVE")]
    machine.answer(
        BUCKET, ("resources describe", states),
        ("tpu-vm list", [slices[1], slices[0], slices[0], slices[0], slices[1]]),
        ("systemctl show unclip_jax --prop", looks),
    )  # fmt: skip
    done = machine.run("launch/queued_resource.sh", *OPTIONS, "--slices=2", "--spot", *TRAIN)
    assert done.returncode == 0, done.stderr
    once = ["scp", "install", "host.sh start"]
    assert machine.verbs(*STEPS) == [*once, "delete", "create", *once, "delete"]


def test_a_tpu_that_somebody_deleted_is_not_made_again(machine):
    looks = [hosts("empty", "empty", job=JOB), (255, "ssh: no such node")]
    done = follow(machine, [(0, "ACTIVE"), (0, "DELETING"), (0, "DELETING"), (0, "DELETING"), ABSENT], looks)
    assert done.returncode == 1 and "deleted by somebody else" in done.stderr
    assert machine.verbs("create", "delete") == []


def test_a_refusal_ends_it_unless_the_tpu_was_granted_before(machine):
    machine.answer(BUCKET, ("describe", [ABSENT]), ("create", [(1, "ERROR: quota exceeded")]))
    done = machine.run("launch/queued_resource.sh", *OPTIONS, *TRAIN)
    assert done.returncode == 1 and "quota exceeded" in done.stderr and machine.verbs("create") == ["create"]
    machine.answer(
        BUCKET, ("describe", [(0, "SUSPENDED"), ABSENT, ABSENT, (0, "ACTIVE")]),
        ("create", [(1, "try later"), (0, "")]), ("systemctl show", [hosts("done", "done", job=JOB)]),
    )  # fmt: skip
    assert machine.run("launch/queued_resource.sh", *OPTIONS, *TRAIN).returncode == 0
    assert machine.verbs("create", "delete") == ["create", "delete", "create", "create", "delete"]


def test_a_launcher_that_comes_back_joins_the_job_that_runs(machine):
    looks = [hosts("running", "running", job=JOB), hosts("done", "done", job=JOB)]
    done = follow(machine, [(0, "ACTIVE")], looks)
    assert done.returncode == 0
    assert machine.verbs(*STEPS) == ["delete"]


def test_another_job_on_the_machines_is_left_alone(machine):
    done = follow(machine, [(0, "ACTIVE")], [hosts("running", "running", job="123")])
    assert done.returncode == 1 and "busy with another job" in done.stderr
    assert machine.verbs(*STEPS) == []


def test_hosts_that_are_there_and_do_not_answer_end_it_without_deleting_anything(machine):
    looks = [hosts("running", "running", job=JOB), (255, "ssh: no route to host")]
    done = follow(machine, [(0, "ACTIVE")], looks)
    assert done.returncode == 1 and "no route to host" in done.stderr
    assert machine.verbs(*STEPS) == []


def test_a_spot_tpu_vm_that_was_preempted_is_made_again(machine):
    looks = [hosts("empty", "empty", job=JOB), hosts("done", "done", job=JOB)]
    states = [(0, "PREEMPTED"), ABSENT, (0, "CREATING"), (0, "READY")]
    done = follow(machine, states, looks, "--spot", script="tpu_vm")
    assert done.returncode == 0, done.stderr
    assert machine.verbs(*STEPS) == ["delete", "create", "scp", "install", "host.sh start", "delete"]
    assert machine.verbs("--spot") == ["--spot"]


# --- what they print -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_is_a_script_of_what_would_be_done(machine, script):
    words = (*TRAIN, "--config.data.mixture=(('a b','','train',1.0),)")
    dry = machine.run(f"launch/{script}.sh", *OPTIONS, "--dry-run", *words)
    assert dry.returncode == 0, dry.stderr
    assert machine.calls == [] and not list((machine.folder / "home").rglob("*"))
    assert subprocess.run(["bash", "-n"], input=dry.stdout, text=True).returncode == 0
    printed = commands(dry.stdout)
    (start,) = [shlex.split(line[-1].removeprefix("--command=")) for line in printed if "host.sh start" in line[-1]]
    assert start[-len(words) :] == list(words)
    job = start[-len(words) - 1]
    # A run in which all goes well makes the same calls in the same order, besides those that look.
    looks = [hosts("empty", "empty", job=job), hosts("done", "done", job=job)]
    ready = {"tpu_vm": "READY", "queued_resource": "ACTIVE"}[script]
    machine.answer(BUCKET, ("(resources|tpu-vm) describe", [ABSENT, (0, ready)]), ("systemctl show", looks))
    real = machine.run(f"launch/{script}.sh", *OPTIONS, *words)
    assert real.returncode == 0, real.stderr

    def doing(calls: list[list[str]]) -> list[list[str]]:
        return [call for call in calls if call[0] == "gcloud" and "systemctl show" not in call[-1] and
                not ({"compute", "describe"} <= set(call) or "list" in call)]  # fmt: skip

    assert doing(machine.calls) == doing(printed)


def test_the_evaluation_job_is_launched_like_any_program(machine):
    words = ("evaluate", "--workdir=gs://my-bucket/runs/decoder")
    dry = machine.run("launch/queued_resource.sh", *OPTIONS, "--dry-run", *words)
    assert dry.returncode == 0 and dry.stderr == ""
    assert "start " in dry.stdout and " evaluate --workdir=gs://my-bucket/runs/decoder" in dry.stdout


def test_several_slices_are_one_queued_resource(machine):
    dry = machine.run("launch/queued_resource.sh", *OPTIONS, "--slices=4", "--reserved", "--dry-run", *TRAIN)
    (create,) = [line for line in commands(dry.stdout) if "create" in line]
    assert {"--node-count=4", "--node-prefix=clip", "--reserved"} <= set(create)
    assert not any(word.startswith("--node-id") for word in create)
    ssh = [line for line in commands(dry.stdout) if "ssh" in line]
    assert ssh and all({"--node=all", "--worker=all"} <= set(line) for line in ssh)


# From Cloud TPU's and GKE's tables: chips, chips per host, topology.
SLICES = {
    "v4-8": (4, 4, "2x2x1"), "v4-512": (256, 4, "4x8x8"), "v5e-1": (1, 1, "1x1"), "v5e-4": (4, 4, "2x2"),
    "v5e-8": (8, 8, "2x4"), "v5e-16": (16, 4, "4x4"), "v5litepod-256": (256, 4, "16x16"), "v5p-8": (4, 4, "2x2x1"),
    "v5p-64": (32, 4, "2x4x4"), "v5p-512": (256, 4, "4x8x8"), "v5p-12288": (6144, 4, "16x16x24"),
    "v6e-8": (8, 8, "2x4"), "v6e-256": (256, 4, "16x16"), "tpu7x-128": (64, 4, "4x4x4"),
}  # fmt: skip
READ = ". launch/command_line.sh; . launch/tpu_types.sh; read_tpu_type $1; "
READ += "echo $tpu_chips $tpu_chips_per_host $tpu_topology $tpu_hosts"


@pytest.mark.parametrize("name", SLICES)
def test_slices_have_the_chips_and_hosts_that_cloud_tpu_lists(machine, name):
    chips, per_host, topology = SLICES[name]
    found = machine.run("bash", "-c", READ, "-", name).stdout.split()
    assert found == [str(chips), str(per_host), topology, str(chips // per_host)]
    sides = [int(side) for side in topology.split("x")]
    assert chips == sides[0] * sides[1] * (sides[2] if len(sides) == 3 else 1)


def test_what_can_be_planned_can_be_launched(machine):
    """The slices that `plan` knows by name have the same chips in the same shape here."""
    names = topologies.names()
    loop = READ.replace("read_tpu_type $1", "for name; do read_tpu_type $name") + "; done"
    done = machine.run("bash", "-c", loop, "-", *names)
    assert done.returncode == 0, done.stderr
    for name, line in zip(names, done.stdout.splitlines(), strict=True):
        chips, _, shape, _ = line.split()
        planned = topologies.find(name)
        assert (int(chips), shape) == (planned.chips, "x".join(map(str, planned.shape))), name


def test_every_bucket_that_a_job_uses_must_be_in_its_region(machine):
    machine.answer(
        ("describe gs://my-bucket", [(0, "US-EAST5")]), ("describe gs://elsewhere", [(0, "EUROPE-WEST4")]),
    )  # fmt: skip
    frozen = "--config.frozen.clip=gs://elsewhere/runs/clip"
    done = machine.run("launch/queued_resource.sh", *OPTIONS, *TRAIN, frozen)
    assert done.returncode == 1 and "gs://elsewhere is in europe-west4" in done.stderr
    assert machine.verbs("compute") == []
    dry = machine.run("launch/queued_resource.sh", *OPTIONS, "--dry-run", *TRAIN, frozen)
    assert "describe gs://elsewhere" in dry.stdout and "describe gs://my-bucket" in dry.stdout


# --- what they refuse ------------------------------------------------------------------------------------------------


def instead(name: str, value: str) -> tuple[str, ...]:
    kept = tuple(word for word in OPTIONS if not word.startswith(f"--{name}="))
    return (*kept, f"--{name}={value}") if value else kept


REFUSED = [
    (instead("project", ""), TRAIN, "give --project=VALUE"),
    (instead("project", "My Project"), TRAIN, "no project ID"),
    (instead("zone", ""), TRAIN, "give --zone=VALUE"),
    (instead("zone", "us-east5"), TRAIN, "a zone is written like us-east5-a"),
    (instead("name", "Clip"), TRAIN, "small letters"),
    (instead("name", "my clip"), TRAIN, "small letters"),
    (instead("name", "a" * 41), TRAIN, "at most 40"),
    (instead("type", "v5p-500"), TRAIN, "there is no slice v5p-500; the number counts cores"),
    (instead("type", "v6e-512"), TRAIN, "there is no slice v6e-512; the number counts chips"),
    (instead("type", "h100-8"), TRAIN, "types are v4-"),
    (instead("type", "tpu7x-128"), TRAIN, "only GKE has"),
    (instead("bucket", "my-bucket"), TRAIN, "gs://NAME"),
    ((*OPTIONS, "--bukcet=gs://my-bucket"), TRAIN, "there is no option --bukcet"),
    ((*OPTIONS, "--spot=yes"), TRAIN, "--spot takes no value"),
    ((*OPTIONS, "--zone"), TRAIN, "--zone needs a value"),
    ((*OPTIONS, "--restarts=many"), TRAIN, "--restarts is 'many'"),
    ((*OPTIONS, "--do=fly"), TRAIN, "it is one of run, status"),
    ((*OPTIONS, "--do=delete"), TRAIN, "takes no program"),
    ((*OPTIONS, "--ref=nowhere"), TRAIN, "is no commit"),
    (OPTIONS, (), "say what to launch"),
    (OPTIONS, ("Train",), "no name of a program"),
    (OPTIONS, ("trian", *TRAIN[1:]), "there is no program unclip_jax/trian.py"),
    (OPTIONS, ("train", "configs/clip.py"), "is no option of train"),
    (OPTIONS, ("train", "--config=configs/clop.py:paper"), "the config configs/clop.py is not in this checkout"),
    (OPTIONS, ("train", TRAIN[1], "--workdir=runs/clip"), "goes when the machine goes"),
    (OPTIONS, ("train", TRAIN[1], "--workdir=/bucket/runs/clip"), "goes when the machine goes"),
]


@pytest.mark.parametrize(("options", "words", "says"), REFUSED)
def test_bad_input_is_one_sentence_before_anything_is_done(machine, options, words, says):
    for script in SCRIPTS:
        done = machine.run(f"launch/{script}.sh", *options, *words)
        (line,) = [line for line in done.stderr.splitlines() if not line.startswith("note:")]
        assert done.returncode == 1 and line.startswith("error: ") and says in line
    assert machine.calls == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_bucket_in_another_region_is_refused_before_anything_is_made(machine, script):
    machine.answer(("storage buckets describe", [(0, "EUROPE-WEST4")]))
    done = machine.run(f"launch/{script}.sh", *OPTIONS, *TRAIN)
    assert done.returncode == 1 and "every byte between them is billed" in done.stderr
    assert machine.verbs("create", "describe clip") == []
    machine.answer(("storage buckets describe", [(1, "ERROR: not found: 404.")]))
    assert "cannot be looked up" in machine.run(f"launch/{script}.sh", *OPTIONS, *TRAIN).stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_missing_tool_is_named_and_a_dry_run_needs_none(tmp_path, launch_checkout, script):
    bare = Machine(tmp_path, launch_checkout, without=launch_fakes.FAKED)
    done = bare.run(f"launch/{script}.sh", *OPTIONS, *TRAIN)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "gcloud is not installed" in done.stderr
    assert bare.run(f"launch/{script}.sh", *OPTIONS, "--dry-run", *TRAIN).returncode == 0


# --- the host --------------------------------------------------------------------------------------------------------


def fake_host(tmp_path: pathlib.Path, checkout: pathlib.Path, endpoints: str, environment: str = "") -> Machine:
    """A TPU VM's host, installed, whose metadata server answers as told; sudo, systemctl and systemd-run only note."""
    machine = Machine(tmp_path, checkout)
    for name in ("curl", "sudo", "systemctl", "systemd-run", "uv", "mountpoint", "gcsfuse", "lsb_release"):
        shutil.copy(machine.folder / "bin" / "docker", machine.folder / "bin" / name)
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.touch(mode=0o755)
    machine.answer(("attributes/tpu-env", [(0, environment)]), ("worker-network-endpoints", [(0, endpoints)]))
    return machine


@pytest.mark.parametrize(
    ("endpoints", "environment", "meeting"),
    [
        ("10.0.0.2,10.0.0.3", "", "10.0.0.2"),
        ("worker-0:8470:10.0.0.2,worker-1:8470:10.0.0.3", "ACCELERATOR_TYPE: 'v5p-16'", "10.0.0.2"),
        ("10.0.0.7,10.0.0.8", "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_COORDINATOR_ADDRESS: '10.0.0.2:8080'", "10.0.0.2"),
        ("10.0.0.7,10.0.0.8", "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.2'", "10.0.0.2"),
    ],
)
def test_hosts_meet_where_the_metadata_says(tmp_path, launch_checkout, endpoints, environment, meeting):
    machine = fake_host(tmp_path, launch_checkout, endpoints, environment)
    done = machine.run("launch/host.sh", "start", "123", *TRAIN)
    assert done.returncode == 0, done.stderr
    (service,) = [call for call in machine.calls if "systemd-run" in call]
    assert f"--setenv=JAX_COORDINATOR_ADDRESS={meeting}:8482" in service
    # Python itself is the service's process, so that SIGTERM reaches it.
    python = next(index for index, word in enumerate(service) if word.endswith("/.venv/bin/python"))
    assert service[python + 1 :] == ["-m", "unclip_jax.train", *TRAIN[1:]]
    assert "--description=123" in service and "--property=KillMode=mixed" in service


def test_a_host_is_installed_and_mounts_the_bucket_to_read(tmp_path, launch_checkout):
    machine = fake_host(tmp_path, launch_checkout, "10.0.0.2")
    machine.answer(("^mountpoint", [(1, "")]))
    done = machine.run("launch/host.sh", "install", "--bucket=gs://my-bucket")
    assert done.returncode == 0, done.stderr
    assert machine.verbs("uv pip install", "gcsfuse --implicit") == ["uv pip install", "gcsfuse --implicit"]
    assert ["gcsfuse", "--implicit-dirs", "-o", "ro", "my-bucket", "/bucket"] in machine.calls
