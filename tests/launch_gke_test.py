"""The launchers for GKE: the manifest against Kubernetes' schemas and JobSet's API, XPK's command line, the image."""

import copy
import shlex
import subprocess

import jobset_schema
import jsonschema
import launch_fakes
import pytest
import yaml
from launch_fakes import ROOT, Machine, commands

IMAGE = "us-east5-docker.pkg.dev/my-project/unclip/unclip_jax:4f2a"
OPTIONS = ("--name=clip", "--type=v5p-512", f"--image={IMAGE}")
CLUSTER = ("--project=my-project", "--zone=us-east5-a", "--cluster=pods")
TRAIN = ("train", "--config=configs/clip.py:paper", "--workdir=gs://my-bucket/runs/clip")
LAUNCHERS = {"jobset": OPTIONS, "xpk": (*CLUSTER, *OPTIONS)}


def manifest(machine: Machine, *options: str, words: tuple[str, ...] = TRAIN) -> dict:
    dry = machine.run("launch/jobset.sh", *OPTIONS, *options, "--dry-run", *words)
    assert dry.returncode == 0, dry.stderr
    assert machine.calls == []
    assert subprocess.run(["bash", "-n"], input=dry.stdout, text=True).returncode == 0
    return yaml.safe_load(dry.stdout.split("<< 'END'\n")[1].split("\nEND\n")[0])


EVERYTHING = ("--bucket=gs://my-bucket", "--service-account=trainer", "--spot", "--queue=pods", "--host-network")


# Hosts and chips per host from GKE's tables, with its names for topology and accelerator.
@pytest.mark.parametrize(
    ("kind", "slices", "hosts", "chips", "topology", "accelerator"),
    [
        ("v5p-512", 1, 64, 4, "4x8x8", "tpu-v5p-slice"),
        ("v6e-256", 2, 64, 4, "16x16", "tpu-v6e-slice"),
        ("v6e-8", 1, 1, 8, "2x4", "tpu-v6e-slice"),
        ("v5e-16", 4, 4, 4, "4x4", "tpu-v5-lite-podslice"),
        ("v4-128", 1, 16, 4, "4x4x4", "tpu-v4-podslice"),
        ("tpu7x-256", 1, 32, 4, "4x4x8", "tpu7x"),
    ],
)
def test_a_manifest_is_valid_and_has_a_pod_for_every_host(machine, kind, slices, hosts, chips, topology, accelerator):
    found = manifest(machine, f"--type={kind}", f"--slices={slices}", *EVERYTHING)
    jobset_schema.check(found)
    (replicated,) = found["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (replicated["replicas"], job["parallelism"], job["completions"]) == (slices, hosts, hosts)
    pod = job["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}
    selector = pod["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-topology"] == topology
    assert selector["cloud.google.com/gke-tpu-accelerator"] == accelerator


def test_a_manifest_with_nothing_optional_is_valid(machine):
    found = manifest(machine)
    jobset_schema.check(found)
    pod = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert "volumes" not in pod and "hostNetwork" not in pod
    assert "cloud.google.com/gke-spot" not in pod["nodeSelector"]


def test_the_validation_finds_what_kubernetes_would_refuse(machine):
    """The checks above can fail: a misspelt field on either level, a wrong type, a rule that the API does not know."""
    whole = manifest(machine, *EVERYTHING)

    def spoilt(change) -> dict:
        copied = copy.deepcopy(whole)
        change(copied["spec"], copied["spec"]["replicatedJobs"][0]["template"]["spec"])
        return copied

    for change in (
        lambda spec, job: spec.update(failurePolicies={}),
        lambda spec, job: spec["failurePolicy"]["rules"][0].update(action="Restart"),
        lambda spec, job: spec["failurePolicy"]["rules"][0].update(onJobFailureReasons=["ExitCode"]),
        lambda spec, job: job.update(completion=64),
        lambda spec, job: job.update(backoffLimit="0"),
        lambda spec, job: job["template"]["spec"]["containers"][0].update(arguments=[]),
    ):
        with pytest.raises(jsonschema.ValidationError):
            jobset_schema.check(spoilt(change))


def test_exit_codes_mean_to_kubernetes_what_they_mean_to_the_programs(machine):
    found, uncounted = manifest(machine), "RestartJobSetAndIgnoreMaxRestarts"
    assert jobset_schema.action_after(found, code=42) == uncounted
    assert jobset_schema.action_after(found, code=137, condition="DisruptionTarget") == uncounted
    assert jobset_schema.action_after(found, code=1) == "FailJobSet"
    for code in (134, 137, 139, 143):
        assert jobset_schema.action_after(found, code=code) == "RestartJobSet"  # counted, up to maxRestarts
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 20
    patient = manifest(machine, "--retry-errors")
    jobset_schema.check(patient)
    assert jobset_schema.action_after(patient, code=1) == "RestartJobSet"
    assert jobset_schema.action_after(patient, code=42) == uncounted


def test_python_is_process_1_and_gets_its_options_unchanged(machine):
    odd = ("--config.data.mixture=(('a \"b\"','','train',1.0),)", "--x=back\\slash", "--y=", "--z=ä: #{$HOME}`")
    found = manifest(machine, words=(*TRAIN, *odd))
    jobset_schema.check(found)
    (container,) = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "unclip_jax.train"]
    assert container["args"] == [*TRAIN[1:], *odd]
    # JobSet names pods NAME-JOB-SLICE-HOST, in a domain of the name; the first is where all meet.
    assert {"name": "JAX_COORDINATOR_ADDRESS", "value": "clip-slice-0-0.clip:8482"} in container["env"]


def test_jax_takes_from_a_pods_environment_what_it_needs(monkeypatch):
    """JAX's own detection, given what GKE sets in a JobSet's pods, on the last host of the second of two slices."""
    from jax._src import clusters
    from jax._src.clusters import cloud_tpu_cluster, cluster

    for module in (cloud_tpu_cluster, cluster):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
    pod = {"TPU_SKIP_MDS_QUERY": "true", "TPU_WORKER_ID": "3", "TPU_WORKER_HOSTNAMES": "h0,h1,h2,h3"}
    pod |= {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
    for name, value in pod.items():
        monkeypatch.setenv(name, value)
    meeting = "clip-slice-0-0.clip:8482"
    given = clusters.ClusterEnv.auto_detect_unset_distributed_params(meeting, None, None, None, None, 300)
    assert given == (meeting, 8, 7, None)


STATUS = r"get jobset clip --ignore-not-found"
RUNNING = (0, "clip ")


def test_a_jobset_is_applied_and_waited_for(machine):
    machine.answer((STATUS, [(0, ""), RUNNING, (0, "clip Completed")]))
    done = machine.run("launch/jobset.sh", *OPTIONS, "--wait", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert machine.verbs("apply", "delete", "sleep") == ["apply", "sleep"]
    (applied,) = machine.manifests
    assert yaml.safe_load(applied) == manifest(Machine(machine.folder / "another", machine.checkout))


def test_a_cluster_that_does_not_answer_for_a_while_is_asked_again(machine):
    machine.answer((STATUS, [(0, ""), *[(1, "connection refused")] * 9, RUNNING, (0, "clip Completed")]))
    assert machine.run("launch/jobset.sh", *OPTIONS, "--wait", *TRAIN).returncode == 0
    machine.answer((STATUS, [(1, "connection refused")]))
    done = machine.run("launch/jobset.sh", *OPTIONS, "--wait", *TRAIN)
    assert done.returncode == 1 and "connection refused" in done.stderr and "could not be asked" in done.stderr
    assert machine.verbs("apply") == ["apply"]


def test_a_jobset_that_fails_is_told_and_started_anew_by_the_same_command(machine):
    machine.answer((STATUS, [(0, ""), (0, "clip Failed")]))
    done = machine.run("launch/jobset.sh", *OPTIONS, "--wait", *TRAIN)
    assert done.returncode == 1 and "clip failed" in done.stderr
    job = yaml.safe_load(machine.manifests[0])["metadata"]["annotations"]["unclip-jax/job"]
    machine.answer((STATUS, [(0, "clip Failed"), (0, "clip Completed")]), ("annotations", [(0, job)]))
    assert machine.run("launch/jobset.sh", *OPTIONS, "--wait", *TRAIN).returncode == 0
    assert machine.verbs("apply", "delete") == ["apply", "delete", "apply"]
    machine.answer((STATUS, [(0, "clip Completed")]), ("annotations", [(0, job)]))
    assert "done already" in machine.run("launch/jobset.sh", *OPTIONS, *TRAIN).stderr
    machine.answer((STATUS, [RUNNING]), ("annotations", [(0, "123")]))
    done = machine.run("launch/jobset.sh", *OPTIONS, *TRAIN)
    assert done.returncode == 1 and "another job of the name" in done.stderr
    assert machine.verbs("apply", "delete") == ["apply", "delete", "apply"]


def test_xpk_is_called_as_it_wants_to_be(machine):
    words = (*TRAIN, "--config.data.mixture=(('a b','','train',1.0),)")
    dry = machine.run("launch/xpk.sh", *LAUNCHERS["xpk"], "--slices=2", "--type=v5e-256", "--dry-run", *words)
    assert dry.returncode == 0 and machine.calls == []
    (create,) = [line for line in commands(dry.stdout) if line[:3] == ["xpk", "workload", "create"]]
    assert {"--tpu-type=v5litepod-256", "--num-slices=2", f"--docker-image={IMAGE}", "--workload=clip"} <= set(create)
    (command,) = [word.removeprefix("--command=") for word in create if word.startswith("--command=")]
    assert shlex.split(command) == ["exec", "python", "-m", "unclip_jax.train", *words[1:]]
    machine.answer((STATUS, [(0, ""), (0, "clip Completed")]))
    real = machine.run("launch/xpk.sh", *LAUNCHERS["xpk"], "--slices=2", "--type=v5e-256", "--wait", *words)
    assert real.returncode == 0, real.stderr
    assert [call for call in machine.calls if call[0] == "xpk"] == [create]


def test_an_xpk_job_that_is_there_is_joined_and_one_that_failed_is_made_again(machine):
    machine.answer((STATUS, [RUNNING, (0, "clip Failed")]))
    assert machine.run("launch/xpk.sh", *LAUNCHERS["xpk"], "--wait", *TRAIN).returncode == 1
    assert machine.verbs("workload") == []
    machine.answer((STATUS, [(0, "clip Failed"), (0, "clip Completed")]))
    assert machine.run("launch/xpk.sh", *LAUNCHERS["xpk"], "--wait", *TRAIN).returncode == 0
    assert machine.verbs("workload delete", "workload create") == ["workload delete", "workload create"]


REFUSED = [
    (("--name=Clip",), TRAIN, "small letters"),
    (("--name=" + "a" * 50,), TRAIN, "at most"),
    (("--type=v5p-500",), TRAIN, "there is no slice"),
    (("--image=unclip_jax",), TRAIN, "it needs its tag"),
    (("--image=",), TRAIN, "give --image=VALUE"),
    (("--slices=0",), TRAIN, "--slices is '0'"),
    (("--imagge=x",), TRAIN, "there is no option --imagge"),
    (("--do=delete",), TRAIN, "takes no program"),
    ((), ("train", TRAIN[1], "--workdir=runs/clip"), "goes when the machine goes"),
    ((), (), "say what to launch"),
]


@pytest.mark.parametrize("script", LAUNCHERS)
@pytest.mark.parametrize(("options", "words", "says"), REFUSED)
def test_bad_input_is_one_sentence_before_anything_is_done(machine, script, options, words, says):
    done = machine.run(f"launch/{script}.sh", *LAUNCHERS[script], *options, *words)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("error: ") and says in line
    assert machine.calls == []


@pytest.mark.parametrize(("script", "tool"), [("jobset", "kubectl"), ("xpk", "xpk"), ("image", "docker")])
def test_a_missing_tool_is_named_and_a_dry_run_needs_none(tmp_path, launch_checkout, script, tool):
    bare = Machine(tmp_path, launch_checkout, without=launch_fakes.FAKED)
    words = ["--image=registry/unclip"] if script == "image" else [*LAUNCHERS[script], *TRAIN]
    done = bare.run(f"launch/{script}.sh", *words)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and f"{tool} is not installed" in done.stderr
    assert bare.run(f"launch/{script}.sh", "--dry-run", *words).returncode == 0


def test_an_image_is_named_after_its_commit_and_pushed(machine):
    dry = machine.run("launch/image.sh", "--image=registry/unclip", "--extras=cuda12", "--dry-run")
    assert dry.returncode == 0 and machine.calls == []
    done = machine.run("launch/image.sh", "--image=registry/unclip", "--extras=cuda12")
    assert done.returncode == 0, done.stderr
    commit = machine.run("git", "rev-parse", "--short=12", "HEAD").stdout.strip()
    image = f"registry/unclip:{commit}"
    assert done.stdout.splitlines()[-1] == image
    build = ["docker", "build", "--file=launch/Dockerfile", "--build-arg=EXTRAS=cuda12", f"--tag={image}", "."]
    assert machine.calls == [build, ["docker", "push", image]] == commands(dry.stdout)
    assert "in small letters" in machine.run("launch/image.sh", "--image=registry/Unclip:x").stderr


def test_the_image_holds_what_the_programs_need_and_runs_as_nobody_special():
    lines = (ROOT / "launch" / "Dockerfile").read_text().splitlines()
    ignored = (ROOT / "launch" / "Dockerfile.dockerignore").read_text().splitlines()
    copied = [line.split()[1:-1] for line in lines if line.startswith("COPY")]
    for source in (word for words in copied for word in words):
        assert (ROOT / source).exists() and f"!{source.split('/')[0]}" in ignored
    assert ignored[0] == "*" and 'ENTRYPOINT ["python", "-m"]' in lines and "HEALTHCHECK NONE" in lines
    user = next(line.split()[1] for line in lines if line.startswith("USER"))
    assert user.isdigit() and user != "0"
    packages, code = lines.index('RUN pip install ".${EXTRAS:+[${EXTRAS}]}"'), lines.index("COPY unclip_jax unclip_jax")
    assert packages < code, "a change of the code must not install the packages again"
